"""What is held out, against the rule written out by hand."""

import hashlib
import json
import math
import random
from fractions import Fraction

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
    overlap,
    set_aside,
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


@given(TEXTS, SHARES)
def test_hashes_below_the_share_are_held_out(texts: list[str], share: float) -> None:
    held_out = {text for text in texts if Fraction(int(digest(text), 16), 2**256) < Fraction(share)}
    assume(len(set(texts)) > 1)
    held_out -= {max(texts, key=digest)}
    held_out |= {min(texts, key=digest)}
    train, validation = split(texts, share)
    assert validation == [text for text in texts if text in held_out]
    assert train == [text for text in texts if text not in held_out]


@given(TEXTS, TEXTS, SHARES)
def test_added_rows_move_no_row_to_the_other_side(texts: list[str], added: list[str], share: float) -> None:
    """Rows that one version was trained on must not measure the next one, whose data set has grown."""
    below = {text for text in texts if Fraction(int(digest(text), 16), 2**256) < Fraction(share)}
    assume(below and below != set(texts))  # otherwise the smallest or the largest hash decides
    try:
        train, validation = split(texts, share)
    except InvalidInput:
        return  # all rows are equal
    grown_train, grown_validation = split([*texts, *added], share)
    assert set(train) <= set(grown_train)
    assert set(validation) <= set(grown_validation)


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


def test_about_the_share_is_held_out() -> None:
    for num_rows, share in ((10_000, 0.1), (10_000, 0.5)):
        _, validation = split([str(i) for i in range(num_rows)], share)
        deviation = math.sqrt(num_rows * share * (1 - share))
        assert abs(len(validation) - num_rows * share) < 4 * deviation


def test_at_least_one_row_is_held_out() -> None:
    texts = [str(i) for i in range(10)]
    assert split(texts, 1e-9)[1] == split(texts, 5e-324)[1] == [min(texts, key=digest)]


def test_by_hand() -> None:
    # printf '{"text":"2"}' | sha256sum is 089f07b3…, of 4 it is 26269c34…, and of no other digit less
    texts = [str(i) for i in range(10)]
    assert 0x26269C34 / 2**32 < 0.15
    assert split(texts, 0.15)[1] == ["2", "4"]
    assert split(texts, 0.14)[1] == ["2"]


@given(st.lists(st.text("abcdefg", min_size=1), min_size=16, max_size=40), *[st.floats(0.01, 0.45)] * 2)
def test_test_rows_have_the_highest_hashes(texts: list[str], share: float, validation: float) -> None:
    """They are none of the rows that are held out for validation, which have the lowest."""
    assume(len(set(texts)) > 3)
    high = {text for text in texts if Fraction(int(digest(text), 16), 2**256) >= Fraction(1 - share)}
    high |= {max(texts, key=digest)}
    assume(len(set(texts) - high) > 1)
    others, test = set_aside(CanonicalRows.of(TextRow(text) for text in texts), share, validation)
    assert [row.text for row in test if isinstance(row, TextRow)] == [text for text in texts if text in high]
    left = [row.text for row in others if isinstance(row, TextRow)]
    assert left == [text for text in texts if text not in high]
    assert split(left, validation)[1] == [row for row in split(texts, validation)[1] if row not in high]


def test_at_least_one_row_is_a_test_row() -> None:
    texts = [str(i) for i in range(10)]
    _, test = set_aside(CanonicalRows.of(TextRow(text) for text in texts), 5e-324, 0.1)
    assert [row.text for row in test if isinstance(row, TextRow)] == [max(texts, key=digest)]


@pytest.mark.parametrize(
    ("texts", "share", "validation"),
    [(["a", "a"], 0.1, 0.0), (["a", "b", "c"], 0.5, 0.5), (["a", "b", "b"], 0.1, 0.1)],
)
def test_test_rows_leave_some_to_train_on(texts: list[str], share: float, validation: float) -> None:
    with pytest.raises(InvalidInput) as caught:
        set_aside(CanonicalRows.of(TextRow(text) for text in texts), share, validation)
    assert caught.value.errors[0].loc == ("test",)


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
    assert overlap(validation, train) == 3
    assert overlap(*hold_out(train, 0.3)) == 0
