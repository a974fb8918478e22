"""What the commands of the training benchmarks have in common: their flags, and how they say what they do."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.options import cores, positive
from benchmarks.results import finite

Say = Callable[[str], None]


def parser(program: str, description: str) -> argparse.ArgumentParser:
    """With --model, --home, --out, --threads and --quick."""
    made = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--model", default="smollm2-135m-instruct", help="as SMOLORA_MODEL")
    made.add_argument(
        "--home", type=Path, default=Path("data"), help="whose converted base is used; made there if missing"
    )
    made.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="where the results are written")
    made.add_argument("--threads", type=positive, default=cores(), help="of torch")
    made.add_argument(
        "--quick", action="store_true", help="little of everything: shows that it works, measures nothing"
    )
    return made


def speaker() -> Say:
    """Says lines on the terminal, with the seconds since it was made."""
    started = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {line}", file=sys.stderr, flush=True)

    return say


def write(out: Path, name: str, document: object, report: str) -> None:
    """NAME.json and NAME.md under `out`; the report is printed too."""
    (out / f"{name}.json").write_text(json.dumps(finite(document), indent=2) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(report, encoding="utf-8")
    print(report)
