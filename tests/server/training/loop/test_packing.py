"""Packing against a plain first-fit decreasing, whatever the lengths."""

import time

from hypothesis import example, given
from hypothesis import strategies as st

from server.training.loop.packing import pack


def plain_first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for length, index in sorted(((length, i) for i, length in enumerate(lengths)), key=lambda x: (-x[0], x[1])):
        for members in bins:
            if sum(lengths[i] for i in members) + length <= capacity:
                members.append(index)
                break
        else:
            bins.append([index])
    return bins


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 50))
@example([], 1)
@example([50, 1, 1], 10)
@example([5, 5, 5, 5], 10)
def test_is_first_fit_decreasing(lengths: list[int], capacity: int) -> None:
    bins = pack(lengths, capacity)
    assert bins == plain_first_fit_decreasing(lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(len(members) == 1 or sum(lengths[i] for i in members) <= capacity for members in bins)


def test_by_hand() -> None:
    assert pack([3, 7, 5, 9, 1, 12], 10) == [[5], [3, 4], [1, 0], [2]]


def test_many_rows_take_a_moment() -> None:
    lengths = [1 + i * 7919 % 512 for i in range(50_000)]
    started = time.perf_counter()
    bins = pack(lengths, 512)
    assert time.perf_counter() - started < 5
    assert len(bins) <= 1.02 * sum(lengths) / 512
