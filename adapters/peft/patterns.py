"""Users' regular expressions, matched as PEFT matches them, but within bounds.

PEFT's configurations may hold regular expressions, and one of a dozen characters can keep `re` busy for years.
Those that are plain names are matched here, as far as they are few, and not at all where every name is shorter.
Any other is matched in a short-lived process
of its own, which the kernel ends once the budget, of processor time, is used up: whatever else the machine does,
a sound expression has the same time.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CPU_SECONDS = 0.5
WALL_SECONDS = 30.0  # of a machine on which that takes so long
MAX_PATTERNS = 1024
MAX_PATTERN_LENGTH = 8192
MAX_MATCHED_HERE = 16_384  # characters, of all that fit of a call: PEFT's own take half of it in a large base

# Names and dots: each of them takes one step a character, so that nothing can go wrong.
_PLAIN = re.compile(r"(?:[A-Za-z0-9_.-]|\\\.)*")

# The same as `_match_here`, a line for each pattern, and at last the processor time. SIGPROF ends it in the middle
# of a match; and so do 1 GiB of memory, and another limit of time.
_MATCH_THERE = """
import json, re, resource, signal, sys, time
question = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_PROF, question["seconds"])
for limit, value in ((resource.RLIMIT_AS, 1 << 30), (resource.RLIMIT_CPU, 2)):
    try:
        resource.setrlimit(limit, (value, value))
    except (ValueError, OSError):  # a lower one holds already
        pass
for how, text in question["patterns"]:
    try:
        match = getattr(re.compile(text), how)
        found = [match(name) for name in question["names"]]
        row = [m and (m.groupdict().get("idx") or "") for m in found]
    except MemoryError:
        break
    except Exception as error:
        row = str(error) or type(error).__name__
    print(json.dumps(row), flush=True)
else:
    print(time.process_time(), flush=True)
"""


class BadPatternError(ValueError):
    """A pattern that can't be used; `index` is its place among those given."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


@dataclass(frozen=True)
class Pattern:
    """A regular expression, and which method of `re.Pattern` takes it to a name."""

    text: str
    how: Literal["match", "fullmatch"]
    user_text: str  # the part of `text` that isn't ours


@dataclass
class Budget:
    """The processor time, in seconds, that is left for all patterns of one configuration."""

    seconds: float = CPU_SECONDS


def find(patterns: Sequence[Pattern], names: Sequence[str], budget: Budget) -> list[list[str | None]]:
    """For each pattern and name: None where they don't match, else what the group `idx` took ("" without one).

    Raises BadPatternError for the first pattern that doesn't compile, is too long, or for which the time is up.
    """
    for index, pattern in enumerate(patterns):
        if index >= MAX_PATTERNS:
            raise BadPatternError(index, f"there are {len(patterns)} entries, the most is {MAX_PATTERNS}")
        if len(pattern.user_text) > MAX_PATTERN_LENGTH:
            raise BadPatternError(index, f"an entry has at most {MAX_PATTERN_LENGTH} characters")
    longest = max(map(len, names), default=0)
    fitting = [index for index, pattern in enumerate(patterns) if _min_length(pattern) <= longest]
    table: list[list[str | None]] = [[None] * len(names) for _ in patterns]
    try:
        rows = _match([patterns[index] for index in fitting], names, budget)
    except BadPatternError as error:
        raise BadPatternError(fitting[error.index], str(error)) from None
    for index, row in zip(fitting, rows, strict=True):
        table[index] = row
    return table


def _min_length(pattern: Pattern) -> int:
    """How many characters a name needs for a match, as far as that shows at once."""
    text = pattern.user_text
    return len(text) - text.count("\\") if _PLAIN.fullmatch(text) else 0


def _match(patterns: Sequence[Pattern], names: Sequence[str], budget: Budget) -> list[list[str | None]]:
    is_short = sum(len(pattern.user_text) for pattern in patterns) <= MAX_MATCHED_HERE
    if not is_short or not all(_PLAIN.fullmatch(pattern.user_text) for pattern in patterns):
        return _match_there(patterns, names, budget)
    started = time.thread_time()
    table = [_match_here(pattern, names) for pattern in patterns]
    budget.seconds -= time.thread_time() - started
    return table


def _match_here(pattern: Pattern, names: Sequence[str]) -> list[str | None]:
    compiled = re.compile(pattern.text)
    match = compiled.match if pattern.how == "match" else compiled.fullmatch
    return [found and (found.groupdict().get("idx") or "") for found in map(match, names)]


def _match_there(patterns: Sequence[Pattern], names: Sequence[str], budget: Budget) -> list[list[str | None]]:
    question = {
        "seconds": max(budget.seconds, 0.001),
        "patterns": [(pattern.how, pattern.text) for pattern in patterns],
        "names": list(names),
    }
    try:
        process = subprocess.run(  # noqa: S603 the users' text goes in as data, never as an argument
            [sys.executable, "-I", "-S", "-c", _MATCH_THERE],
            input=json.dumps(question).encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
            check=False,
            env={},  # what this process knows of databases and buckets is no business of an expression's
        )
        output = process.stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
    *lines, _ = output.split(b"\n")  # what is behind the last line end was cut off
    table: list[list[str | None]] = []
    for index, row in enumerate(map(json.loads, lines[: len(patterns)])):
        if isinstance(row, str):
            raise BadPatternError(index, f"is no regular expression that Python reads: {row}")
        table.append(row)
    if len(lines) <= len(patterns):
        message = f"takes too much: all expressions together have {CPU_SECONDS:g} s of a processor, and 1 GiB"
        raise BadPatternError(min(len(table), len(patterns) - 1), message)
    budget.seconds -= float(lines[-1])
    return table
