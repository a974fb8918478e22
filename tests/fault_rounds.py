"""Rounds of SIGKILL, SIGSTOP and SIGTERM of server and workers while everything runs.

    python -m tests.fault_rounds --rounds 200

A real server on a tiny base answers, trains and publishes for two projects. Each round strikes the server, a
worker or a job's process at a random moment, and starts the server again where that ended it. In the end every job
that was accepted has ended, once; every version that is listed loads and was published once; the ledger has every
answer that ended over a second before a strike, none twice; and `smolora doctor` finds nothing.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil

from server.access.keys import Keys
from server.access.principal import OPERATOR, SCOPES
from server.database import connect
from server.doctor import examine
from server.home import Home
from server.model.base.source import resolve_base
from server.model.base.weights import load_base
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import CHILD, ENDED, WORKER, code_rows, processes, wait_until
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.tiny import NATIVE_SIZES, save_tiny_base

PROJECTS = ("acme", "other")
COUNTED_AFTER = 1.0
"""Seconds from an answer's end until a kill can't undo its count."""
MAX_UNFINISHED = 4
Victim = Literal["server", "worker", "job"]
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "end": signal.SIGTERM}


@dataclass
class Answer:
    """One that came whole, in seconds of the monotonic clock."""

    at: float
    project: str
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Rounds:
    """A server that is struck, and what its clients saw. `strikes` are moments at which it was killed."""

    home: Path
    model: Path
    rng: random.Random
    operator: str
    secrets: dict[str, str]
    server: ServerProcess
    files: list[dict[str, tuple[str, bytes]]]
    ends: threading.Event = field(default_factory=threading.Event)
    answers: list[Answer] = field(default_factory=list)
    jobs: dict[str, str] = field(default_factory=dict)  # the project of each
    published: Counter[tuple[str, str]] = field(default_factory=Counter)  # uploads that were answered 201
    strikes: list[float] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)  # tokens that answers without a reader may have had
    done: Counter[str] = field(default_factory=Counter)

    @classmethod
    def begin(cls, home: Path, seed: int) -> "Rounds":
        model = save_tiny_base(home.with_name("tiny"), "llama", NATIVE_SIZES)
        database = connect(home)
        keys = Keys(database, Home(home).keyed)
        _, operator = keys.create("operator", who=OPERATOR, scopes=SCOPES)
        secrets = {project: keys.create("test", who=OPERATOR, project=project)[1] for project in PROJECTS}
        database.dispose()
        server = start(home, model, operator)
        shape = load_base(resolve_base(str(model), home)).config.shape
        files = [as_parts(*peft_files(number, shape=shape)) for number in range(100)]
        return cls(home, model, random.Random(seed), operator, secrets, server, files)

    def post(self, project: str, path: str, **content: Any) -> httpx.Response | None:
        """The answer; None where the server wasn't there for it."""
        headers = {"Authorization": f"Bearer {self.secrets[project]}"}
        try:
            return httpx.post(f"{self.server.url}{path}", headers=headers, timeout=60, trust_env=False, **content)
        except httpx.HTTPError:
            time.sleep(0.05)
            return None

    def get(self, project: str, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.secrets[project]}"}
        response = httpx.get(f"{self.server.url}{path}", headers=headers, timeout=60, trust_env=False)
        assert response.status_code == 200, response.text
        return response.json()

    def has_ended(self, project: str, job_id: str) -> bool:
        return self.get(project, f"/train/{job_id}")["status"] in ENDED


def start(home: Path, model: Path, key: str) -> ServerProcess:
    return ServerProcess(home, key=key, model=model, workers=1, max_model_len=256, kv_cache_bytes=1 << 26)


def call(rounds: Rounds, rng: random.Random) -> None:
    """Answers, whose usage is to be in the ledger."""
    project = rng.choice(PROJECTS)
    body = {"prompt": "HTTP " * rng.randint(1, 20), "max_tokens": rng.randint(1, 20), "ignore_eos": True}
    response = rounds.post(project, "/generate", json=body)
    if response is not None and response.status_code == 200:
        usage = response.json()["usage"]
        answer = Answer(time.monotonic(), project, usage["prompt_tokens"], usage["completion_tokens"])
        rounds.answers.append(answer)
        rounds.done["answers"] += 1
    elif response is None:  # it may have ended all the same
        rounds.lost[project] += int(str(body["max_tokens"]))


def publish(rounds: Rounds, rng: random.Random) -> None:
    """Uploads under one name: each that was answered is there in the end."""
    project = rng.choice(PROJECTS)
    response = rounds.post(project, "/adapters/up", files=rng.choice(rounds.files))
    if response is not None and response.status_code == 201:
        rounds.published[project, response.json()["digest"]] += 1
        rounds.done["publishes"] += 1
    rounds.ends.wait(0.3)


def train(rounds: Rounds, rng: random.Random) -> None:
    """Jobs, a few at a time."""
    project = rng.choice(PROJECTS)
    training = {"epochs": 2, "batch_size": 4, "checkpoint_steps": 4}
    body = {"name": "codes", "data": code_rows(24), "lora": {"rank": 4}, "training": training}
    try:
        unfinished = sum(job["status"] not in ENDED for job in rounds.get(project, "/train?limit=20")["jobs"])
    except (httpx.HTTPError, AssertionError):
        unfinished = MAX_UNFINISHED
    if unfinished < MAX_UNFINISHED:
        response = rounds.post(project, "/train", json=body)
        if response is not None and response.status_code == 202:
            rounds.jobs[response.json()["id"]] = project
            rounds.done["jobs"] += 1
    rounds.ends.wait(0.5)


def strike(rounds: Rounds) -> str:
    """Somebody, somehow; the server is there again afterwards."""
    rng = rounds.rng
    how = rng.choice(list(SIGNALS))
    victim: Victim = rng.choice(["server", "server", "worker", "job"])
    module = {"worker": WORKER, "job": CHILD}.get(victim)
    struck = [psutil.Process(rounds.server.process.pid)] if module is None else processes(rounds.server, module)
    rounds.strikes.append(time.monotonic())
    for process in struck[:1]:
        process.send_signal(SIGNALS[how])
        if how == "stop":
            time.sleep(rng.uniform(0.2, 3))
            process.send_signal(signal.SIGCONT)
    if victim == "server" and how != "stop":
        rounds.server.exit_code()
        rounds.server.close()
        rounds.server = start(rounds.home, rounds.model, rounds.operator)
    return f"{how} {victim}"


def check(rounds: Rounds) -> list[str]:
    """What isn't as it must be, once everything has ended."""
    found = []
    for job_id, project in rounds.jobs.items():
        has_ended = partial(rounds.has_ended, project, job_id)
        wait_until(has_ended, 300, job_id)
        events = rounds.get(project, f"/train/{job_id}/events")
        num_ends = sum(event["message"].startswith("succeeded") for event in events)
        if (status := rounds.get(project, f"/train/{job_id}")["status"]) != "succeeded" or num_ends != 1:
            found.append(f"{job_id} is {status}, and succeeded {num_ends} times")
    for project in PROJECTS:
        listed = {adapter["name"]: adapter["versions"] for adapter in rounds.get(project, "/adapters")["adapters"]}
        made = Counter(version["job_id"] for version in listed.get("codes", []))
        if made != Counter(job for job, of in rounds.jobs.items() if of == project):
            found.append(f"versions of {project}'s jobs: {made}")
        stored = Counter((project, version["digest"]) for version in listed.get("up", []))
        missing = Counter({key: num for key, num in rounds.published.items() if key[0] == project}) - stored
        if missing:
            found.append(f"uploads of {project} that were answered and are gone: {missing}")
        for name, versions in listed.items():
            for version in versions[-5:]:
                body = {"prompt": "a", "max_tokens": 1, "adapter": f"{name}@{version['version']}"}
                response = rounds.post(project, "/generate", json=body)
                if response is None or response.status_code != 200:
                    found.append(f"{project}'s {body['adapter']} does not load")
    return found


def check_ledger(rounds: Rounds, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Between what must be counted and what may be."""
    found = []
    for project in PROJECTS:
        mine = [answer for answer in rounds.answers if answer.project == project]
        sure = [a for a in mine if not any(0 <= at - a.at <= COUNTED_AFTER for at in rounds.strikes)]
        for name in ("prompt_tokens", "completion_tokens"):
            least = sum(getattr(answer, name) for answer in sure)
            most = sum(getattr(answer, name) for answer in mine) + rounds.lost[project]
            if name == "completion_tokens" and rows[project][name] > most:
                found.append(f"{project}: {rows[project][name]} {name} in the ledger, at most {most} were made")
            if rows[project][name] < least:
                found.append(f"{project}: {rows[project][name]} {name} in the ledger, {least} were answered")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run them; 1 where something is not as it must be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="rounds-") as scratch:
        rounds = Rounds.begin(Path(scratch) / "home", options.seed)
        works: list[Callable[[Rounds, random.Random], None]] = [call, call, publish, train]

        def run(work: Callable[[Rounds, random.Random], None], seed: int) -> None:
            rng = random.Random(seed)
            while not rounds.ends.is_set():
                work(rounds, rng)

        threads = [threading.Thread(target=run, args=(work, seed)) for seed, work in enumerate(works)]
        try:
            for thread in threads:
                thread.start()
            for _ in range(options.rounds):
                time.sleep(rounds.rng.uniform(0.1, 2))
                rounds.done[strike(rounds)] += 1
            rounds.ends.set()
            for thread in threads:
                thread.join()
            time.sleep(COUNTED_AFTER)
            rows = {project: rounds.get(project, "/usage")["rows"][0] for project in PROJECTS}
            found = check_ledger(rounds, rows) + check(rounds)
            found += [f"doctor: {finding}" for finding in examine(rounds.home).findings]
        finally:
            rounds.ends.set()
            rounds.server.close()
    sys.stdout.write(json.dumps(dict(rounds.done)) + "\n")
    sys.stdout.write(("\n".join(found[:40]) or "everything is as it must be") + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
