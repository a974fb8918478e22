"""Write docs/benchmarks.md, its charts, and the README's figures: `python -m benchmarks.report`.

The results come from --out, and are copied to --results, which is under version control. A part that was not
measured again stays as it is in the pages. A part that was never measured is named as missing. A quick run is
refused.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol, TypeVar

if not __package__:  # run by its path: Python put this folder first, not the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import command
from benchmarks.command import Made
from benchmarks.instruction_sets import report as instruction_sets
from benchmarks.scaling import report as scaling
from benchmarks.scaling.results import Results as Scaling
from benchmarks.science import report as science
from benchmarks.serving import report as serving
from benchmarks.serving.results import Results as Serving
from benchmarks.serving.targets import evaluate as serving_targets
from benchmarks.shapes import report as shapes
from benchmarks.training import train_and_serve_report, train_report

BENCHMARKS_PAGE = "[docs/benchmarks.md](docs/benchmarks.md)"
BEGIN, END = "<!-- figures: made by python -m benchmarks.report -->", "<!-- /figures -->"
INTRODUCTION = """# Benchmarks

`python -m benchmarks.report` writes this page from the results of the commands below. Don't edit it by hand.

To measure again, on an idle machine: run `python -m benchmarks.peers make llama.cpp openvino` once, then
`python -m benchmarks.serve`, `.scaling`, `.shapes`, `.instruction_sets` (it needs `llama.cpp-avx2` and
`llama.cpp-avx512`), `.train` and `.train_and_serve`, then this command. [science.md](science.md) compares LoRA
with full fine-tuning.

- Cells have the median (lowest–highest) of the rounds. Ratios are medians of the rounds' own ratios.
- All systems of a table ran in turn, on the same weights, rows and threads. Peers get every setting that we get,
  or the faster one of those tried.
- Bold misses its target.
- Raw results, with versions, settings and what this page leaves out, are in `benchmarks/results/`.
- ik_llama.cpp isn't compared, as no package has it. In manual tests it was faster than llama.cpp for one stream
  of quantized weights, and slower for many streams.
"""


T = TypeVar("T")


class _HasMade(Protocol):
    @property
    def made(self) -> Made: ...


@dataclass(frozen=True)
class Found:
    """All results, by benchmark."""

    serve: Serving | None
    scaling: Scaling | None
    shapes: shapes.Results | None
    instruction_sets: instruction_sets.Results | None
    train: train_report.Results | None
    train_and_serve: train_and_serve_report.Results | None

    @classmethod
    def read(cls, out: Path) -> "Found":
        """Read the results. Raise SystemExit if one is from a quick run."""
        found = cls(
            command.read(out, "serve", Serving),
            command.read(out, "scaling", Scaling),
            command.read(out, "shapes", shapes.Results),
            command.read(out, "instruction_sets", instruction_sets.Results),
            command.read(out, "train", train_report.Results),
            command.read(out, "train_and_serve", train_and_serve_report.Results),
        )
        every: tuple[_HasMade | None, ...] = (
            found.serve,
            found.scaling,
            found.shapes,
            found.instruction_sets,
            found.train,
            found.train_and_serve,
        )
        if quick := [one.made.command for one in every if one is not None and one.made.quick]:
            raise SystemExit(f"a quick run measures nothing and can't be published: {', '.join(quick)}")
        return found


def main(arguments: list[str] | None = None) -> None:
    """Write the page, the charts, the README's figures and the raw results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Write docs/benchmarks.md.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="where the results are")
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results"), help="where the results are copied"
    )
    parser.add_argument(
        "--docs", type=Path, default=Path("docs"), help="where benchmarks.md and the charts are written"
    )
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="page whose figures are replaced")
    options = parser.parse_args(arguments)
    found = Found.read(options.out)
    to = options.docs / "benchmarks.md"
    text = page(found, to.read_text(encoding="utf-8") if to.exists() else "")
    readme = options.readme.read_text(encoding="utf-8")
    readme = with_figures(readme, figures(found, science.summary(options.results / "science"), readme))
    charts(found, options.docs)
    to.write_text(text, encoding="utf-8")
    options.readme.write_text(readme, encoding="utf-8")
    options.results.mkdir(exist_ok=True)
    for name in (field.name for field in fields(found) if getattr(found, field.name) is not None):
        shutil.copy(options.out / f"{name}.json", options.results)
    print(f"wrote {to}, its charts and the figures of {options.readme}")


def page(found: Found, before: str) -> str:
    """Return the text of docs/benchmarks.md. Parts without results are kept from the text `before`."""
    parts = [INTRODUCTION.strip()]

    def add(title: str, name: str, results: T | None, render: Callable[[T], str], chart: str | None) -> None:
        if results is None:
            missing = f"## {title}\n\nNot measured yet: `python -m benchmarks.{name}`."
            parts.append(_section(title, before) or missing)
            return
        parts.extend([f"## {title}", render(results).strip(), *([f"![{chart}]({name}.png)"] if chart else [])])

    serve = found.serve and _headlines(found.serve)
    add("Serving", "serve", serve, serving.markdown, "Output tokens per second by load")
    add(
        "Scaling curves",
        "scaling",
        found.scaling,
        scaling.markdown,
        "Speed, latency and memory as one variable grows",
    )
    add("Larger bases", "shapes", found.shapes, shapes.markdown, None)
    add("Restricted instruction sets", "instruction_sets", found.instruction_sets, instruction_sets.markdown, None)
    add("Training", "train", found.train, train_report.markdown, "Tokens per second and memory")
    add("Training while serving", "train_and_serve", found.train_and_serve, train_and_serve_report.markdown, None)
    return "\n\n".join(parts) + "\n"


def figures(found: Found, comparison: str | None, before: str) -> str:
    """Return the README's figures: a table of speeds, and the comparison of LoRA with full fine-tuning.

    Parts without results are kept from the text `before`.
    """
    parts = []
    if (serve := found.serve) is None:
        parts += [_section("How fast", before) or "## How fast"]
    else:
        targets = [target for target in serving_targets(serve) if target.reached is not None]
        reached = sum(bool(target.reached) for target in targets)
        headlines = _headlines(serve)
        over = [facts.name for facts in headlines.systems if facts.over_http]
        settings = serve.settings
        parts += [
            "## How fast",
            f"Output tokens per second on {serve.machine.threads} threads of an {serve.machine.processor}, no "
            f"GPU; {settings.model} in {settings.dtype}, prompts of {settings.prompt_tokens} tokens, "
            f"{settings.max_tokens} new tokens, adapters of rank 16 on all seven linear modules; median "
            f"(lowest–highest) of {settings.rounds} rounds in turn. Over HTTP, with the client on the same cores: "
            f"{', '.join(over)}. The others run in process.",
            serving.speed_table(headlines),
            f"{reached} of our {len(targets)} targets are reached: {BENCHMARKS_PAGE} has all of them.",
        ]
    title = "LoRA against full fine-tuning"
    parts.append(f"## {title}\n\n{comparison}" if comparison else _section(title, before) or f"## {title}")
    return "\n\n".join(parts)


def with_figures(readme: str, text: str) -> str:
    """Return the README with its figures replaced. Raise ValueError if its marks are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def charts(found: Found, docs: Path) -> None:
    """Draw a PNG for each part that has one."""
    docs.mkdir(exist_ok=True)
    if found.serve is not None and serving.headlines(found.serve):
        serving.chart(found.serve, docs / "serve.png")
    if found.scaling is not None:
        scaling.chart(found.scaling, docs / "scaling.png")
    if found.train is not None:
        train_report.chart(found.train, docs / "train.png")


def _headlines(serve: Serving) -> Serving:
    """Keep the loads with one stream and with the most, and the systems that take all of them."""
    systems = [facts for facts in serve.systems if facts.max_streams is None]
    return replace(serve, rows=serving.headlines(serve), systems=systems)


def _section(title: str, page: str) -> str | None:
    """Return the section of that title in a page, or None."""
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |^{re.escape(END)}|\Z)", page, re.MULTILINE | re.DOTALL)
    return found and found[0].strip()


if __name__ == "__main__":
    main()
