"""Runs of neighbouring rows in a pool of fixed size: first fit, and neighbours join when released."""

from bisect import bisect_left
from collections.abc import Iterable


class Extents:
    """Hands out runs [start, start + length) of 0 … capacity - 1."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_free = capacity
        self._free: list[tuple[int, int]] = [(0, capacity)] if capacity else []  # (start, length), in order

    def allocate(self, length: int) -> int | None:
        """The start of a new run, or None where no gap is long enough. `length` is at least 1."""
        assert length > 0
        for i, (start, gap) in enumerate(self._free):
            if gap >= length:
                if gap == length:
                    del self._free[i]
                else:
                    self._free[i] = (start + length, gap - length)
                self.num_free -= length
                return start
        return None

    def release(self, start: int, length: int) -> None:
        """Take a run back, exactly as it was handed out."""
        i = bisect_left(self._free, (start, 0))
        if i < len(self._free):
            assert start + length <= self._free[i][0], "released twice"
        if i < len(self._free) and start + length == self._free[i][0]:
            length += self._free.pop(i)[1]
        if i and sum(self._free[i - 1]) >= start:
            assert sum(self._free[i - 1]) == start, "released twice"
            i -= 1
            before, gap = self._free.pop(i)
            start, length = before, gap + length
        self._free.insert(i, (start, length))
        self.num_free = sum(gap for _, gap in self._free)

    def reset(self, taken: Iterable[tuple[int, int]]) -> None:
        """Have just these runs (start, length) be taken; they are in order and don't overlap."""
        self._free, end = [], 0
        for start, length in (*taken, (self.capacity, 0)):
            if start > end:
                self._free.append((end, start - end))
            end = start + length
        self.num_free = sum(gap for _, gap in self._free)
