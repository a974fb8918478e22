"""Users' regular expressions, matched as PEFT matches them, but within bounds.

PEFT's configurations may hold regular expressions, and one of a dozen characters can keep `re` busy for years.
Those that are plain names are matched here. Any other is matched in a short-lived process of its own, which
ends after a few seconds at the latest.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

TIME_LIMIT = 5.0
MAX_PATTERNS = 1024
MAX_PATTERN_LENGTH = 8192

# Names and dots: each of them takes one step a character, so that nothing can go wrong.
_PLAIN = re.compile(r"(?:[A-Za-z0-9_.-]|\\\.)*")

# The same as `_match_here`. 1 GiB of memory and a few seconds of processor time end it even if we don't.
_MATCH_THERE = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
except (ImportError, ValueError, OSError):
    pass
patterns, names = json.load(sys.stdin)
answer = []
for how, text in patterns:
    try:
        match = getattr(re.compile(text), how)
        found = [match(name) for name in names]
        answer.append([m and (m.groupdict().get("idx") or "") for m in found])
    except Exception as error:
        answer.append(str(error) or type(error).__name__)
json.dump(answer, sys.stdout)
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


def find(
    patterns: Sequence[Pattern], names: Sequence[str], time_limit: float = TIME_LIMIT
) -> list[list[str | None]]:
    """For each pattern and name: None where they don't match, else what the group `idx` took ("" without one).

    Raises BadPatternError for the first pattern that doesn't compile, is too long or takes too long.
    """
    for index, pattern in enumerate(patterns):
        if index >= MAX_PATTERNS:
            raise BadPatternError(index, f"there are {len(patterns)} entries, the most is {MAX_PATTERNS}")
        if len(pattern.user_text) > MAX_PATTERN_LENGTH:
            raise BadPatternError(index, f"an entry has at most {MAX_PATTERN_LENGTH} characters")
    if all(_PLAIN.fullmatch(pattern.user_text) for pattern in patterns):
        return [_match_here(pattern, names) for pattern in patterns]
    return _match_there(patterns, names, time_limit)


def _match_here(pattern: Pattern, names: Sequence[str]) -> list[str | None]:
    compiled = re.compile(pattern.text)
    match = compiled.match if pattern.how == "match" else compiled.fullmatch
    return [found and (found.groupdict().get("idx") or "") for found in map(match, names)]


def _match_there(patterns: Sequence[Pattern], names: Sequence[str], time_limit: float) -> list[list[str | None]]:
    question = json.dumps([[(pattern.how, pattern.text) for pattern in patterns], list(names)])
    first = next(i for i, pattern in enumerate(patterns) if not _PLAIN.fullmatch(pattern.user_text))
    try:
        process = subprocess.run(  # noqa: S603 the users' text goes in as data, never as an argument
            [sys.executable, "-I", "-S", "-c", _MATCH_THERE],
            input=question,
            capture_output=True,
            text=True,
            timeout=time_limit,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        message = f"matching this regular expression took more than {time_limit:g} s or too much memory"
        raise BadPatternError(first, message) from None
    table: list[list[str | None]] = []
    for index, row in enumerate(json.loads(process.stdout)):
        if isinstance(row, str):
            raise BadPatternError(index, f"is no regular expression that Python reads: {row}")
        table.append(row)
    return table
