"""The training benchmark: `python -m benchmarks.train`.

Trains a few steps with smolora and with transformers and PEFT, on the same weights, rows and threads, in turn and
each time in a fresh process. Prints a table in Markdown and whether the targets are reached; writes train.json and
train.md. For figures that mean something the machine must be otherwise idle.
"""
# ruff: noqa: RUF001

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # run by its path: what Python put first is this folder, not the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks import command
from benchmarks.measure import median_ratio, percentile
from benchmarks.options import positive
from benchmarks.prompts import library_text
from benchmarks.report import table
from benchmarks.results import Machine
from benchmarks.targets import TIMES_PEER, Target, at_least, spread
from benchmarks.training_runs import Measured, Run, Side, measure
from server.model.export import export_hugging_face
from server.model.source import resolve_base
from server.model.weights import load_base
from server.training.spec import Method


@dataclass(frozen=True)
class Work:
    """What is trained on, and what is to be reached: times the peer's speed, and of its memory."""

    key: str
    title: str
    method: Method
    batch_size: int
    shortest: int
    longest: int
    steps: int  # that are timed
    least_speed: float
    most_memory: float | None = None


WORKS = (
    Work("8x128", "LoRA, 8 × 128 tokens", "lora", 8, 128, 128, 4, 1.1),
    Work("4x512", "LoRA, 4 × 512 tokens", "lora", 4, 512, 512, 2, 1.2, 0.5),
    Work("full", "full fine-tuning, 8 × 128 tokens", "full", 8, 128, 128, 4, 1.0),
    Work("short", "LoRA, 8 rows of 10–40 tokens", "lora", 8, 10, 40, 12, 2.0),
)


@dataclass(frozen=True)
class Row:
    """A work's figures, an entry for each round."""

    work: Work
    ours: tuple[Measured, ...]
    peer: tuple[Measured, ...]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run it all; the rows, which are printed and written too."""
    keys = [work.key for work in WORKS]
    parser = command.parser("benchmarks.train", "Measures training, and transformers and PEFT in turn with it.")
    parser.add_argument("--rounds", type=positive, default=3, help="each measures every work once on both sides")
    parser.add_argument("--only", nargs="+", choices=keys, default=keys, help="works to measure")
    parser.add_argument("--torch", action="store_true", help="smolora without its native code")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = 1
    say = command.speaker()
    options.out.mkdir(parents=True, exist_ok=True)
    works = [_quick(work) if options.quick else work for work in WORKS if work.key in options.only]
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=options.out) as scratch:
        converted = resolve_base(options.model, options.home, progress=say)
        base = load_base(converted)
        export_hugging_face(base, Path(scratch) / "base", torch.bfloat16)
        text: list[int] = base.tokenizer.encode(library_text(), add_special_tokens=False, verbose=False)
        places: dict[Side, Path] = {"ours": converted, "peer": Path(scratch) / "base"}
        rows = _measure(works, text, places, options, say)
    wishes = [target for row in rows for target in targets(row, quick=options.quick)]
    machine = Machine.this(options.threads)
    report = _markdown(machine, rows, wishes, options)
    document = {"machine": asdict(machine), "rows": list(map(asdict, rows)), "targets": list(map(asdict, wishes))}
    command.write(options.out, "train", document, report)
    return rows


def _measure(
    works: Sequence[Work],
    text: Sequence[int],
    places: dict[Side, Path],
    options: argparse.Namespace,
    say: command.Say,
) -> list[Row]:
    """Who goes first changes from round to round and from work to work."""
    found: dict[tuple[str, Side], list[Measured]] = {}
    for number in range(options.rounds):
        for index, work in enumerate(works):
            rows = _rows(work, text)
            sides: tuple[Side, Side] = ("ours", "peer") if (number + index) % 2 == 0 else ("peer", "ours")
            for side in sides:
                native = None if options.torch else options.home / "native"
                run = Run(work.method, rows, work.batch_size, places[side], options.threads, native)
                measured = measure(side, run)
                found.setdefault((work.key, side), []).append(measured)
                speed, memory = measured.tokens_per_second, measured.peak_rss / 1e9
                say(f"round {number + 1}: {work.title}: {side} {speed:.0f} tokens/s, {memory:.2f} GB")
    return [Row(work, tuple(found[work.key, "ours"]), tuple(found[work.key, "peer"])) for work in works]


def _rows(work: Work, text: Sequence[int]) -> list[list[int]]:
    """Pieces of the text, one after the other: a batch to warm up, then those of the timed steps."""
    lengths = random.Random(0)
    rows, place = [], 0
    for _ in range(work.batch_size * (work.steps + 1)):
        length = lengths.randint(work.shortest, work.longest)
        if place + length > len(text):
            place = 0
        rows.append(list(text[place : place + length]))
        place += length
    return rows


def targets(row: Row, *, quick: bool) -> list[Target]:
    """What a work is meant to reach, and whether it does; a quick run reaches nothing and misses nothing."""
    speed = median_ratio(_speeds(row.ours), _speeds(row.peer))
    found = [at_least(row.work.title, speed, row.work.least_speed, TIMES_PEER)]
    if row.work.most_memory is not None:
        memory = median_ratio(_memory(row.ours), _memory(row.peer))
        assert memory is not None
        unit, most = "of PEFT's peak RSS", row.work.most_memory
        found.append(Target(row.work.title, f"≤ {most:g} {unit}", spread(memory, unit), memory.median <= most))
    return [Target(t.load, t.wanted, t.measured, None if quick else t.reached) for t in found]


def _markdown(machine: Machine, rows: Sequence[Row], wishes: Sequence[Target], options: argparse.Namespace) -> str:
    work = (
        f"{Path(options.model).name} in bf16; r=16 on all seven linear modules, AdamW; tokens without padding; "
        f"median of {options.rounds} rounds in turn, each in a fresh process"
        + ("; smolora without its native code" if options.torch else "")
    )
    head = (
        "work",
        "smolora, tokens/s",
        "PEFT, tokens/s",
        TIMES_PEER,
        "smolora, peak RSS",
        "PEFT, peak RSS",
        "losses",
    )
    cells = [
        (
            row.work.title,
            f"{percentile(_speeds(row.ours), 50):.0f}",
            f"{percentile(_speeds(row.peer), 50):.0f}",
            spread(median_ratio(_speeds(row.ours), _speeds(row.peer)), "×"),
            f"{percentile(_memory(row.ours), 50) / 1e9:.2f} GB",
            f"{percentile(_memory(row.peer), 50) / 1e9:.2f} GB",
            f"{row.ours[0].loss:.3f}",
            f"{row.peer[0].loss:.3f}",
        )
        for row in rows
    ]
    reached = {True: "yes", False: "**no**", None: "–"}
    verdicts = [(wish.load, wish.wanted, wish.measured, reached[wish.reached]) for wish in wishes]
    parts = [f"{machine}.", f"{work}."]
    if options.quick:
        parts.append("**A quick run, reduced: not to be compared with anything.**")
    parts += [table(head, cells), table(("target", "wanted", "measured", "reached"), verdicts)]
    return "\n\n".join(parts) + "\n"


def _speeds(measured: Sequence[Measured]) -> list[float]:
    return [one.tokens_per_second for one in measured]


def _memory(measured: Sequence[Measured]) -> list[float]:
    return [float(one.peak_rss) for one in measured]


def _quick(work: Work) -> Work:
    shrunk = {"batch_size": 2, "shortest": min(work.shortest, 8), "longest": min(work.longest, 24), "steps": 1}
    return Work(**{**asdict(work), **shrunk})


if __name__ == "__main__":
    main()
