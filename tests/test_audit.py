"""The auditor of rounds of faults finds planted faults, and nothing else."""

from dataclasses import replace

import pytest

from tests.stress.audit import Answered, Log, Published, Ran, Took, audit

FIRST = Published("acme", "up", 1, "a" * 8)
SECOND = Published("acme", "up", 2, "b" * 8)
SOUND = Log(
    expected={"q": "one two"},
    answers=[Answered("q", "one two"), Answered("q", "one", is_complete=False)],
    acknowledged=[FIRST, SECOND],
    stored=[FIRST, SECOND, Published("acme", "up", 3, "c" * 8)],  # the third one's answer was lost
    submitted=["job-1"],
    jobs=[Ran("acme", "job-1", "succeeded"), Ran("other", "job-2", "succeeded")],
    job_versions=[("acme", "job-1"), ("other", "job-2")],
    requests=[Took("/generate", 3.0)],
)


def test_a_sound_log_has_no_violation() -> None:
    assert audit(SOUND) == []


@pytest.mark.parametrize(
    ("fault", "lines"),
    [
        ({"stored": [FIRST]}, ["acme's up@2 was acknowledged and is gone"]),
        (
            {"stored": [FIRST, replace(SECOND, digest="d" * 8)]},
            ["acme's up@2 was acknowledged with other bytes"],
        ),
        (
            {"acknowledged": [FIRST, SECOND, SECOND]},
            ["acme's up@2 is acknowledged 2 times"],
        ),
        (
            {"stored": [FIRST, SECOND, replace(SECOND, digest="b" * 8)]},
            ["acme's up@2 is stored 2 times"],
        ),
        (
            {"answers": [Answered("q", "one too")]},
            ["a wrong answer to q: 'one too' instead of 'one two'"],
        ),
        ({"answers": [Answered("q", "one")]}, ["a wrong answer to q: 'one' instead of 'one two'"]),
        (
            {"answers": [Answered("q", "two", is_complete=False)]},
            ["a wrong beginning of the answer to q: 'two'"],
        ),
        ({"submitted": ["job-1", "job-3"]}, ["job-3 was accepted and is gone"]),
        (
            {"job_versions": [("acme", "job-1"), ("acme", "job-1"), ("other", "job-2")]},
            ["job-1 of acme made 2 versions"],
        ),
        ({"job_versions": [("other", "job-2")]}, ["job-1 of acme made 0 versions"]),
        (
            {"job_versions": [*SOUND.job_versions, ("acme", "job-9")]},
            ["a version of acme is from job-9, which nobody knows"],
        ),
        (
            {"jobs": [Ran("acme", "job-1", "succeeded", 2), SOUND.jobs[1]]},
            ["job-1 is succeeded, and succeeded 2 times"],
        ),
        (
            {"jobs": [Ran("acme", "job-1", "failed", 0), SOUND.jobs[1]]},
            ["job-1 is failed, and succeeded 0 times"],
        ),
        ({"requests": [Took("/ready", 61.5)]}, ["/ready took 61.5 s"]),
    ],
)
def test_a_planted_fault_is_found(fault: dict[str, object], lines: list[str]) -> None:
    assert audit(replace(SOUND, **fault)) == lines  # type: ignore[arg-type]
