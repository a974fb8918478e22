"""Tokenized rows are the same after a round trip through memory and disk."""

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from server.training.encoding import Example, Examples


@st.composite
def examples(draw: st.DrawFn) -> Example:
    token_ids = draw(st.lists(st.integers(0, 2**31 - 1), max_size=8))
    flags = draw(st.lists(st.booleans(), min_size=len(token_ids), max_size=len(token_ids)))
    return Example(tuple(token_ids), tuple([False, *flags[1:]][: len(token_ids)]))


@given(st.lists(examples(), max_size=6))
def test_examples_round_trip(tmp_path_factory: pytest.TempPathFactory, given_examples: list[Example]) -> None:
    path = tmp_path_factory.mktemp("examples") / "train.safetensors"
    Examples(given_examples).save(path)
    for held in (Examples(given_examples), Examples.load(path)):
        assert list(held) == given_examples
        assert held[:] == given_examples
        assert [held[i] for i in range(-len(held), 0)] == given_examples
        assert held.lengths == [len(example.token_ids) for example in given_examples]
        assert held.num_tokens == sum(held.lengths)
        assert held.num_targets == sum(sum(example.is_target) for example in given_examples)
    again = path.with_name("again")
    Examples.load(path).save(again)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(path.parent.iterdir()) == [again, path]


def test_the_files_format(tmp_path: Path) -> None:
    Examples([Example((7, 8, 9), (False, True, True)), Example((5,), (False,))]).save(tmp_path / "a")
    tensors = load_file(tmp_path / "a")
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()} == {
        "token_ids": (np.dtype("int32"), [7, 8, 9, 5]),
        "is_target": (np.dtype("uint8"), [0, 1, 1, 0]),
        "offsets": (np.dtype("int64"), [0, 3, 4]),
        "sources": (np.dtype("int64"), [0, 1]),
    }


def test_a_file_of_an_older_release(tmp_path: Path) -> None:
    """It doesn't say which row an example is of: each counts as one."""
    held = Examples([Example((7, 8), (False, True)), Example((5, 6), (False, True))])
    held.save(tmp_path / "a")
    tensors = load_file(tmp_path / "a")
    del tensors["sources"]
    save_file(tensors, tmp_path / "b")
    assert Examples.load(tmp_path / "b").row_keys() == held.row_keys()
    assert len(set(held.row_keys())) == 2


def test_counting_does_not_hold_the_gil() -> None:
    """The rows of the largest job would take 1.5 s one by one, without a turn for other threads."""
    example = Example((7,) * 4096, (False, *(True,) * 4095))
    held = Examples([example] * 2048)
    started = time.thread_time()
    assert held.num_targets == 2048 * 4095
    assert time.thread_time() - started < held.num_tokens * 8e-9


def test_an_index_beyond_the_end_raises() -> None:
    held = Examples([Example((1,), (False,))])
    for index in (1, -2):
        with pytest.raises(IndexError):
            held[index]


def test_a_first_token_is_no_target() -> None:
    with pytest.raises(AssertionError):
        Example((1, 2), (True, True))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    Examples([Example((1,), (False,))]).save(path)
    with pytest.raises(OverflowError):
        Examples([Example((1 << 40,), (False,))]).save(path)
    assert Examples.load(path)[0].token_ids == (1,)
    assert list(tmp_path.iterdir()) == [path]
