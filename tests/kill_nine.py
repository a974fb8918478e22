"""kill -9 of workers and servers at random moments; every job ends as one that nobody disturbed.

    python -m tests.kill_nine --worker 20 --server 5 --base tiny

A real server trains on the base. Each kill strikes a running attempt, at a moment drawn from the time that an
undisturbed job takes; a job that ends before is followed by another one. Nobody helps: a killed worker is started
again by its server, a killed server by whoever keeps machines running, here this program. In the end each job has
succeeded, has exactly one version, and that version's bytes are those of the undisturbed job.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

import psutil

from adapters.store import AdapterStore
from server.model.embedded import EMBEDDED
from server.model.source import resolve_base
from tests.conftest import CACHE
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import (
    CHILD,
    ENDED,
    WORKER,
    code_rows,
    get,
    processes,
    steps_of,
    submit,
    succeeded,
    wait_until,
)
from tests.tiny import save_tiny_base

Victim = Literal["worker", "server"]
Base = Literal["tiny", "real"]
NAME = "codes"
TRAINING: Mapping[Base, Mapping[str, object]] = {
    "tiny": {"epochs": 20, "batch_size": 4, "eval_steps": 40, "checkpoint_steps": 10, "learning_rate": 1e-2},
    "real": {"epochs": 4, "batch_size": 8, "eval_steps": 8, "checkpoint_steps": 2, "learning_rate": 3e-3},
}
NUM_ROWS = 48


@dataclass
class Drill:
    """A server that may be killed, and the jobs that were given to it."""

    base: Base
    home: Path
    model: Path
    rng: random.Random
    server: ServerProcess
    digest: str = ""  # of what the undisturbed job published
    num_steps: int = 0  # that it took
    seconds: float = 0.0
    jobs: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, base: Base, home: Path, seed: int = 0) -> "Drill":
        """A server, and on it one job that nothing disturbs."""
        model = resolve_base(EMBEDDED, CACHE) if base == "real" else save_tiny_base(home / "tiny-llama")
        drill = cls(base, home, model, random.Random(seed), _start(home, model))
        try:
            job = succeeded(drill.server, drill.submit(), 600)
        except BaseException:
            drill.server.close()
            raise
        started, finished = (datetime.fromisoformat(job[key]) for key in ("started_at", "finished_at"))
        drill.digest, drill.num_steps = job["adapter"]["digest"], job["progress"]["total_steps"]
        drill.seconds = (finished - started).total_seconds()
        return drill

    def submit(self) -> str:
        """Another job, the same as all others."""
        body = {"name": NAME, "data": code_rows(NUM_ROWS), "lora": {"rank": 4}, "validation": 0.2}
        self.jobs.append(submit(self.server, **body, training=TRAINING[self.base]))
        return self.jobs[-1]

    def kill(self, victim: Victim, alone: bool, after_attempt: int = 0) -> float:
        """Kill it in the middle of a later attempt at the last job; how many seconds after the attempt's start."""
        job_id, attempt = self.jobs[-1], after_attempt
        while True:
            job = get(self.server, f"/train/{job_id}")
            if job["status"] in ENDED:
                job_id, attempt = self.submit(), 0
            elif job["status"] == "running" and job["attempt"] > attempt and processes(self.server, CHILD):
                attempt = job["attempt"]
                moment = self.rng.uniform(0, self.seconds)
                time.sleep(moment)
                if get(self.server, f"/train/{job_id}")["status"] == "running":
                    break
            time.sleep(0.05)
        if victim == "worker":
            self._kill_worker(alone)
        else:
            self._kill_server(alone)
        return moment

    def check(self) -> None:
        """AssertionError where a job isn't as the undisturbed one, or was published more than once."""
        steps = list(range(1, self.num_steps + 1))
        for job_id in self.jobs:
            job = succeeded(self.server, job_id, 600)
            assert job["adapter"]["digest"] == self.digest, f"{job_id} ended in other bytes"
            assert steps_of(self.server, job_id) == steps, f"{job_id} has steps twice, or not at all"
        versions = get(self.server, f"/adapters/{NAME}")["versions"]
        assert sorted(version["job_id"] for version in versions) == sorted(self.jobs)
        AdapterStore(self.home / "adapters").verify(self.digest)

    def _kill_worker(self, alone: bool) -> None:
        doomed = processes(self.server, WORKER) + processes(self.server, CHILD)
        for process in processes(self.server, WORKER) if alone else doomed:
            process.send_signal(signal.SIGKILL)
        _wait_for_death(doomed)

    def _kill_server(self, alone: bool) -> None:
        doomed = psutil.Process(self.server.process.pid).children(recursive=True)
        if alone:
            self.server.process.send_signal(signal.SIGKILL)
            self.server.process.wait()
        else:
            self.server.kill()
        _wait_for_death(doomed)
        self.server.close()
        self.server = _start(self.home, self.model)


def _start(home: Path, model: Path) -> ServerProcess:
    return ServerProcess(home, model=model, workers=1, max_model_len=256, kv_cache_bytes=1 << 26)


def _wait_for_death(doomed: Sequence[psutil.Process]) -> None:
    """Whoever was killed, or depends on who was, dies at once; somebody reaps it soon."""
    wait_until(lambda: not any(map(_is_alive, doomed)), 10, "dying")


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_at_random(base: Base, home: Path, victims: Sequence[Victim], seed: int = 0) -> str:
    """Kill one after the other, every second one alone; what was seen, in a line. AssertionError as `check`."""
    drill = Drill.begin(base, home, seed)
    started = time.monotonic()
    try:
        for number, victim in enumerate(victims):
            moment = drill.kill(victim, alone=number % 2 == 0)
            sys.stdout.write(f"kill {number + 1}: {victim}, {moment:.1f} s into an attempt at {drill.jobs[-1]}\n")
            sys.stdout.flush()
        drill.check()
    finally:
        drill.server.close()
    return (
        f"{base} base: {victims.count('worker')} workers and {victims.count('server')} servers killed during "
        f"{len(drill.jobs) - 1} jobs of {drill.seconds:.1f} s, in {time.monotonic() - started:.0f} s: "
        f"all succeeded, one version each, all of digest {drill.digest[:16]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=int, default=20, help="how many workers to kill")
    parser.add_argument("--server", type=int, default=5, help="how many servers to kill")
    parser.add_argument("--base", choices=("tiny", "real"), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    killed: list[tuple[Victim, int]] = [("worker", arguments.worker), ("server", arguments.server)]
    victims = [victim for victim, count in killed for _ in range(count)]
    random.Random(arguments.seed).shuffle(victims)
    with tempfile.TemporaryDirectory() as directory:
        said = kill_at_random(arguments.base, Path(directory), victims, arguments.seed)
    sys.stdout.write(f"{said}\n")


if __name__ == "__main__":
    main()
