"""Statistics of evaluations: values, intervals, paired differences and flips, from measurements made by hand."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from server.decisions.quality import NUM_RESAMPLES, difference_interval
from server.jobs import evaluation
from server.jobs.evaluate_spec import MAX_TEXT_BYTES, METRICS, Candidate, EvaluateSpec
from server.jobs.evaluation import Answers, Findings, TokenSums, judge, max_text_bytes, shortened
from server.jobs.evaluation_data import EvaluatedRow, EvaluationData
from server.training.encoding import Asked, Examples, Reference

OPTIONS = {"q": ((5,), (6,), (7,))}
VALUES: dict[str, tuple[str | bool, ...]] = {"q": ("billing", True, "shipping")}


def spec(*names: str, datasets: tuple[str, ...] = ("ds",)) -> EvaluateSpec:
    return EvaluateSpec(tuple(Candidate(name, ()) for name in names), datasets, METRICS, 200)


def data(*rows: EvaluatedRow) -> EvaluationData:
    return EvaluationData(rows, Examples(), OPTIONS, VALUES, [{}, {}, {}], "b")


def completion(number: int, text: str = "yes", dataset: str = "ds") -> EvaluatedRow:
    return EvaluatedRow(dataset, number, Reference((1, 2), text, 1))


def completed(*texts: str | None, loss: float = 1.5) -> Answers:
    """Return measurements of rows of two tokens each. The first token is right."""
    tokens = [TokenSums(2 * loss, 1, 2) for _ in texts]
    return Answers({"ds": loss}, tokens, texts, [None for _ in texts])


def find(spec: EvaluateSpec, data: EvaluationData, answers: Sequence[Answers]) -> Findings:
    return evaluation.find(spec, data, [judge(one, data) for one in answers])


def found(findings: Findings, metric: str) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Return the metric's results and differences."""
    parts = findings.results, findings.differences
    results, differences = ([dict(one) for one in part if one["metric"] == metric] for part in parts)
    return results, differences


def number(found: Mapping[str, object], name: str) -> float:
    value = found[name]
    assert isinstance(value, int | float)
    return value


def at_least(hits: int, num: int, p: float) -> float:
    """Return the probability that a binomial variable is at least `hits`."""
    return math.fsum(math.comb(num, k) * p**k * (1 - p) ** (num - k) for k in range(hits, num + 1))


def assert_exact(interval: Mapping[str, object], hits: int, num: int) -> None:
    """Check Clopper and Pearson's interval by its definition: each tail has 2.5 %."""
    assert at_least(hits, num, number(interval, "low")) == pytest.approx(0.025, abs=1e-9)
    assert 1 - at_least(hits + 1, num, number(interval, "high")) == pytest.approx(0.025, abs=1e-9)


def test_exact_match_has_exact_intervals_and_counts_flips() -> None:
    """The first adapter has the first 10 of 30 rows right, the other one all except rows 0 and 1."""
    rows = data(*(completion(number) for number in range(30)))
    first = completed(*(["yes"] * 10 + ["no"] * 20))
    other = completed(*(["no", None] + ["yes\n"] * 28))
    findings = find(spec("base", "a@1"), rows, [first, other])
    (base, tuned), (difference,) = found(findings, "exact_match")
    assert (base["value"], tuned["value"], base["n"]) == (10 / 30, 28 / 30, 30)
    assert_exact(base, 10, 30)
    assert_exact(tuned, 28, 30)
    assert difference["difference"] == pytest.approx(18 / 30)
    assert (difference["from"], difference["to"]) == ("base", "a@1")
    assert (difference["gained"], difference["lost"]) == (20, 2)
    assert (difference["low"], difference["high"]) == difference_interval(20, 2, 30)
    assert [flip["row"] for flip in findings.flips] == list(range(2)) + list(range(10, 30))
    assert findings.flips[1] == {
        "dataset": "ds",
        "metric": "exact_match",
        "row": 1,
        "from": "base",
        "to": "a@1",
        "answers": ["yes", None],
        "gained": False,
    }


def test_loss_is_a_ratio_of_sums_with_a_paired_bootstrap() -> None:
    """Rows have very different losses. The adapter's are 0.1 nats a token less, which pairing shows."""
    rng = random.Random(1)
    counts = [rng.randrange(1, 9) for _ in range(60)]
    losses = [count * rng.uniform(0.1, 6) for count in counts]
    less = [loss - 0.1 * count * rng.uniform(0.9, 1.1) for loss, count in zip(losses, counts, strict=True)]
    rows = data(*(EvaluatedRow("ds", number) for number in range(60)))
    nothing = [None] * 60
    measured = [
        Answers(
            {"ds": math.fsum(sums) / sum(counts)},
            [TokenSums(loss, 1, count) for loss, count in zip(sums, counts, strict=True)],
            nothing,
            nothing,
        )
        for sums in (losses, less, less)
    ]
    findings = find(spec("base", "a", "b"), rows, measured)
    (base, _, _), (difference, same) = found(findings, "loss")
    assert base["value"] == math.fsum(losses) / sum(counts)
    assert same == {**difference, "to": "b"}  # each is compared with the first
    value, low, high = (number(difference, name) for name in ("difference", "low", "high"))
    assert value == pytest.approx(-0.1, abs=0.01)
    assert -0.11 < low < -0.1 + 0.005
    assert high < -0.09
    # by numpy alone: the standard error of a ratio estimator, times 1.96
    squares = (np.array(losses) - np.array(counts) * number(base, "value")) ** 2
    error = 1.96 * math.sqrt(float(squares.sum())) / sum(counts)
    width = (number(base, "high") - number(base, "low")) / 2
    assert width == pytest.approx(error, rel=0.15)
    assert NUM_RESAMPLES >= 1000
    assert findings == find(spec("base", "a", "b"), rows, measured)  # the seed is fixed
    (accuracy, *_), _ = found(findings, "token_accuracy")
    assert accuracy["value"] == pytest.approx(60 / sum(counts))


def test_decisions_are_judged_by_their_probabilities() -> None:
    rows = data(*(EvaluatedRow("ds", number, None, Asked((1,), "q", number % 3)) for number in range(3)))
    nothing = [None] * 3
    sure, unsure = (0.8, 0.1, 0.1), (0.3, 0.4, 0.3)
    first = Answers({}, nothing, nothing, [sure, sure, sure])
    other = Answers({}, nothing, nothing, [unsure, unsure, unsure])
    findings = find(spec("base", "a"), rows, [first, other])
    assert {str(one["metric"]) for one in findings.results} == {"accuracy", "brier"}
    (base, tuned), _ = found(findings, "brier")
    assert base["value"] == pytest.approx((0.06 + 2 * (0.64 + 0.81 + 0.01)) / 3)
    assert tuned["value"] == pytest.approx((2 * (0.49 + 0.16 + 0.09) + (0.36 + 0.18)) / 3)
    (base, tuned), (difference,) = found(findings, "accuracy")
    assert (base["value"], tuned["value"], difference["difference"]) == (1 / 3, 1 / 3, 0)
    assert [(flip["row"], flip["answers"], flip["gained"]) for flip in findings.flips] == [
        (0, ["billing", True], False),
        (1, ["billing", True], True),
    ]


@pytest.mark.parametrize("num_rows", [19, 20])
def test_few_rows_have_no_bootstrapped_interval(num_rows: int) -> None:
    """A share's interval is exact, however few rows there are."""
    rows = data(*map(completion, range(num_rows)))
    answers = [completed(*("yes" for _ in range(num_rows)), loss=loss) for loss in (1.5, 1.0)]
    findings = find(spec("a", "b"), rows, answers)
    has_interval = num_rows == 20
    for metric in ("loss", "token_accuracy"):
        results, differences = found(findings, metric)
        for one in (*results, *differences):
            assert (one["low"] is not None, one["high"] is not None) == (has_interval, has_interval)
    for one in (part for parts in found(findings, "exact_match") for part in parts):
        assert number(one, "low") < number(one, "high")


def test_long_answers_are_cut_after_they_are_judged() -> None:
    """The text says how long it was. A character of several bytes is cut as a whole."""
    long, alike = "ä" * 3000, "ä" * 2999 + "ö"
    rows = data(completion(0, long), EvaluatedRow("ds", 1, None, Asked((1,), "q", 0)))
    values = {"q": (long, True, "shipping")}
    rows = replace(rows, values=values)
    nothing = [None, None]
    answers = [
        Answers({}, nothing, [text, None], [None, distribution])
        for text, distribution in ((long, (0.1, 0.8, 0.1)), (alike, (0.8, 0.1, 0.1)))
    ]
    findings = find(spec("a", "b"), rows, answers)
    cut = f"{'ä' * 500}… (cut, of 6,000 bytes)"
    assert [(flip["metric"], flip["answers"], flip["gained"]) for flip in findings.flips] == [
        ("exact_match", [cut, cut], False),
        ("accuracy", [True, cut], True),
    ]
    assert shortened("ää", 3) == "ä… (cut, of 4 bytes)"
    assert shortened("ää", 4) == "ää"


def test_all_texts_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = data(*map(completion, range(10)), EvaluatedRow("ds", 10))
    assert max_text_bytes(rows, 4) == MAX_TEXT_BYTES
    monkeypatch.setattr(evaluation, "MAX_TEXTS_BYTES", 4000)
    assert max_text_bytes(rows, 4) == 100
    assert max_text_bytes(data(EvaluatedRow("ds", 0)), 16) == MAX_TEXT_BYTES


def test_answers_to_rows_with_a_schema_are_validated() -> None:
    """An answer may be right or valid without being the other. Rows without a schema don't count."""
    schema = '{"required":["a"]}'
    rows = data(*(replace(completion(n, '{"a": 1}'), schema=schema) for n in range(4)), completion(4, '{"a": 1}'))
    first = completed('{"a": 1}', '{"a": 2}', '{"b": 1}', None, '{"a": 1}')
    other = completed('{"a": 1', '{"a": 2}', '{"a": 3}', "{}", '{"a": 1}')
    findings = find(spec("base", "a"), rows, [first, other])
    (base, tuned), (difference,) = found(findings, "json_valid")
    assert (base["value"], tuned["value"], base["n"]) == (0.5, 0.5, 4)
    assert_exact(base, 2, 4)
    assert (difference["gained"], difference["lost"]) == (1, 1)
    flips = [flip for flip in findings.flips if flip["metric"] == "json_valid"]
    assert [(flip["row"], flip["answers"], flip["gained"]) for flip in flips] == [
        (0, ['{"a": 1}', '{"a": 1'], False),
        (2, ['{"b": 1}', '{"a": 3}'], True),
    ]
    (base, tuned), _ = found(findings, "exact_match")
    assert (base["value"], tuned["value"], base["n"]) == (2 / 5, 1 / 5, 5)


def test_a_metric_counts_the_rows_that_it_fits() -> None:
    """Data sets are apart, and one adapter has no difference."""
    rows = data(completion(0), EvaluatedRow("ds", 1), completion(4, dataset="other"))
    tokens = [TokenSums(1.0, 1, 2), None, TokenSums(4.0, 2, 2)]
    one = Answers({"ds": 0.5, "other": 2.0}, tokens, ["yes", None, "no"], [None] * 3)
    findings = find(spec("base", datasets=("ds", "other")), rows, [one])
    values = {(one["dataset"], one["metric"]): (one["value"], one["n"]) for one in findings.results}
    assert values == {
        ("ds", "loss"): (0.5, 1),
        ("ds", "token_accuracy"): (0.5, 1),
        ("ds", "exact_match"): (1, 1),
        ("other", "loss"): (2.0, 1),
        ("other", "token_accuracy"): (1, 1),
        ("other", "exact_match"): (0, 1),
    }
    assert (findings.differences, findings.flips) == ([], [])


def test_equal_answers_on_few_rows_show_little() -> None:
    one = completed("yes", "no", "yes")
    findings = find(spec("a", "b"), data(*map(completion, range(3))), [one, one])
    _, (difference,) = found(findings, "exact_match")
    assert (difference["difference"], difference["gained"], difference["lost"]) == (0, 0, 0)
    low, high = number(difference, "low"), number(difference, "high")
    assert low == -high
    assert high == pytest.approx(1 - 0.005 ** (1 / 3)), "the largest share of flips that may show none in 3 rows"


def test_listed_flips_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MAX_FLIPS", 2)
    texts = ["yes"] * 5
    rows = data(*map(completion, range(5)))
    findings = find(spec("a", "b"), rows, [completed(*texts), completed(*(["no"] * 5))])
    assert [flip["row"] for flip in findings.flips] == [0, 1]
    _, (difference,) = found(findings, "exact_match")
    assert difference["lost"] == 5
