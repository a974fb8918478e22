"""Rows in memory in the bytes of their UTF-8: as texts they take four times as much where a character is rare.

One that isn't in Unicode's first 65,536 has Python keep the whole text in four bytes a character.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from typing import overload

from server.model.text.chat import ChatMessage
from server.training.data.rows import CompletionRow, MessagesRow, Row, TextRow

_Packed = tuple[type[Row], tuple[bytes, ...]]
"""A row's shape, and its texts in their order; those of messages are role and content in turn.

The places of turns that aren't trained on follow, if there are any.
"""


class PackedRows(Sequence[Row]):
    """Rows that don't change; each is made when it is asked for."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows: Sequence[_Packed] = [_pack(row) for row in rows]

    def chosen(self, is_chosen: Iterable[bool]) -> "PackedRows":
        """Those with a true flag, in their order; they share their bytes with these."""
        found = PackedRows()
        found._rows = list(compress(self._rows, is_chosen))
        return found

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [_unpack(row) for row in self._rows[index]]
        return _unpack(self._rows[index])

    def __iter__(self) -> Iterator[Row]:
        return map(_unpack, self._rows)


def _pack(row: Row) -> _Packed:
    if isinstance(row, CompletionRow):
        return CompletionRow, (row.prompt.encode(), row.completion.encode())
    if isinstance(row, TextRow):
        return TextRow, (row.text.encode(),)
    texts = [text for turn in row.messages for text in (turn.role, turn.content)]
    if row.untrained:
        texts.append(" ".join(map(str, sorted(row.untrained))))
    return MessagesRow, tuple(text.encode() for text in texts)


def _unpack(packed: _Packed) -> Row:
    shape, texts = packed[0], [text.decode() for text in packed[1]]
    if shape is CompletionRow:
        return CompletionRow(*texts)
    if shape is TextRow:
        return TextRow(*texts)
    untrained = frozenset(map(int, texts.pop().split())) if len(texts) % 2 else frozenset()
    return MessagesRow(tuple(map(ChatMessage, texts[::2], texts[1::2])), untrained)
