"""Client load while servers are struck, and the conditions that must hold afterwards, for all rounds of faults."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from server.model.base.source import resolve_base
from server.model.base.weights import load_base
from server.operations.doctor import examine
from tests.end_to_end.training_client import ENDED, code_rows, wait_until
from tests.server.api.adapters.peft_files import as_parts, peft_files

PROJECTS = ("acme", "other")
COUNTED_AFTER = 1.0
"""Seconds after an answer's end until a kill can no longer lose its usage record."""
MAX_UNFINISHED = 4
Files = dict[str, tuple[str, bytes]]


@dataclass
class Answer:
    """A complete answer, with times in seconds of the monotonic clock."""

    at: float
    project: str
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Load:
    """The clients of a server, and what they observed. `strikes` are the moments of kills."""

    rng: random.Random
    secrets: dict[str, str]
    files: list[Files]
    url: Callable[[], str]  # of the server, or of one of several
    ends: threading.Event = field(default_factory=threading.Event)
    answers: list[Answer] = field(default_factory=list)
    jobs: dict[str, str] = field(default_factory=dict)  # project by job
    published: Counter[tuple[str, str]] = field(default_factory=Counter)  # uploads answered with 201
    strikes: list[float] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)  # tokens that unread answers may have had
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # unacceptable answers

    def post(self, project: str, path: str, **content: Any) -> httpx.Response | None:
        """Return the response, or None if the server wasn't reachable."""
        headers = {"Authorization": f"Bearer {self.secrets[project]}"}
        try:
            response = httpx.post(f"{self.url()}{path}", headers=headers, timeout=60, trust_env=False, **content)
        except httpx.HTTPError:
            time.sleep(0.05)
            return None
        if response.status_code == 500:
            self.wrong.append(f"{path} was answered 500: {response.text[:300]}")
        return response

    def get(self, project: str, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.secrets[project]}"}
        response = httpx.get(f"{self.url()}{path}", headers=headers, timeout=60, trust_env=False)
        assert response.status_code == 200, response.text
        return response.json()

    def has_ended(self, project: str, job_id: str) -> bool:
        return self.get(project, f"/train/{job_id}")["status"] in ENDED

    def all_jobs(self, project: str) -> list[str]:
        """Return all accepted jobs, including those whose response was lost."""
        found, after = [], ""
        while True:
            page = self.get(project, f"/train?limit=100{after}")
            found += [job["id"] for job in page["jobs"]]
            if page["next"] is None:
                return found
            after = f"&after={page['next']}"

    def answered(self, project: str, usage: dict[str, int]) -> None:
        """Record a complete answer."""
        self.answers.append(Answer(time.monotonic(), project, usage["prompt_tokens"], usage["completion_tokens"]))
        self.done["answers"] += 1


Work = Callable[[Load, random.Random], None]


def random_files(model: Path, home: Path, number: int = 100) -> list[Files]:
    """Return random adapters for the base."""
    shape = load_base(resolve_base(str(model), home)).config.shape
    return [as_parts(*peft_files(seed, shape=shape)) for seed in range(number)]


@contextmanager
def under_load(load: Load, works: list[Work]) -> Iterator[None]:
    """Repeat each of `works` concurrently during the block."""

    def run(work: Work, seed: int) -> None:
        rng = random.Random(seed)
        while not load.ends.is_set():
            work(load, rng)

    with ThreadPoolExecutor(len(works)) as pool:
        running = [pool.submit(run, work, seed) for seed, work in enumerate(works)]
        try:
            yield
        finally:
            load.ends.set()
        for one in running:
            one.result()


def call(load: Load, rng: random.Random) -> None:
    """Request answers whose usage must be in the ledger."""
    project = rng.choice(PROJECTS)
    body = {"prompt": "HTTP " * rng.randint(1, 20), "max_tokens": rng.randint(1, 20), "ignore_eos": True}
    response = load.post(project, "/generate", json=body)
    if response is not None and response.status_code == 200:
        load.answered(project, response.json()["usage"])
    elif response is None or response.status_code >= 500:  # it may still have ended, or generated a part
        load.lost[project] += int(str(body["max_tokens"]))


def publish(load: Load, rng: random.Random) -> None:
    """Upload versions of one name. Every acknowledged version must exist at the end."""
    project = rng.choice(PROJECTS)
    response = load.post(project, "/adapters/up", files=rng.choice(load.files))
    if response is not None and response.status_code == 201:
        load.published[project, response.json()["digest"]] += 1
        load.done["publishes"] += 1
    load.ends.wait(0.3)


def train(load: Load, rng: random.Random) -> None:
    """Submit jobs, a few at a time."""
    project = rng.choice(PROJECTS)
    training = {"epochs": 2, "batch_size": 4, "checkpoint_steps": 4}
    body = {"name": "codes", "data": code_rows(24), "lora": {"rank": 4}, "training": training}
    try:
        unfinished = sum(job["status"] not in ENDED for job in load.get(project, "/train?limit=20")["jobs"])
    except (httpx.HTTPError, AssertionError):
        unfinished = MAX_UNFINISHED
    if unfinished < MAX_UNFINISHED:
        response = load.post(project, "/train", json=body)
        if response is not None and response.status_code == 202:
            load.jobs[response.json()["id"]] = project
            load.done["jobs"] += 1
    load.ends.wait(0.5)


def check(load: Load) -> list[str]:
    """Return all violated conditions, once everything has ended."""
    found: list[str] = []
    accepted = {job_id: project for project in PROJECTS for job_id in load.all_jobs(project)}
    found += [f"{job_id} was accepted and is gone" for job_id in load.jobs.keys() - accepted]
    for job_id, project in accepted.items():
        has_ended = partial(load.has_ended, project, job_id)
        wait_until(has_ended, 300, job_id)
        events = load.get(project, f"/train/{job_id}/events")
        num_ends = sum(event["message"].startswith("succeeded") for event in events)
        if (status := load.get(project, f"/train/{job_id}")["status"]) != "succeeded" or num_ends != 1:
            found.append(f"{job_id} is {status}, and succeeded {num_ends} times")
    for project in PROJECTS:
        listed = {adapter["name"]: adapter["versions"] for adapter in load.get(project, "/adapters")["adapters"]}
        made = Counter(version["job_id"] for version in listed.get("codes", []))
        if made != Counter(job for job, of in accepted.items() if of == project):
            found.append(f"versions of {project}'s jobs: {made}")
        stored = Counter((project, version["digest"]) for version in listed.get("up", []))
        missing = Counter({key: num for key, num in load.published.items() if key[0] == project}) - stored
        if missing:
            found.append(f"uploads of {project} that were answered and are gone: {missing}")
        for name, versions in listed.items():
            for version in versions[-5:]:
                body = {"prompt": "a", "max_tokens": 1, "adapter": f"{name}@{version['version']}"}
                response = load.post(project, "/generate", json=body)
                if response is None or response.status_code != 200:
                    found.append(f"{project}'s {body['adapter']} does not load")
    return found


def diagnosed(home: Path, seconds: float = 30) -> list[str]:
    """Return what `smolora doctor` finds on an idle server, after threads have removed unreferenced files."""
    deadline = time.monotonic() + seconds
    while (findings := examine(home).findings) and time.monotonic() < deadline:
        time.sleep(0.5)
    return [f"doctor: {finding}" for finding in findings]


def check_ledger(load: Load, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return the counts that lie outside the possible range."""
    found = []
    for project in PROJECTS:
        mine = [answer for answer in load.answers if answer.project == project]
        sure = [a for a in mine if not any(0 <= at - a.at <= COUNTED_AFTER for at in load.strikes)]
        for name in ("prompt_tokens", "completion_tokens"):
            least = sum(getattr(answer, name) for answer in sure)
            most = sum(getattr(answer, name) for answer in mine) + load.lost[project]
            if name == "completion_tokens" and rows[project][name] > most:
                found.append(f"{project}: {rows[project][name]} {name} in the ledger, at most {most} were made")
            if rows[project][name] < least:
                found.append(f"{project}: {rows[project][name]} {name} in the ledger, {least} were answered")
    return found
