"""What is held out, against the rule written out by hand."""

import hashlib
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adapters.errors import InvalidInput
from server.training.rows import (
    CanonicalRows,
    CompletionRow,
    TextRow,
    default_share,
    hold_out,
    nth_smallest,
    overlap,
)

TEXTS = st.lists(st.text("abc", min_size=1, max_size=2), min_size=1, max_size=40)
SHARES = st.floats(0.001, 0.999)


def digest(text: str) -> str:
    document = json.dumps({"text": text}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(document.encode()).hexdigest()


def split(texts: list[str], share: float) -> tuple[list[str], list[str]]:
    train, validation = hold_out(CanonicalRows.of(TextRow(text) for text in texts), share)
    return [row.text for row in train if isinstance(row, TextRow)], [
        row.text for row in validation if isinstance(row, TextRow)
    ]


@contextmanager
def ticking() -> Iterator[list[float]]:
    """A block beside which a thread sleeps for a millisecond again and again: how long each took, in seconds."""
    gaps = [0.0]
    has_ended = threading.Event()

    def run() -> None:
        last = time.perf_counter()
        while not has_ended.wait(0.001):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield gaps
    finally:
        has_ended.set()
        thread.join()


@given(TEXTS, SHARES)
def test_the_smallest_digests_and_their_duplicates_are_held_out(texts: list[str], share: float) -> None:
    smallest = {sorted(texts, key=digest)[i] for i in range(max(1, round(share * len(texts))))}
    assume(smallest != set(texts))
    train, validation = split(texts, share)
    assert validation == [text for text in texts if text in smallest]
    assert train == [text for text in texts if text not in smallest]


@given(TEXTS, SHARES, st.randoms(use_true_random=False))
def test_the_order_does_not_matter(texts: list[str], share: float, dice: random.Random) -> None:
    shuffled = dice.sample(texts, len(texts))
    try:
        train, validation = split(texts, share)
    except InvalidInput:
        with pytest.raises(InvalidInput):
            split(shuffled, share)
        return
    assert [sorted(part) for part in split(shuffled, share)] == [sorted(train), sorted(validation)]
    assert not set(train) & set(validation)


@pytest.mark.parametrize(
    ("num_rows", "share", "expected"), [(200, 0.1, 20), (25, 0.1, 2), (3, 0.01, 1), (20, 0.5, 10)]
)
def test_the_number_of_held_out_rows(num_rows: int, share: float, expected: int) -> None:
    train, validation = split([str(i) for i in range(num_rows)], share)
    assert (len(train), len(validation)) == (num_rows - expected, expected)


def test_no_other_thread_waits_for_a_split() -> None:
    """As many rows as there may be, beside a thread that wants a turn now and then, as the engine's does."""
    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(200_000)]
    started = time.perf_counter()
    expected = sorted(digests)
    whole = time.perf_counter() - started
    for n in (1, 4096, 20_000, 200_000):
        assert nth_smallest(digests, n) == expected[n - 1]
    assert nth_smallest([], 1) == b""
    stalls, end = [whole], started + 30
    while min(stalls) >= whole / 2 and time.perf_counter() < end:  # others use the machine, for seconds at a time
        with ticking() as gaps:
            nth_smallest(digests, 20_000)
        stalls.append(max(gaps))
    assert min(stalls) < whole / 2, (stalls, whole)


def test_by_hand() -> None:
    # printf '{"text":"2"}' | sha256sum is 089f07b3…, of 4 it is 26269c34…, and of no other digit less
    assert split([str(i) for i in range(10)], 0.2)[1] == ["2", "4"]


def test_none() -> None:
    assert split(["a"], 0) == (["a"], [])
    assert split([], 0) == ([], [])


@pytest.mark.parametrize("texts", [[], ["a"], ["a", "a", "a"]])
def test_a_row_must_be_left_to_train_on(texts: list[str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        split(texts, 0.1)
    assert caught.value.errors[0].loc == ("validation",)


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, float("nan"), float("inf")])
def test_an_invalid_share_is_refused(share: float) -> None:
    with pytest.raises(InvalidInput):
        split(["a", "b"], share)


def test_the_default_share() -> None:
    assert [default_share(n) for n in (0, 19, 20, 1000)] == [0, 0, 0.1, 0.1]


def test_overlap_counts_validation_rows() -> None:
    train = CanonicalRows.of([TextRow("a"), TextRow("a"), CompletionRow("a", "b")])
    validation = CanonicalRows.of([TextRow("a"), TextRow("b"), CompletionRow("a", "b"), TextRow("a")])
    assert overlap(train, validation) == 3
    assert overlap(*hold_out(train, 0.3)) == 0
