"""Fuzzing targets: code that reads untrusted bytes, with its bounds; and each target's share of the inputs."""

import atexit
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from adapters.errors import InvalidInput

SHARES: Mapping[str, int] = {
    "expressions": 450,
    "row_files": 190,
    "adapter_bytes": 140,
    "adapter_parts": 70,
    "archives": 70,
    "headers": 50,
    "documents": 12,
    "forms": 12,
    "grammars": 6,
}
"""Inputs per thousand by target: faster targets get more."""


@dataclass(frozen=True)
class Target:
    """A target. `run` returns the outcome in a word and raises any exception that no input should cause: a
    finding.

    `seeds` are real samples, made by the code itself, from which inputs are bred.
    """

    run: Callable[[bytes], str]
    seeds: Callable[[], Sequence[bytes]]
    max_len: int = 4096
    words: Sequence[bytes] = ()  # tokens of the format, which are inserted into inputs
    cpu_seconds: float = 1.0  # per input, including ended child processes
    num_before: int = 0  # earlier inputs that may influence an outcome
    memory: int = 64 << 20  # bytes that an input may add to resident memory, besides 8 times its length


OPEN = ExitStack()
"""Resources of targets, closed at the end of the process or of the tests."""
atexit.register(OPEN.close)


def check_refusal(error: InvalidInput, *locs: tuple[str | int, ...]) -> None:
    """Raise AssertionError if a refusal can't be serialized, or isn't about one of these fields, if any are
    given."""
    assert error.errors
    assert not locs or {fault.loc for fault in error.errors} <= set(locs), error.errors
    json.dumps([fault.loc for fault in error.errors], ensure_ascii=False).encode()
    str(error).encode()


def load(name: str) -> Target:
    """Load the target of that name. Raise KeyError if there is none."""
    if name not in SHARES:
        raise KeyError(name)
    target = importlib.import_module(f"tests.stress.fuzzing.targets.{name}").TARGET
    assert isinstance(target, Target)
    return target
