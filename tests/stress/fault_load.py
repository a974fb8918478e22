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
from tests.stress.audit import Log, Published, Ran, Took, audit

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
    log: Log = field(default_factory=Log)
    strikes: list[float] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)  # tokens that unread answers may have had
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # unacceptable answers

    def post(self, project: str, path: str, **content: Any) -> httpx.Response | None:
        """Return the response, or None if the server wasn't reachable."""
        headers = {"Authorization": f"Bearer {self.secrets[project]}"}
        begun = time.monotonic()
        try:
            response = httpx.post(
                f"{self.url()}{path}", headers=headers, timeout=self.log.deadline, trust_env=False, **content
            )
        except httpx.HTTPError:
            time.sleep(0.05)
            return None
        finally:
            self.log.requests.append(Took(path, time.monotonic() - begun))
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
        return [job["id"] for job in self.pages(project, "/train?limit=100", "jobs")]

    def all_versions(self, project: str, name: str) -> list[dict[str, Any]]:
        """Return all versions of an adapter, oldest first."""
        found = self.pages(project, f"/adapters/{name}?limit=100", "versions")
        return sorted(found, key=lambda version: version["version"])

    def pages(self, project: str, path: str, field: str) -> list[dict[str, Any]]:
        """Return what all pages of a list have in `field`."""
        found, after = [], ""
        while True:
            page = self.get(project, path + after)
            found += page[field]
            if page.get("next") is None:  # one adapter has the field only if there are more pages
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
        version = response.json()
        load.log.acknowledged.append(Published(project, "up", version["version"], version["digest"]))
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
    log = load.log
    log.submitted = list(load.jobs)
    accepted = {job_id: project for project in PROJECTS for job_id in load.all_jobs(project)}
    for job_id, project in accepted.items():
        has_ended = partial(load.has_ended, project, job_id)
        wait_until(has_ended, 300, job_id)
        events = load.get(project, f"/train/{job_id}/events")
        num_ends = sum(event["message"].startswith("succeeded") for event in events)
        log.jobs.append(Ran(project, job_id, load.get(project, f"/train/{job_id}")["status"], num_ends))
    for project in PROJECTS:
        names = [adapter["name"] for adapter in load.get(project, "/adapters")["adapters"]]
        listed = {name: load.all_versions(project, name) for name in names}
        log.job_versions += [(project, version["job_id"]) for version in listed.get("codes", [])]
        for version in listed.get("up", []):
            log.stored.append(Published(project, "up", version["version"], version["digest"]))
        for name, versions in listed.items():
            for version in versions[-5:]:
                body = {"prompt": "a", "max_tokens": 1, "adapter": f"{name}@{version['version']}"}
                response = load.post(project, "/generate", json=body)
                if response is None or response.status_code != 200:
                    found.append(f"{project}'s {body['adapter']} does not load")
    return found + audit(log)


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
