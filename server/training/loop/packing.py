"""Which rows share a micro-batch: bins of bounded size, filled by first-fit decreasing.

Deterministic: it depends on the lengths alone. First-fit decreasing takes at most 11/9 of the fewest bins, plus
6/9 (Dósa 2007).
"""

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths`, whose lengths add up to `capacity` at most; a longer one has its own bin.

    Longest first, equals in their order, each into the first bin with room: O(n log n). Lengths and the capacity
    are at least 1.
    """
    assert capacity >= 1, "a bin must hold something"
    assert min(lengths, default=1) >= 1, "every row has a token"
    bins: list[list[int]] = []
    room = _Room(len(lengths), capacity)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        needed = min(lengths[index], capacity)
        place = room.take_first(needed)
        if place == len(bins):
            bins.append([])
        bins[place].append(index)
    return bins


class _Room:
    """What is left in each of `num_bins` bins: a tree of maxima, where the first with enough is found quickly."""

    def __init__(self, num_bins: int, capacity: int) -> None:
        self._first_leaf = 1 << max(0, num_bins - 1).bit_length()
        self._most = [capacity] * (2 * self._first_leaf)  # of node i, whose children are 2i and 2i + 1

    def take_first(self, needed: int) -> int:
        """Take `needed` from the first bin that has it; returns which. Some bin must have it."""
        node = 1
        while node < self._first_leaf:
            node = 2 * node + (self._most[2 * node] < needed)
        assert self._most[node] >= needed, "as many bins as rows, and a row fits an empty bin"
        self._most[node] -= needed
        found = node - self._first_leaf
        while node > 1:
            node //= 2
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])
        return found
