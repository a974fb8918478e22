"""Test rows of a job: measured once, at the end, as held-out rows are, and nothing is chosen by them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from server.decisions.calibration import softmax
from server.jobs.scoring import decision_scores
from server.model.base.weights import BaseModel
from server.training.job_data import JobData, TestRows
from server.training.spec import JobSpec, LoraSpec, TrainingSpec
from tests.server.jobs.attempt_kit import Shop, job_data
from tests.server.jobs.test_decision_jobs import QUESTION, SPEC, decisions

CODES = JobSpec(
    "codes", lora=LoraSpec(rank=2), training=TrainingSpec(max_steps=3, learning_rate=2e-2, max_length=48)
)


def with_test(data: JobData, other: JobData) -> JobData:
    """Return the data with the other one's held-out rows as test rows."""
    assert other.validation is not None
    test = TestRows(other.validation, other.references, other.asked)
    facts = replace(data.facts, test_digest="t", num_test_rows=len(other.validation))
    return replace(data, test=test, facts=facts)


def report_of(shop: Shop, spec: JobSpec, data: JobData, job_id: str) -> dict[str, Any]:
    shop.submit(replace(spec, name=job_id), data, job_id)
    shop.attempt()
    job, report = shop.jobs.get(job_id), shop.jobs.report(job_id)
    assert report is not None, job.error
    return dict(report)


def test_test_rows_are_measured_as_held_out_rows_are(shop: Shop) -> None:
    data = job_data(shop.base, num_held_out=3)
    many = job_data(shop.base, num_held_out=24, num_references=24)
    plain = report_of(shop, CODES, data, "plain")
    tested = report_of(shop, CODES, with_test(data, many), "tested")
    measured = report_of(shop, CODES, many, "measured")  # the same training, with these rows held out
    assert plain["test"] is None
    digests = {report["adapter"]["digest"] for report in (plain, tested, measured)}
    assert len(digests) == 1, "the weights don't depend on the test rows"
    assert tested["evaluation"] == plain["evaluation"]
    found = tested["test"]
    comparison = found.pop("comparison")
    assert found == {name: measured["evaluation"][name] for name in found}
    assert set(found) == {"num_rows", "num_tokens", "num_completions", "base", "tuned"}
    expected = measured["comparisons"]["base"]
    assert {**comparison, "summary": ""} == {**expected, "summary": ""}
    assert comparison["summary"] == expected["summary"].replace("held-out", "test")
    assert tested["data"]["test_rows"] == 24


@pytest.mark.parametrize("num_held_out", [24, 10])
def test_decisions_are_judged_on_test_rows(shop: Shop, tiny_base: BaseModel, num_held_out: int) -> None:
    """Their temperature is fitted to held-out rows alone, if there are enough."""
    data, other = decisions(tiny_base, num_held_out), decisions(tiny_base, 40)
    report = report_of(shop, replace(SPEC, publish_metric="brier"), with_test(data, other), "job")
    found = report["decisions"]["kind"]
    version = shop.catalog.version("job", 1)
    stored: Any = version.config["decisions"]
    temperature = found["temperature"]
    assert (temperature is None) is (num_held_out == 10)
    assert [temperature] == (list(stored["temperatures"].values()) or [None])
    assert (found["rows"], found["num_rows"]) == ("test", 40)
    scores = decision_scores(tiny_base, shop.store.load(version.digest), other, lambda: None)
    assert scores is not None
    answers = np.eye(2)[[one.answer for one in other.asked]]
    assert QUESTION.digest in other.options

    def brier(temperature: float) -> float:
        return float(((softmax(scores, temperature) - answers) ** 2).sum(1).mean())

    tuned = found["tuned"]
    assert tuned["brier"]["value"] == pytest.approx(brier(temperature or 1.0))
    assert tuned["uncalibrated"]["brier"]["value"] == pytest.approx(brier(1.0))
    assert report["test"]["comparison"]["metric"] == "brier"
    assert report["test"]["comparison"]["tuned"] == pytest.approx(brier(temperature or 1.0))
    assert "test rows" in found["summary"]
    assert ("Don't trust its probabilities: 20 held-out rows" in found["summary"]) is (temperature is None)


def test_a_question_without_test_rows_is_judged_on_held_out_rows(shop: Shop, tiny_base: BaseModel) -> None:
    data = decisions(tiny_base, 24)
    assert data.validation is not None
    without = replace(data, test=TestRows(data.validation, (), ()))
    found, plain = (report_of(shop, SPEC, one, name) for one, name in ((without, "without"), (data, "plain")))
    assert found["decisions"] == plain["decisions"]
    assert (found["decisions"]["kind"]["rows"], found["decisions"]["kind"]["num_rows"]) == ("held-out", 24)


def test_test_rows_are_removed_with_the_others(shop: Shop) -> None:
    data = job_data(shop.base, num_held_out=3)
    shop.submit(CODES, with_test(data, data), "job")
    rows = [path.name for path in shop.files.directory("job").glob("*.safetensors")]
    assert sorted(rows) == ["test.safetensors", "train.safetensors", "validation.safetensors"]
    shop.jobs.cancel("job")
    shop.files.drop_rows("job")
    assert list(shop.files.directory("job").glob("*.safetensors")) == []
