"""What must hold after faults, as pure functions over a log of what clients saw and what is stored at the end."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Published:
    """A version of an adapter: acknowledged to a client, or stored at the end."""

    project: str
    name: str
    version: int
    digest: str


@dataclass(frozen=True)
class Answered:
    """A greedy answer. `body` is its request as JSON."""

    body: str
    text: str
    is_complete: bool = True


@dataclass(frozen=True)
class Ran:
    """An accepted job at the end. `num_ends` is how often its events report success."""

    project: str
    job_id: str
    status: str
    num_ends: int = 1


@dataclass(frozen=True)
class Took:
    """A request and its duration in seconds."""

    what: str
    seconds: float


@dataclass
class Log:
    """What clients saw, and what is stored at the end."""

    expected: dict[str, str] = field(default_factory=dict)  # by the request's body: one process's answer
    answers: list[Answered] = field(default_factory=list)
    acknowledged: list[Published] = field(default_factory=list)
    stored: list[Published] = field(default_factory=list)
    submitted: list[str] = field(default_factory=list)  # jobs that were accepted
    jobs: list[Ran] = field(default_factory=list)
    job_versions: list[tuple[str, str]] = field(default_factory=list)  # project and job of each version by a job
    requests: list[Took] = field(default_factory=list)
    deadline: float = 60.0  # seconds


def audit(log: Log) -> list[str]:
    """Return a line for each violation."""
    checks = (wrong_answers, lost_publishes, doubled_versions, jobs_not_run_once, late_requests)
    return [line for check in checks for line in check(log)]


def wrong_answers(log: Log) -> Iterator[str]:
    """Find complete answers that differ from one process's, and others that don't begin it."""
    for answer in log.answers:
        expected = log.expected[answer.body]
        if answer.is_complete and answer.text != expected:
            yield f"a wrong answer to {answer.body}: {answer.text!r} instead of {expected!r}"
        elif not answer.is_complete and not expected.startswith(answer.text):
            yield f"a wrong beginning of the answer to {answer.body}: {answer.text!r}"


def lost_publishes(log: Log) -> Iterator[str]:
    """Find acknowledged versions that aren't stored, or with another digest."""
    stored = {(one.project, one.name, one.version): one.digest for one in log.stored}
    for one in log.acknowledged:
        digest = stored.get((one.project, one.name, one.version))
        if digest is None:
            yield f"{one.project}'s {one.name}@{one.version} was acknowledged and is gone"
        elif digest != one.digest:
            yield f"{one.project}'s {one.name}@{one.version} was acknowledged with other bytes"


def doubled_versions(log: Log) -> Iterator[str]:
    """Find version numbers that were acknowledged or are stored more than once."""
    for where, found in (("acknowledged", log.acknowledged), ("stored", log.stored)):
        counts = Counter((one.project, one.name, one.version) for one in found)
        for (project, name, version), number in counts.items():
            if number > 1:
                yield f"{project}'s {name}@{version} is {where} {number} times"


def jobs_not_run_once(log: Log) -> Iterator[str]:
    """Find accepted jobs that are gone, didn't succeed exactly once, or didn't make exactly one version."""
    known = {job.job_id for job in log.jobs}
    for job_id in log.submitted:
        if job_id not in known:
            yield f"{job_id} was accepted and is gone"
    made = Counter(log.job_versions)
    for job in log.jobs:
        if job.status != "succeeded" or job.num_ends != 1:
            yield f"{job.job_id} is {job.status}, and succeeded {job.num_ends} times"
        if (number := made.pop((job.project, job.job_id), 0)) != 1:
            yield f"{job.job_id} of {job.project} made {number} versions"
    for project, job_id in made:
        yield f"a version of {project} is from {job_id}, which nobody knows"


def late_requests(log: Log) -> Iterator[str]:
    """Find requests that took longer than the deadline."""
    for request in log.requests:
        if request.seconds > log.deadline:
            yield f"{request.what} took {request.seconds:.1f} s"
