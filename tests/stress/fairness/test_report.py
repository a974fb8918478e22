"""The arithmetic of `make fairness`: which percentile is compared, and what fails a run."""

import math

import pytest

from tests.stress.fairness.report import (
    HANDOVER,
    JobSample,
    Phase,
    Sample,
    busy_faults,
    effect_faults,
    job_faults,
    judged_percent,
    latency_faults,
    percentile,
    table,
)


def samples(*totals: float) -> list[Sample]:
    return [Sample("question", total / 2, total) for total in totals]


def job(total: float, status: str = "succeeded") -> JobSample:
    return JobSample(total / 2, total, status)


@pytest.mark.parametrize(("percent", "expected"), [(50, 50), (95, 95), (99, 99), (100, 100), (1, 1)])
def test_percentiles_are_nearest_ranks(percent: int, expected: float) -> None:
    assert percentile([float(value) for value in range(100, 0, -1)], percent) == expected


def test_percentiles_of_few_values_are_values() -> None:
    assert [percentile([3.0, 1.0, 2.0], percent) for percent in (50, 95, 99)] == [2.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("num_samples", "percent"),
    [(600, 99), (100, 99), (99, 95), (20, 95), (19, 90), (10, 90), (9, None), (0, None)],
)
def test_judged_percentile_leaves_out_at_least_one_sample(num_samples: int, percent: int | None) -> None:
    assert judged_percent(num_samples) == percent


@pytest.mark.parametrize(("slowest", "fails"), [(3.0, False), (3.1, True)])
def test_latency_fails_over_three_times_the_latency_alone(slowest: float, fails: bool) -> None:
    alone = samples(*[0.5] * 19, 1.0, 1.0)
    beside = samples(*[0.5] * 19, slowest, 60.0)  # p95 leaves the slowest out

    found, compared = latency_faults("question", alone, beside)

    assert bool(found) is fails
    assert compared.startswith("question: p95 1.00 s alone")


def test_p99_is_compared_from_a_hundred_samples_on() -> None:
    _, compared = latency_faults("question", samples(*[1.0] * 99, 9.0), samples(*[2.0] * 100))

    assert compared == "question: p99 1.00 s alone, 2.00 s with greedy, 2.0 times"


def test_one_failed_request_fails_the_run() -> None:
    beside = [*samples(*[1.0] * 20), Sample("question", None, 1.0, "429 busy")]

    found, _ = latency_faults("question", samples(*[1.0] * 20), beside)

    assert found == ["question, with greedy: 1 of 21 failed, the first with: 429 busy"]


def test_machine_too_busy_to_judge_fails_the_run() -> None:
    assert busy_faults("question", samples(*[0.9] * 10, *[30.0] * 9)) == []
    assert len(busy_faults("question", samples(*[0.9] * 9, *[1.1] * 10))) == 1


def test_too_few_samples_fail_the_run() -> None:
    found, _ = latency_faults("question", samples(*[1.0] * 9), samples(*[1.0] * 100))

    assert found == ["question: too few samples to judge (9 and 100)"]


@pytest.mark.parametrize(("wait", "num_faults"), [(19.9 + HANDOVER, 0), (20.1 + HANDOVER, 1)])
def test_job_may_wait_for_a_time_slice(wait: float, num_faults: int) -> None:
    found, _ = job_faults([job(8), job(10)], [job(9), JobSample(wait, wait + 100, "succeeded")], time_slice=20)

    assert len(found) == num_faults


def test_job_that_never_ends_fails_the_run() -> None:
    found, _ = job_faults([job(8)], [JobSample(math.inf, math.inf, "queued after 80 s")], time_slice=20)

    assert found[0] == "a job ended as queued after 80 s"
    assert len(found) == 2


def test_run_without_jobs_fails() -> None:
    assert job_faults([job(8)], [], time_slice=20)[0] == ["jobs: too few to judge (1 and 0)"]


def test_activity_without_effect_fails_the_run() -> None:
    wanted = {"rows": (frozenset({"pieces"}), 10), "merges": (frozenset({"422", "429"}), 3)}

    found = effect_faults({"rows": {"503": 40}, "merges": {"422": 2, "429": 1}}, wanted)

    assert found == ["greedy's rows: 0 of pieces, at least 10 expected: {'503': 40}"]


def test_table_has_each_phase_and_their_ratio() -> None:
    alone, beside = Phase(samples(1.0, 1.0), [job(8)]), Phase(samples(2.0, 4.0))

    lines = table(["question"], alone, beside)

    assert lines[2].startswith("| question | alone | 2 | 0 | 500 ms | 500 ms |")
    assert lines[4] == "| question | ratio |  |  | 2.0 | 4.0 | 4.0 | 4.0 | 2.0 | 4.0 | 4.0 | 4.0 |"
    assert lines[5:] == ["jobs alone: succeeded: waited 4.00 s, 8.00 s in all", "jobs with greedy: none"]
