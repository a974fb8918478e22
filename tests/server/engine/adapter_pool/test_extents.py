"""The allocator of rows against a set of free indices."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.adapter_pool import Extents


def first_fit(free: set[int], capacity: int, length: int) -> int | None:
    return next((s for s in range(capacity - length + 1) if free.issuperset(range(s, s + length))), None)


@settings(deadline=None)
@given(st.integers(0, 40), st.lists(st.integers(1, 12) | st.floats(0, 1, exclude_max=True), max_size=60))
def test_first_fit_and_joining(capacity: int, actions: list[int | float]) -> None:
    """An int allocates this many rows; a float releases the run at this share of the held runs."""
    extents, free, allocated = Extents(capacity), set(range(capacity)), list[tuple[int, int]]()
    for action in actions:
        if isinstance(action, int):
            start = extents.allocate(action)
            assert start == first_fit(free, capacity, action)
            if start is not None:
                allocated.append((start, action))
                free -= set(range(start, start + action))
        elif allocated:
            start, length = allocated.pop(int(action * len(allocated)))
            extents.release(start, length)
            free |= set(range(start, start + length))
        assert extents.num_free == len(free)
    for start, length in allocated:
        extents.release(start, length)
    assert extents.num_free == capacity
    assert not capacity or extents.allocate(capacity) == 0


def test_an_empty_pool_has_nothing() -> None:
    assert Extents(0).allocate(1) is None


@pytest.mark.parametrize(("start", "length"), [(0, 4), (4, 4), (2, 3), (3, 1), (5, 2), (0, 10)])
def test_a_free_run_cannot_be_released(start: int, length: int) -> None:
    extents = Extents(10)
    assert extents.allocate(10) == 0
    extents.release(0, 4)
    extents.release(4, 4)
    with pytest.raises(AssertionError, match="released twice"):
        extents.release(start, length)


@given(st.integers(0, 40), st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6))))
def test_reset_allocates_exactly_the_given_runs(capacity: int, gaps_and_lengths: list[tuple[int, int]]) -> None:
    taken: list[tuple[int, int]] = []
    end = 0
    for gap, length in gaps_and_lengths:
        if end + gap + length <= capacity:
            taken.append((end + gap, length))
            end += gap + length
    extents = Extents(capacity)
    extents.reset(taken)
    assert extents.num_free == capacity - sum(length for _, length in taken)
    free = set(range(capacity)) - {i for start, length in taken for i in range(start, start + length)}
    for start, length in taken:
        extents.release(start, length)
        free |= set(range(start, start + length))
    assert extents.num_free == capacity
    assert not capacity or extents.allocate(capacity) == 0
