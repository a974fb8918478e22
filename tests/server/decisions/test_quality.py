"""Figures of decisions, next to scikit-learn's, netcal's, and ones worked out by hand."""

import math

import numpy as np
import pytest

from server.decisions.answers import probabilities
from server.decisions.quality import (
    MAX_SHOWN,
    MeasuredDecisions,
    bootstrap,
    difference_interval,
    share_interval,
)


def decided(num_rows: int, num_options: int) -> MeasuredDecisions:
    """Return decisions that are often right, with every confidence."""
    scores = [[4 * math.sin(3 * n + 5 * k * k) for k in range(num_options)] for n in range(num_rows)]
    answers = [
        max(range(num_options), key=row.__getitem__) if n % 3 else n % num_options for n, row in enumerate(scores)
    ]
    return MeasuredDecisions([probabilities(row, 2.0) for row in scores], answers)


# scikit-learn 1.9.1 and netcal 1.4.0, for of = decided(...):
# accuracy_score(of.answers, of.chosen), f1_score(of.answers, of.chosen, average="macro"),
# brier_score_loss(of.answers, of.probabilities, scale_by_half=False, labels=range(num_options)),
# ECE(bins=of.num_bins).measure(of.confidences, of.is_right.astype(int))
@pytest.mark.parametrize(
    ("num_rows", "num_options", "expected"),
    [
        (40, 2, (0.825, 0.8248905565978737, 0.3425150534207452, 0.14672868036336223)),
        (200, 3, (0.74, 0.7392893006928095, 0.47867282002222383, 0.1970683294876965)),
        (300, 12, (0.7033333333333334, 0.7323088733848565, 0.7661721855002509, 0.4337582017668946)),
    ],
)
def test_figures_are_those_of_scikit_learn_and_netcal(
    num_rows: int, num_options: int, expected: tuple[float, ...]
) -> None:
    found = decided(num_rows, num_options).figures
    assert tuple(found) == ("accuracy", "macro_f1", "brier", "calibration_error")
    assert [one.value for one in found.values()] == pytest.approx(expected, abs=1e-9)
    assert all(one.low <= one.value <= one.high for one in found.values())


def test_figures_of_four_rows_by_hand() -> None:
    """Bins are 0.2 wide. The third option is neither given nor right, so macro-F1 is over two options."""
    found = MeasuredDecisions(
        [[0.9, 0.1, 0.0], [0.85, 0.05, 0.1], [0.5, 0.3, 0.2], [0.3, 0.5, 0.2]],
        [0, 1, 0, 1],
    )
    assert found.brier_scores == pytest.approx([0.02, 1.635, 0.38, 0.38])
    figures = {name: one.value for name, one in found.figures.items()}
    # a: 2 hits of 3 given and 2 right; b: 1 hit of 1 given and 2 right
    f1 = (2 * 2 / 5 + 2 * 1 / 3) / 2
    error = (abs(0.9 - 1 + 0.85 - 0) + abs(0.5 - 1 + 0.5 - 1)) / 4
    assert figures == pytest.approx(
        {"accuracy": 0.75, "macro_f1": f1, "brier": 2.415 / 4, "calibration_error": error}
    )
    first, second = found.reliability()
    assert (first.low, first.high, first.num_rows, first.accuracy) == (0.4, 0.6, 2, 1)
    assert (second.low, second.high, second.num_rows) == (0.8, 1, 2)
    assert (second.confidence, second.accuracy) == pytest.approx((0.875, 0.5))
    assert found.confusion().counts == ((2, 0, 0), (1, 1, 0), (0, 0, 0))


def test_a_certain_answer_is_in_the_last_bin() -> None:
    (only,) = MeasuredDecisions([[1.0, 0.0]] * 3, [0, 0, 1]).reliability()
    assert (only.low, only.high, only.confidence) == (0.8, 1, 1)
    assert only.accuracy == pytest.approx(2 / 3)


@pytest.mark.parametrize(("num_rows", "num_bins"), [(1, 5), (59, 5), (90, 9), (150, 15), (5000, 15)])
def test_few_rows_have_fewer_bins(num_rows: int, num_bins: int) -> None:
    assert decided(num_rows, 2).num_bins == num_bins


def test_a_large_confusion_matrix_shows_the_most_frequent_options() -> None:
    num_options = MAX_SHOWN + 5
    answers = [option for option in range(num_options) for _ in range(1 if option in (0, 3, 4, 8, 24) else 2)]
    chosen = [(option + 1) % num_options for option in answers]
    found = MeasuredDecisions(np.eye(num_options)[chosen], answers).confusion()
    assert found.options == tuple(option for option in range(num_options) if option not in (0, 3, 4, 8, 24))
    counts = np.array(found.counts)
    assert counts.shape == (MAX_SHOWN + 1, MAX_SHOWN + 1)
    assert counts.sum() == len(answers)
    assert counts[found.options.index(1), found.options.index(2)] == 2
    assert counts[found.options.index(2), -1] == 2  # 2 was taken for 3, which isn't shown
    assert counts[-1, found.options.index(1)] == 1  # 0 was taken for 1
    assert counts[-1, -1] == 2  # 24 was taken for 0, and 3 for 4


def test_bootstrap_intervals_of_a_mean_are_the_normal_ones() -> None:
    values = np.array([math.sin(n) for n in range(400)])
    (low,), (high,) = bootstrap(400, lambda counts: (counts @ values / 400)[:, None])
    error = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.1 * error)


@pytest.mark.parametrize(("num_rows", "tolerance"), [(60, 0.03), (600, 0.03)])
def test_intervals_contain_the_true_value_in_about_95_of_100_samples(num_rows: int, tolerance: float) -> None:
    rng = np.random.default_rng(0)
    truth = {"accuracy": 0.7, "brier": 0.7 * 0.18 + 0.3 * 0.98}
    hits = dict.fromkeys(truth, 0)
    for _ in range(300):
        answers = (rng.random(num_rows) > 0.7).astype(int)
        figures = MeasuredDecisions([[0.7, 0.3]] * num_rows, answers).figures
        for name, value in truth.items():
            hits[name] += figures[name].low <= value <= figures[name].high
    assert all(0.95 - tolerance <= count / 300 for count in hits.values())


def test_the_interval_of_a_share_is_clopper_and_pearsons() -> None:
    """Tables have 0.555 to 0.997 for 9 of 10, and 0.692 to 1 for 10 of 10."""
    assert share_interval(9, 10) == pytest.approx((0.554984, 0.997471), abs=1e-6)
    assert share_interval(10, 10) == pytest.approx((0.691503, 1.0), abs=1e-6)
    assert share_interval(0, 10) == pytest.approx((0.0, 0.308497), abs=1e-6)
    assert share_interval(3300, 5000) == pytest.approx((0.646673, 0.673139), abs=1e-4)


@pytest.mark.parametrize(
    ("gain", "loss"), [(0.05, 0.0), (0.05, 0.05), (0.3, 0.1), (0.1, 0.02), (0.5, 0.4), (0.9, 0.0)]
)
def test_the_interval_of_a_difference_contains_the_true_one(gain: float, loss: float) -> None:
    """By the exact probabilities of all outcomes. Each end is wrong in at most 2.5 % of samples."""
    num_rows = 20
    too_low = too_high = 0.0
    for gained in range(num_rows + 1):
        for lost in range(num_rows + 1 - gained):
            rest = num_rows - gained - lost
            ways = math.comb(num_rows, gained) * math.comb(num_rows - gained, lost)
            p = ways * gain**gained * loss**lost * (1 - gain - loss) ** rest
            if p < 1e-9:
                continue
            low, high = difference_interval(gained, lost, num_rows)
            too_low += p * (high < gain - loss)
            too_high += p * (low > gain - loss)
    assert max(too_low, too_high) <= 0.025


def test_the_interval_of_a_difference_by_hand() -> None:
    """9 of 10 flips are gains, of 20 rows. Tails are 2 % for the share, and 0.5 % for the rate."""

    def at_least(hits: int, num: int, p: float) -> float:
        return math.fsum(math.comb(num, k) * p**k * (1 - p) ** (num - k) for k in range(hits, num + 1))

    low, high = difference_interval(9, 1, 20)
    rarest, most_frequent = share_interval(10, 20, 0.005)
    assert at_least(10, 20, rarest) == pytest.approx(0.005, abs=1e-9)
    assert at_least(9, 10, (1 + low / rarest) / 2) == pytest.approx(0.02, abs=1e-9)
    assert 1 - at_least(10, 10, (1 + high / most_frequent) / 2) == pytest.approx(0.02, abs=1e-9)
    assert difference_interval(1, 9, 20) == pytest.approx((-high, -low))
    assert difference_interval(0, 0, 20) == pytest.approx((-(1 - 0.005 ** (1 / 20)), 1 - 0.005 ** (1 / 20)))
    assert difference_interval(6, 0, 200)[0] > 0 > difference_interval(5, 0, 200)[0]
