"""Packing compared with a plain first-fit decreasing for any lengths, and the packing of a step."""

import time
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from server.training.passes import MicroBatch
from server.training.spec import TrainingSpec
from server.training.trainer import Trainer, pack
from tests.server.training.data.rows_kit import make_examples


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


class Sized:
    """A trainable that learns nothing, and records the lengths of each micro-batch's rows."""

    undecayed: Sequence[slice] = ()
    has_own_threads = False

    def __init__(self) -> None:
        self.masters = torch.zeros(1)
        self.gradients = torch.zeros(1)
        self.max_tokens = 512
        self.micro_batches: list[list[int]] = []

    def refresh(self) -> None: ...
    def end_step(self) -> None: ...
    def begin_micro_batch(self, seed: int, step: int, rows: Sequence[int], lengths: Sequence[int]) -> None:
        self.micro_batches.append(list(lengths))

    def accumulate(self, batch: MicroBatch, factor: float) -> float:
        return 1.0


@pytest.mark.parametrize("max_length", [64, 512, 8192])
def test_micro_batches_do_not_depend_on_max_length(max_length: int) -> None:
    """Between micro-batches it lets requests go first, or leaves; and each micro-batch takes memory for all of its
    tokens."""
    sized, lengths = Sized(), [30] * 100
    Trainer(sized, make_examples(lengths), TrainingSpec(batch_size=len(lengths), max_length=max_length)).run_step()
    most = sized.max_tokens
    assert [sum(batch) for batch in sized.micro_batches] == [most // 30 * 30] * 5 + [450]


def test_a_longer_row_has_its_own_micro_batch() -> None:
    sized, lengths = Sized(), [700, 30, 30, 513, 400]
    Trainer(sized, make_examples(lengths), TrainingSpec(batch_size=len(lengths), max_length=2048)).run_step()
    assert sized.micro_batches == [[700], [513], [400, 30, 30]]
