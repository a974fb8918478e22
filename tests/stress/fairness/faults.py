"""Each fault by itself: what the modest project waits for, alone and alongside one activity of the greedy one.

The activities, their sizes and what is measured are those of the review that found the faults. Each measurement
has a server of its own, as the load of some faults outlives its clients.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import psutil

from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import code_rows
from tests.stress.fairness.greedy import ACTIVITIES, MIB, running
from tests.stress.fairness.modest import ADAPTER, JOB_PATIENCE, PATIENCE, QUESTION, Modest
from tests.stress.fairness.report import JobSample, effect_faults, percentile, seconds
from tests.stress.fairness.served import Projects, modest_client, start

NUM_ALONE = 5
LEAD = 5.0
"""Seconds that the greedy project has before the modest one is measured."""
BESIDE = 30.0
"""Seconds of measuring; a request that was begun is waited for."""
_numbers = itertools.count()


@dataclass(frozen=True)
class Reading:
    """What one request took, in seconds, and why it failed."""

    seconds: float
    fault: str | None = None


Probe = Callable[[Modest], Reading]


@dataclass(frozen=True)
class Fault:
    """One of the review's: what the modest project asks for, and how many clients of each activity run meanwhile.

    `compared` are the clients that run when the modest project counts as alone.
    """

    name: str
    what: str
    clients: Mapping[str, int]
    probe: Probe
    compared: Mapping[str, int] = field(default_factory=dict)


def answer(kind: str) -> Probe:
    """Return a probe of a short answer, to its end."""

    def probe(modest: Modest) -> Reading:
        sample = modest.ask(kind)
        return Reading(sample.total, sample.fault)

    return probe


def first_token(modest: Modest) -> Reading:
    sample = modest.ask(QUESTION)
    return Reading(sample.total if sample.first_token is None else sample.first_token, sample.fault)


def between_tokens(modest: Modest) -> Reading:
    """Return the mean time between the tokens of an answer."""
    num_tokens = 48
    sample = modest.ask(QUESTION, max_tokens=num_tokens)
    if sample.first_token is None:
        return Reading(sample.total, sample.fault)
    return Reading((sample.total - sample.first_token) / (num_tokens - 1), sample.fault)


def request(status: int, method: str, path: str, body: Callable[[], object] = lambda: None) -> Probe:
    """Return a probe of a request that must be answered with `status`."""

    def probe(modest: Modest) -> Reading:
        begun = time.monotonic()
        try:
            response = modest.request(method, path, json=body())
            fault = None if response.status_code == status else f"{response.status_code} {response.text[:100]}"
        except httpx.HTTPError as error:
            fault = type(error).__name__
        return Reading(time.monotonic() - begun, fault)

    return probe


def submission(modest: Modest) -> Reading:
    """Submit a job, which is then cancelled."""
    begun = time.monotonic()
    try:
        response = modest.request("POST", "/train", json={"name": "row", "data": code_rows(1)})
        taken = time.monotonic() - begun
        if response.status_code == 202:
            modest.request("POST", f"/train/{response.json()['id']}/cancel")
    except httpx.HTTPError as error:
        return Reading(time.monotonic() - begun, type(error).__name__)
    return Reading(taken, None if response.status_code == 202 else f"{response.status_code} {response.text[:100]}")


def _prompt_of_3150_characters() -> object:
    return {"prompt": f"{next(_numbers):06} words of it " * 150, "max_tokens": 1}


def _new_grammar() -> object:
    return {"prompt": "a", "regex": f"[a-z]{{1,5}}{next(_numbers)}", "max_tokens": 1}


FAULTS = (
    Fault("H1", "an adapter's answer; 2 streams fill the pool", {"rows": 2}, answer(ADAPTER)),
    Fault(
        "H2",
        "a prompt of 3,150 characters; 45 refused prompts of 2 MiB",
        {"refused": 45},
        request(200, "POST", "/generate", _prompt_of_3150_characters),
    ),
    Fault(
        "H3",
        "POST /train of one row; 6 dry runs of 18 MB",
        {"dryruns": 6},
        submission,
    ),
    Fault("M2", "GET /adapters; 60 refused merges", {"merges": 60}, request(200, "GET", "/adapters")),
    Fault("M2", "an adapter's answer; 60 refused merges", {"merges": 60}, answer(ADAPTER)),
    Fault(
        "L1",
        "a new grammar; 12 hard regexes",
        {"grammars": 12},
        request(200, "POST", "/generate", _new_grammar),
    ),
    Fault("1.2", "the first token of 20; a prompt of 8,000 tokens", {"prompts": 1}, first_token),
    Fault(
        "1.2",
        "the first token of 20; a prompt of 8,000 tokens and 4 streams",
        {"prompts": 1, "streams": 4},
        first_token,
    ),
    Fault(
        "1.4",
        "time between tokens; 24 streams of a regex (alone: 24 plain streams)",
        {"regex": 24},
        between_tokens,
        compared={"streams": 24},
    ),
    Fault(
        "M1", "GET /health; 2 clients send 700,000 containers", {"containers": 2}, request(200, "GET", "/health")
    ),
)


def measured(fault: Fault, home: Path, projects: Projects, time_slice: float) -> str:
    """Return a line of the table."""
    server = start(home, projects.model, time_slice)
    try:
        target = replace(projects.target, url=server.url)
        with modest_client(server, projects) as modest:
            if fault.compared:
                with running(target, fault.compared):
                    time.sleep(LEAD)
                    alone = [fault.probe(modest) for _ in range(NUM_ALONE)]
            else:
                alone = [fault.probe(modest) for _ in range(NUM_ALONE)]
            with running(target, fault.clients) as greedy:
                time.sleep(LEAD)
                begun = time.monotonic()
                beside: list[Reading] = []
                while not beside or time.monotonic() < begun + BESIDE:
                    beside.append(fault.probe(modest))
        return _line(fault.name, fault.what, _described(alone), _described(beside), greedy.counts, fault.clients)
    finally:
        server.close()


def measured_bodies(home: Path, projects: Projects, time_slice: float) -> str:
    """Measure M3: the server's memory before half-sent bodies, with them, and after they have gone."""
    server = start(home, projects.model, time_slice)
    try:
        process, target = psutil.Process(server.process.pid), replace(projects.target, url=server.url)
        with modest_client(server, projects):
            before = _resident(process)
            with running(target, {"bodies": 4}) as greedy:
                time.sleep(20)
                during = _resident(process)
            time.sleep(10)
        what = "resident memory; 400 half-sent bodies of 2 MiB"
        beside = f"{during:.0f} MiB, 10 s after them {_resident(process):.0f} MiB"
        return _line("M3", what, f"{before:.0f} MiB", beside, greedy.counts, {"bodies": 4})
    finally:
        server.close()


def measured_job(home: Path, projects: Projects, time_slice: float) -> str:
    """Measure H5: a one-step job, alone and after another project's job of a million steps has begun."""
    server = start(home, projects.model, time_slice)
    try:
        target = replace(projects.target, url=server.url)
        with modest_client(server, projects) as modest:
            alone = modest.job(JOB_PATIENCE)
            with running(target, {"job": 1}) as greedy:
                _wait_for_a_running_job(server)
                beside = modest.job(PATIENCE + time_slice)
        what = f"a one-step job; a job of a million steps (time slice {time_slice:g} s)"
        return _line("H5", what, _job(alone), _job(beside), greedy.counts, {"job": 1})
    finally:
        server.close()


def _wait_for_a_running_job(server: ServerProcess) -> None:
    deadline = time.monotonic() + PATIENCE
    while not server.client.get("/train?status=running").json()["jobs"] and time.monotonic() < deadline:
        time.sleep(0.5)


def _resident(process: psutil.Process) -> float:
    return float(process.memory_info().rss / MIB)


def _job(job: JobSample) -> str:
    return seconds(job.total) if job.status == "succeeded" else job.status


def _described(readings: Sequence[Reading]) -> str:
    times = [reading.seconds for reading in readings]
    faults = [reading.fault for reading in readings if reading.fault is not None]
    failed = f"; {len(faults)} failed: {faults[0]}" if faults else ""
    return f"median {seconds(percentile(times, 50))}, max {seconds(max(times))} of {len(times)}{failed}"


def _line(
    name: str,
    what: str,
    alone: str,
    beside: str,
    counts: Mapping[str, Mapping[str, int]],
    clients: Mapping[str, int],
) -> str:
    wanted = {activity: (ACTIVITIES[activity].wanted, 1) for activity in clients}
    achieved = "; ".join(f"{of}: {', '.join(f'{k} {n}' for k, n in counts.get(of, {}).items())}" for of in clients)
    idle = " **no effect**" if effect_faults(counts, wanted) else ""
    return f"| {name} | {what} | {alone} | {beside} | {achieved}{idle} |"
