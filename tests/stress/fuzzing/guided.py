"""Coverage-guided inputs by atheris: libFuzzer's mutations, guided by the coverage of our Python, in a process per
target.

A process that dies of a native crash or of an endless input is a finding: libFuzzer saves the input, and a new
process continues.
"""

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tests.stress.fuzzing.bounds import Meter
from tests.stress.fuzzing.findings import Book, Finding, Tally
from tests.stress.fuzzing.target import OPEN, Target, load

INSTRUMENTED = ("adapters", "server", "python_multipart", "starlette", "uvicorn", "zipfile")
_MAX_DEATHS = 5
_TIMEOUT = 120  # seconds after which an input counts as endless, however busy the machine is
_MAX_RESIDENT = 4096  # MiB
_EDGES = re.compile(rb"\bcov: (\d+)")


class MissingError(Exception):
    """atheris isn't installed."""


@dataclass(frozen=True)
class Result:
    """The result for a target."""

    name: str
    tally: Tally
    edges: int


def targets(names: Sequence[str]) -> dict[str, Target]:
    """Load the targets with the code under test, to measure its coverage. Raise MissingError."""
    try:
        import atheris
    except ImportError:
        raise MissingError(
            "atheris is not installed: it has wheels for Linux on x86-64, Python 3.11 to 3.13"
        ) from None
    with _quiet(), atheris.instrument_imports(include=list(INSTRUMENTED)):
        return {name: load(name) for name in names}


def run(name: str, target: Target, num_inputs: int | None, seconds: float | None) -> Result:
    """Run this many inputs, or for this many seconds."""
    total = Tally()
    book = Book(name)
    edges = 0
    for _ in range(_MAX_DEATHS):
        book.path.unlink(missing_ok=True)
        left = None if num_inputs is None else num_inputs - total.inputs
        before = set(book.findings.iterdir())
        child = os.fork()
        if not child:
            _fuzz(name, target, left, None if seconds is None else seconds - total.seconds)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = _EDGES.findall((book.folder / "log").read_bytes())
        edges = max([edges, *map(int, found)])
        if book.path.exists():
            total.merge(Tally.read(book.path))
        if status == 0:
            break
        _note_death(total, book, status, set(book.findings.iterdir()) - before)
        is_late = seconds is not None and total.seconds >= seconds
        if is_late or (num_inputs is not None and total.inputs >= num_inputs):
            break
    return Result(name, total, edges)


def _note_death(total: Tally, book: Book, status: int, saved: set[Path]) -> None:
    files = [path for path in saved if re.search(r"-(crash|timeout|oom)-", path.name)]
    log = (book.folder / "log").read_text(errors="replace")
    where = f"the process ended with {status}"
    file = str(files[0]) if files else f"{book.folder}/log"
    known = total.findings.setdefault(where, Finding(where, file, log[-4000:], 0))
    known.count += 1


def _fuzz(name: str, target: Target, num_inputs: int | None, seconds: float | None) -> NoReturn:
    """Run the process of one target. The exit code is 0 unless it crashed."""
    import atheris

    book = Book(name, target.num_before)
    try:
        corpus, seeds = book.folder / "corpus", book.folder / "seeds"
        for folder in (corpus, seeds):
            folder.mkdir(exist_ok=True)
        for path in seeds.iterdir():
            path.unlink()
        meter = Meter(target)
        for number, seed in enumerate(target.seeds()):
            (seeds / f"{number}").write_bytes(seed)
        log = os.open(book.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 2)
        options = [
            f"-max_len={target.max_len}",
            f"-artifact_prefix={book.findings}/{name}-",
            f"-timeout={_TIMEOUT}",
            f"-rss_limit_mb={_MAX_RESIDENT}",
            "-len_control=30",
            "-print_final_stats=1",
        ]
        if target.words:
            (book.folder / "words").write_text("".join(f'"{_quoted(word)}"\n' for word in target.words))
            options.append(f"-dict={book.folder}/words")
        if num_inputs is not None:
            options.append(f"-atheris_runs={num_inputs}")
        one = one_of(meter, book)
        if seconds is not None:
            one = _until(time.monotonic() + seconds, one, book)
        atheris.Setup([name, *options, str(corpus), str(seeds)], one)
        atheris.Fuzz()
    except SystemExit as error:  # libFuzzer's exit; its alarm would go off later and kill the process
        signal.setitimer(signal.ITIMER_REAL, 0)
        if not error.code:
            book.keep()
            raise
    except BaseException:
        traceback.print_exc()
    os._exit(70)


def one_of(meter: Meter, book: Book) -> Callable[[bytes], None]:
    """Return the function that is called with each input and records it."""

    def one(data: bytes) -> None:
        try:
            outcome, cost = meter.run(data)
        except Exception as error:
            if book.failed(data, error):
                traceback.print_exc()
        else:
            book.took(data, outcome, cost)

    return one


def _until(deadline: float, one: Callable[[bytes], None], book: Book) -> Callable[[bytes], None]:
    """Wrap `call` to end the process after the deadline: libFuzzer's own exit skips Python's cleanup."""

    def one_in_time(data: bytes) -> None:
        one(data)
        if time.monotonic() > deadline:
            book.keep()
            OPEN.close()
            os._exit(0)

    return one_in_time


def _quoted(word: bytes) -> str:
    """Quote bytes as in libFuzzer's dictionaries."""
    return "".join(chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\x{byte:02x}" for byte in word)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence atheris's list of instrumented modules."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
