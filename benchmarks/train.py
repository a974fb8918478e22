"""Training benchmark: `python -m benchmarks.train`.

Trains a few steps with smolora and with transformers and PEFT, on the same weights, rows and threads, in turn,
each in a fresh process. Prints Markdown tables and whether targets are reached; writes train.json. The machine
must be otherwise idle.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by its path: Python put this folder first, not the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks import command
from benchmarks.command import Made, Say, positive
from benchmarks.machine import Machine
from benchmarks.prompts import library_text
from benchmarks.training.peer import COMPILED
from benchmarks.training.runs import TORCH, Measured, Run, Side, measure
from benchmarks.training.train_report import Results, Row, markdown
from benchmarks.training.works import WORKS, Work, reduced, rows_of
from server.model.base.export import export_hugging_face
from server.model.base.source import resolve_base
from server.model.base.weights import load_base
from server.model.device import choose_device

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COMPILERS = ("c++", "g++", "clang++")


def main(arguments: list[str] | None = None) -> Results:
    """Run the benchmark; return, print and write the results."""
    keys = [work.key for work in WORKS]
    parser = command.parser("benchmarks.train", "Measure training, in turn with transformers and PEFT.")
    parser.add_argument(
        "--rounds", type=positive, default=3, help="number of rounds; each measures every work once on all sides"
    )
    parser.add_argument("--only", nargs="+", choices=keys, default=keys, help="works to measure")
    parser.add_argument(
        "--torch-dtype",
        choices=_DTYPES,
        default=torch_dtype(),
        help="dtype of the peers, and of our torch path",
    )
    parser.add_argument("--device", default="cpu", help="device of all sides")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = 1
    say = command.speaker()
    options.out.mkdir(parents=True, exist_ok=True)
    works = [reduced(work) if options.quick else work for work in WORKS if work.key in options.only]
    if not any(map(shutil.which, COMPILERS)):
        say("there is no C++ compiler: the compiled peer is left out")
        works = [work.without(COMPILED) for work in works]
    if options.device != "cpu":
        works = [work.without(TORCH) for work in works]  # it is what we run there by default
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=options.out) as scratch:
        rows = _measure(works, Path(scratch), options, say)
    results = Results(
        Made.by("benchmarks.train", arguments, quick=options.quick),
        Machine.this(options.threads),
        Path(options.model).name,
        options.rounds,
        rows,
        options.torch_dtype,
    )
    command.write(options.out, "train", results)
    print(markdown(results))
    return results


def torch_dtype() -> str:
    """Return the faster dtype: on processors without bf16 instructions, fp32 by far."""
    _, dtype = choose_device("cpu", "auto")
    return "bf16" if dtype is torch.bfloat16 else "fp32"


def _measure(works: Sequence[Work], scratch: Path, options: argparse.Namespace, say: Say) -> list[Row]:
    """Measure all rounds. The order of the sides rotates from round to round and from work to work."""
    converted = resolve_base(options.model, options.home, progress=say)
    base = load_base(converted)
    export_hugging_face(base, scratch / "base", torch.bfloat16)
    text = base.tokenizer.encode(library_text(), add_special_tokens=False)
    found: dict[tuple[str, Side], list[Measured]] = {}
    for number in range(options.rounds):
        for index, work in enumerate(works):
            run = Run(
                work.method,
                rows_of(work, text),
                work.batch_size,
                converted,
                scratch / "base",
                options.threads,
                _DTYPES[options.torch_dtype],
                options.home / "native",
                scratch.resolve() / "compiled",
                options.device,
            )
            shift = (number + index) % len(work.sides)
            for side in (*work.sides[shift:], *work.sides[:shift]):
                measured = measure(side, run)
                found.setdefault((work.key, side), []).append(measured)
                say(
                    f"round {number + 1}: {work.title}: {side} {measured.tokens_per_second:.0f} tokens/s, "
                    f"{measured.peak_rss / 1e9:.2f} GB, {measured.warm_up:.0f} s to warm up"
                )
    return [Row(work, {side: tuple(found[work.key, side]) for side in work.sides}) for work in works]


if __name__ == "__main__":
    main()
