"""An input's bytes as a sequence of choices: the result has the right structure, with lies in it.

After the last byte every choice is the first alternative, so that a short input makes a small result.
"""

import functools
import json
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

NUMBERS: Sequence[object] = (
    *(0, 1, -1, 2, 3, 4, 8, 96, 255, 1 << 16, 1 << 31, (1 << 31) + 1, 1 << 63, (1 << 64) - 1, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1.5, 1e-320, 1e308, float("nan"), float("inf"), True),
)
TEXTS = (
    *("", "a", "base", "q_proj", "a" * 65, "a/b", "a@1", "a*0.5+b", "../a", "\x00", "\n", "é", "\ud800", "￿"),
    *("😀", "'\"", "%", "{}", "[", "(a+)+$", "null", "1", "x" * 5000),
)
NAMES = (
    *("prompt", "messages", "role", "content", "adapter", "model", "name", "version", "weight", "schema", "type"),
    *("text", "completion", "a", "", "q_proj", "$ref", "properties", "items", "pattern", "anyOf", "minLength"),
)
_DEPTH = 4


class Choices:
    """Consumes `data` from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def rest(self) -> bytes:
        """Take all remaining bytes."""
        rest, self._at = self._data[self._at :], len(self._data)
        return rest

    def below(self, number: int) -> int:
        """Choose a number from 0 to `number` - 1, with two bytes if needed."""
        width = 1 if number <= 256 else 2
        taken = self.take(width)
        return int.from_bytes(taken, "little") % number

    def take(self, length: int) -> bytes:
        """Take the next `length` bytes, or fewer at the end."""
        taken = self._data[self._at : self._at + length]
        self._at += length
        return taken

    def some(self) -> bytes:
        """Take as many bytes as the next byte says."""
        return self.take(self.below(256))

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def one_in(self, number: int) -> bool:
        """Return True for one of `number` choices, never after the last byte."""
        return self.below(number) == number - 1

    def text(self) -> str:
        if self.one_in(3):
            return self.some().decode("utf-8", "surrogateescape")
        return self.pick(TEXTS)

    def json(self, depth: int = _DEPTH) -> object:
        """Choose a JSON value, with fewer lists and objects at greater depth."""
        kind = self.below(8 if depth else 5)
        if kind == 0:
            return None
        if kind <= 2:
            return self.pick(NUMBERS)
        if kind <= 4:
            return self.text()
        if kind == 5:
            return [self.json(depth - 1) for _ in range(self.below(5))]
        if kind == 6:
            return {self.name(): self.json(depth - 1) for _ in range(self.below(5))}
        return nested(self.pick((8, 64, 300)))

    def name(self) -> str:
        return self.text() if self.one_in(6) else self.pick(NAMES)


@functools.cache
def nested(levels: int) -> object:
    """Return a list nested `levels` times. Callers must not change it."""
    value: object = []
    for _ in range(levels):
        value = [value]
    return value


def encoded(value: object, choices: Choices) -> bytes:
    """Encode as JSON; some values can't be encoded."""
    try:
        data = json.dumps(value, ensure_ascii=choices.one_in(2)).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):  # an integer with too many digits
        return b"[" * 100_000
    if choices.one_in(24):
        at = choices.below(max(1, len(data)))
        return data[:at] + choices.some() + data[at + choices.below(4) :]
    return data
