"""Helpers of all benchmark commands: flags, progress lines and result files."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from server.system.cgroups import usable_processors

Say = Callable[[str], None]
T = TypeVar("T")

QUICK = "**A quick run, reduced: its figures can't be compared with anything.**"


@dataclass(frozen=True)
class Made:
    """How a result was produced."""

    command: str
    day: str  # date of the end of the run
    quick: bool

    @property
    def program(self) -> str:
        """The command without its arguments."""
        return " ".join(self.command.split()[:3])

    @classmethod
    def by(cls, program: str, arguments: list[str] | None, *, quick: bool) -> "Made":
        given = sys.argv[1:] if arguments is None else arguments
        return cls(" ".join(["python -m", program, *given]), time.strftime("%Y-%m-%d"), quick)


def parser(program: str, description: str, *, has_base: bool = True) -> argparse.ArgumentParser:
    """Return a parser with --out, --threads and --quick, and with --model and --home if `has_base`."""
    made = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    if has_base:
        made.add_argument("--model", default="smollm2-135m-instruct", help="as SMOLORA_MODEL")
        made.add_argument(
            "--home", type=Path, default=Path("data"), help="its converted base is used, converted if missing"
        )
    made.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="where the results are written")
    made.add_argument("--threads", type=positive, default=cores(), help="threads of our server and of every peer")
    made.add_argument("--quick", action="store_true", help="a reduced run that only shows that everything works")
    return made


def speaker() -> Say:
    """Return a function that prints progress lines, with the seconds since the start, to standard error."""
    started = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {line}", file=sys.stderr, flush=True)

    return say


def write(out: Path, name: str, results: object) -> None:
    """Write `results` to NAME.json under `out` atomically. A figure that isn't finite becomes null."""
    document = finite(TypeAdapter(type(results)).dump_python(results, mode="python"))
    unfinished = out / f".{name}.json"
    unfinished.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
    unfinished.replace(out / f"{name}.json")


def read(out: Path, name: str, kind: type[T]) -> T | None:
    """Return what `write` wrote, or None if there is no file. Raise ValidationError if its shape differs."""
    try:
        text = (out / f"{name}.json").read_bytes()
    except FileNotFoundError:
        return None
    return TypeAdapter(kind).validate_json(text)


def finite(value: object) -> object:
    """Return the value as JSON can hold it: NaN and infinities become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def positive(text: str) -> int:
    """Parse a number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def cores() -> int:
    """Return how many cores this process may use."""
    return usable_processors()
