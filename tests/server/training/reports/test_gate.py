"""Which adapters are published: those with the verdict that the gate asks for."""

from dataclasses import replace

import pytest

from server.training.report import decide
from server.training.spec import PublishIf
from server.training.verdicts import Comparison

BETTER = Comparison("loss", 40, False, 2.0, 2.5, 0.1, -0.7, -0.3)
WORSE = Comparison("loss", 40, False, 3.0, 2.5, 0.1, 0.3, 0.7)
UNCLEAR = Comparison("loss", 40, False, 2.4, 2.5, 0.1, -0.3, 0.1)


@pytest.mark.parametrize("found", [None, BETTER, WORSE])
def test_always(found: Comparison | None) -> None:
    assert decide("always", {"base": found, "latest": found}).passes


@pytest.mark.parametrize(
    ("found", "improves", "holds"),
    [(BETTER, True, True), (UNCLEAR, False, True), (WORSE, False, False), (None, False, True)],
)
def test_gates_by_verdict(found: Comparison | None, improves: bool, holds: bool) -> None:
    """`improves_*` needs better, `not_worse` takes can't tell. The base takes the place of a missing latest."""
    assert decide("improves_base", {"base": found, "latest": WORSE}).passes is improves
    assert decide("improves_latest", {"base": WORSE, "latest": found}).passes is improves
    assert decide("improves_latest", {"base": found}).passes is improves
    assert decide("not_worse", {"base": WORSE, "latest": found}).passes is holds
    assert decide("not_worse", {"base": found}).passes is holds


def test_reasons_have_the_numbers() -> None:
    reason = decide("improves_latest", {"base": WORSE, "latest": BETTER}).reason
    assert reason == (
        "better than latest: loss 2.0000 against 2.5000 on 40 held-out rows "
        "(difference -0.5000, 95 % interval -0.7000 to -0.3000)"
    )
    reason = decide("not_worse", {"base": WORSE, "latest": BETTER}, versions={"latest": "tweets@2"}).reason
    assert reason.startswith("better than tweets@2: loss 2.0000")
    reason = decide("not_worse", {"base": WORSE, "latest": None}, versions={"latest": "tweets@2"}).reason
    assert reason == "nothing was measured to compare it with tweets@2"
    recalled = Comparison("exact_match", 28, True, 25 / 28, 1 / 28, 0.1, 0.7, 0.95)
    assert decide("improves_base", {"base": recalled}).reason == (
        "better than the untouched base: 25 of 28 rows, trained ones included, exactly right, against 1 "
        "(difference +0.8571, 95 % interval +0.7000 to +0.9500)"
    )


def test_exact_match_is_better_if_it_is_higher() -> None:
    found = replace(BETTER, metric="exact_match", low=0.1, high=0.5, tuned=0.8, other=0.4)
    assert (found.verdict, found.is_gain, found.is_loss) == ("better", True, False)
    found = replace(found, low=-0.5, high=-0.1, tuned=0.4, other=0.8)
    assert (found.verdict, found.is_gain, found.is_loss) == ("worse", False, True)


@pytest.mark.parametrize("publish_if", ["always", "improves_base", "improves_latest", "not_worse"])
def test_full_fine_tuning_is_never_published(publish_if: PublishIf) -> None:
    assert not decide(publish_if, {"base": BETTER}, method="full").passes
    assert not decide(publish_if, {"base": None}, method="full").passes
