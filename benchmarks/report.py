"""Makes docs/benchmarks.md, its charts, and the README's figures: `python -m benchmarks.report`.

From what the benchmarks wrote under --out. A part that was not measured again stays as it stands in the pages,
which tell what it was measured with; one that never was is said to be missing. A quick run is refused.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

if not __package__:  # run by its path: what Python put first is this folder, not the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import command
from benchmarks.command import Made
from benchmarks.curves import report as curves
from benchmarks.curves.results import Results as Curves
from benchmarks.held import report as held
from benchmarks.measure import median_ratio
from benchmarks.serving import report as serving
from benchmarks.serving.results import Results as Serving
from benchmarks.serving.targets import evaluate as serving_targets
from benchmarks.shapes import report as shapes
from benchmarks.training import adapters_report, beside_report, methods_report, train_report
from benchmarks.training.peer import COMPILED, EAGER

BENCHMARKS_PAGE = "[docs/benchmarks.md](docs/benchmarks.md)"
BEGIN, END = "<!-- figures: made by python -m benchmarks.report -->", "<!-- /figures -->"
INTRODUCTION = """# Benchmarks

Made by `python -m benchmarks.report` from the results of the commands below; nothing here is written by hand.

To measure anew, on a machine that does nothing else: once `python -m benchmarks.peers make llama.cpp openvino`,
then `python -m benchmarks.serve`, `.curves`, `.shapes`, `.held` (once `llama.cpp-avx2` and `llama.cpp-avx512` are
made), `.train`, `.methods`, `.adapters` and `.beside`, then this command.

- Every figure is the median of its rounds, with the lowest and the highest beside it. A ratio is the median of the
  rounds' own ratios: absolute figures drift between runs and machines.
- All systems of a table were measured in one run, in turn, on the same weights, prompts or rows, and threads. A
  peer gets every setting that we get, the allocator's included; where it isn't clear which setting suits it, both
  are tried first and the faster one is taken.
- Targets are ratios to a peer, or to ourselves. Those that are missed are shown, too.
- ik_llama.cpp is no peer here, as no package brings it. Where it was measured by hand it was faster than llama.cpp
  for one stream of quantized weights, and slower for many streams.
"""


T = TypeVar("T")


class _HasMade(Protocol):
    @property
    def made(self) -> Made: ...


@dataclass(frozen=True)
class Found:
    """What has been measured."""

    serve: Serving | None
    curves: Curves | None
    shapes: shapes.Results | None
    held: held.Results | None
    train: train_report.Results | None
    methods: methods_report.Results | None
    adapters: adapters_report.Results | None
    beside: beside_report.Results | None

    @classmethod
    def read(cls, out: Path) -> "Found":
        """SystemExit where a result is of a quick run."""
        found = cls(
            command.read(out, "serve", Serving),
            command.read(out, "curves", Curves),
            command.read(out, "shapes", shapes.Results),
            command.read(out, "held", held.Results),
            command.read(out, "train", train_report.Results),
            command.read(out, "methods", methods_report.Results),
            command.read(out, "adapters", adapters_report.Results),
            command.read(out, "beside", beside_report.Results),
        )
        every: tuple[_HasMade | None, ...] = (
            found.serve,
            found.curves,
            found.shapes,
            found.held,
            found.train,
            found.methods,
            found.adapters,
            found.beside,
        )
        if quick := [one.made.command for one in every if one is not None and one.made.quick]:
            raise SystemExit(f"a quick run measures nothing and is published nowhere: {', '.join(quick)}")
        return found


def main(arguments: list[str] | None = None) -> None:
    """Write all of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Makes docs/benchmarks.md.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="where the results are")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where benchmarks.md and the charts go")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="whose figures are replaced")
    options = parser.parse_args(arguments)
    found = Found.read(options.out)
    to = options.docs / "benchmarks.md"
    text = page(found, to.read_text(encoding="utf-8") if to.exists() else "")
    readme = options.readme.read_text(encoding="utf-8")
    readme = with_figures(readme, figures(found, readme))
    charts(found, options.docs)
    to.write_text(text, encoding="utf-8")
    options.readme.write_text(readme, encoding="utf-8")
    print(f"wrote {to}, its charts and the figures of {options.readme}")


def page(found: Found, before: str) -> str:
    """docs/benchmarks.md, as it follows what it was `before`."""
    parts = [INTRODUCTION.strip()]

    def add(title: str, name: str, results: T | None, render: Callable[[T], str], chart: str | None) -> None:
        if results is None:
            missing = f"## {title}\n\nNot measured yet: `python -m benchmarks.{name}`."
            parts.append(_standing(title, before) or missing)
            return
        parts.extend([f"## {title}", render(results).strip(), *([f"![{chart}]({name}.png)"] if chart else [])])

    add("Serving", "serve", found.serve, serving.markdown, "Output tokens per second by load")
    add("Scaling curves", "curves", found.curves, curves.markdown, "Speed, latency and memory as one thing grows")
    add("Larger bases", "shapes", found.shapes, shapes.markdown, None)
    add("Lesser processors", "held", found.held, held.markdown, None)
    add("Training", "train", found.train, train_report.markdown, "Tokens per second and memory")
    title = "LoRA against full fine-tuning"
    add(title, "methods", found.methods, methods_report.markdown, "Methods compared")
    add("Useful adapters", "adapters", found.adapters, adapters_report.markdown, "Accuracy of adapters")
    add("Training beside serving", "beside", found.beside, beside_report.markdown, None)
    return "\n\n".join(parts) + "\n"


def figures(found: Found, before: str) -> str:
    """The README's: a table, a chart, and what training comes to in a few lines.

    A part of which nothing was measured is what it was `before`.
    """
    parts = []
    if (serve := found.serve) is None:
        parts += [_standing("How fast", before) or "## How fast"]
    else:
        targets = [target for target in serving_targets(serve) if target.reached is not None]
        reached = sum(bool(target.reached) for target in targets)
        systems = [facts for facts in serve.systems if facts.max_streams is None]
        over = [facts.name for facts in systems if facts.over_http]
        settings = serve.settings
        parts += [
            "## How fast",
            f"Output tokens per second on {serve.machine.threads} threads of an {serve.machine.processor}, no "
            f"GPU; {settings.model} in {settings.dtype}, prompts of {settings.prompt_tokens} tokens, "
            f"{settings.max_tokens} new tokens, adapters of rank 16 on all seven linear modules; median "
            f"(lowest–highest) of {settings.rounds} rounds in turn. {', '.join(over)}: over HTTP, the client on "
            "the same cores; the others in process.",
            serving.speed_table(replace(serve, systems=systems), serving.headlines(serve)),
            "![Output tokens per second by load and system](docs/serve.png)",
            f"{reached} of the {len(targets)} goals that we set ourselves are reached. "
            f"{BENCHMARKS_PAGE} has them all, with latencies and settings.",
        ]
    title = "What training brings, and costs"
    stood = re.findall(r"^- (.*)$", _standing(title, before) or "", re.MULTILINE)
    lines = {_topic(line): f"- {line}" for line in (*stood, *_training_lines(found))}
    parts += [
        "\n".join([f"## {title}\n", *lines.values()]),
        f"All of it, with intervals and what each was run with: {BENCHMARKS_PAGE}.",
    ]
    return "\n\n".join(parts)


def with_figures(readme: str, text: str) -> str:
    """The README with its figures replaced. ValueError where its marks are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def charts(found: Found, docs: Path) -> None:
    """A PNG for each part that has one."""
    docs.mkdir(exist_ok=True)
    if found.serve is not None and serving.headlines(found.serve):
        serving.chart(found.serve, docs / "serve.png")
    if found.curves is not None:
        curves.chart(found.curves, docs / "curves.png")
    if found.train is not None:
        train_report.chart(found.train, docs / "train.png")
    if found.methods is not None:
        methods_report.chart(found.methods, docs / "methods.png")
    if found.adapters is not None:
        adapters_report.chart(found.adapters, docs / "adapters.png")


def _standing(title: str, page: str) -> str | None:
    """The section of that title in a page."""
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |^{re.escape(END)}|\Z)", page, re.MULTILINE | re.DOTALL)
    return found and found[0].strip()


def _topic(line: str) -> str:
    """What a line of the README is about, whatever was measured: its first two words."""
    return " ".join(line.split()[:2])


def _training_lines(found: Found) -> Iterator[str]:
    if found.train is not None:
        works = []
        for row in found.train.rows:
            found_ratios = (median_ratio(row.speed(row.ours), row.speed(side)) for side in (EAGER, COMPILED))
            ratios = [f"{ratio.median:.2f} ×" for ratio in found_ratios if ratio is not None]
            works.append(f"{row.work.title} {' and '.join(ratios)}")
        yield f"Tokens per second against PEFT, eager and compiled: {'; '.join(works)}."
    if found.methods is not None:
        full, *lora = found.methods.compared
        best = max(lora, key=lambda one: one.test_accuracy.mean)
        yield (
            f"Accuracy on {found.methods.counts[2]:,} held-out sentences of {found.methods.data}: full "
            f"fine-tuning {full.test_accuracy.text('{:.3f}')}, {best.title} {best.test_accuracy.text('{:.3f}')} "
            f"(95 % over {len(full.outcomes)} seeds)."
        )
    if found.adapters is not None:
        base, blend = (found.adapters.scores[name] for name in (adapters_report.BASE, adapters_report.BLEND))
        own = ", ".join(
            f"{name} {base[name].accuracy:.3f} → {found.adapters.scores[name][name].accuracy:.3f} "
            f"({blend[name].accuracy:.3f})"
            for name in found.adapters.sizes
        )
        yield f"Accuracy of the base → its adapter (a blend of all), ± one to three points: {own}."


if __name__ == "__main__":
    main()
