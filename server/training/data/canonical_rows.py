"""Many rows in memory, each as its canonical JSON.

As texts they would take up to four times as much: Python keeps a text with one character beyond Unicode's first
65,536 in four bytes a character. Splitting and hashing rows needs no parsing, so it keeps the interpreter from
other threads for a tenth of the time.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from typing import Self, overload

from server.training.data.rows import Row, canonical_json, parse_row


class CanonicalRows(Sequence[Row]):
    """Rows that don't change; each is parsed when it is asked for."""

    def __init__(self, lines: Iterable[bytes] = ()) -> None:
        """`lines` are what `canonical_json` made."""
        self._lines: Sequence[bytes] = list(lines)

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Self:
        """Keep these rows."""
        return cls(map(canonical_json, rows))

    def chosen(self, is_chosen: Iterable[bool]) -> Self:
        """Return those with a true flag, in their order; they share their bytes with these."""
        return type(self)(compress(self._lines, is_chosen))

    def digests(self) -> list[bytes]:
        """Return each row's SHA-256, which is equal for equal rows alone."""
        return [hashlib.sha256(line).digest() for line in self._lines]

    def digest(self) -> str:
        """Return the SHA-256, in hexadecimal, of all lines in their order, each with a line feed."""
        digest = hashlib.sha256()
        for line in self._lines:
            digest.update(line + b"\n")
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "CanonicalRows": ...
    def __getitem__(self, index: int | slice) -> "Row | CanonicalRows":
        if isinstance(index, slice):
            return CanonicalRows(self._lines[index])
        return _parsed(self._lines[index])

    def __iter__(self) -> Iterator[Row]:
        return map(_parsed, self._lines)


def _parsed(line: bytes) -> Row:
    return parse_row(json.loads(line))
