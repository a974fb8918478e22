"""Which adapters are published: strictly better ones, where a gate was asked for."""

from dataclasses import replace

import pytest

from server.training.evaluate import Evaluation
from server.training.report import decide
from server.training.spec import PublishIf
from tests.server.training.reports.report_kit import BASE, LATEST, TUNED


def at(loss: float) -> Evaluation:
    return replace(TUNED, loss=loss)


@pytest.mark.parametrize("tuned", [None, TUNED, at(9.0)])
def test_always(tuned: Evaluation | None) -> None:
    assert decide("always", tuned, BASE).passes


@pytest.mark.parametrize(("loss", "passes"), [(2.4999, True), (2.5, False), (2.6, False)])
def test_improves_base(loss: float, passes: bool) -> None:
    """Whatever the latest version is."""
    for latest in (None, at(0.1)):
        gate = decide("improves_base", at(loss), BASE, latest)
        assert gate.passes is passes
        assert "2.5000" in gate.reason
        assert "base" in gate.reason


@pytest.mark.parametrize(("loss", "passes"), [(0.7, True), (0.75, False), (1.0, False)])
def test_improves_latest(loss: float, passes: bool) -> None:
    gate = decide("improves_latest", at(loss), BASE, LATEST)
    assert gate.passes is passes
    assert "0.7500" in gate.reason
    assert "latest" in gate.reason


def test_improves_latest_without_one_is_improves_base() -> None:
    assert decide("improves_latest", at(2.4), BASE, None).passes
    assert not decide("improves_latest", at(2.5), BASE, None).passes


def test_a_gate_needs_evaluations() -> None:
    with pytest.raises(ValueError, match="held-out rows"):
        decide("improves_base", None, None)
    with pytest.raises(ValueError, match="held-out rows"):
        decide("improves_latest", None, BASE, LATEST)


def test_a_loss_that_is_not_finite_improves_nothing() -> None:
    assert not decide("improves_base", at(float("nan")), BASE).passes


@pytest.mark.parametrize("publish_if", ["always", "improves_base", "improves_latest"])
def test_full_fine_tuning_is_never_published(publish_if: PublishIf) -> None:
    assert not decide(publish_if, TUNED, BASE, LATEST, method="full").passes
    assert not decide(publish_if, None, None, method="full").passes
