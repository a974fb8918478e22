"""A target: code that takes strangers' bytes, and what it may do with them. Which there are, and their shares."""

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
"""Of a thousand inputs, by target: the quicker one takes them, the more it gets."""


@dataclass(frozen=True)
class Target:
    """`run` says in a word what became of the input, and raises what is no answer to any: a finding.

    `seeds` are real samples, made by the code itself, from which inputs are bred.
    """

    run: Callable[[bytes], str]
    seeds: Callable[[], Sequence[bytes]]
    max_len: int = 4096
    words: Sequence[bytes] = ()  # what the format is made of: inputs get them put in
    cpu_seconds: float = 1.0  # of one input: this process's processor time and that of its ended children
    num_before: int = 0  # inputs before one that what becomes of it may hang on
    memory: int = 64 << 20  # bytes that an input may add to the resident memory, beside 8 times its length


OPEN = ExitStack()
"""What targets have opened, to be closed at the end: of the process, or of the tests."""
atexit.register(OPEN.close)


def check_told(error: InvalidInput, *locs: tuple[str | int, ...]) -> None:
    """AssertionError where a refusal can't be sent; or where it isn't of these, if any are named."""
    assert error.errors
    assert not locs or {fault.loc for fault in error.errors} <= set(locs), error.errors
    json.dumps([fault.loc for fault in error.errors], ensure_ascii=False).encode()
    str(error).encode()


def load(name: str) -> Target:
    """The target of that name. KeyError if there is none."""
    if name not in SHARES:
        raise KeyError(name)
    target = importlib.import_module(f"tests.stress.fuzzing.targets.{name}").TARGET
    assert isinstance(target, Target)
    return target
