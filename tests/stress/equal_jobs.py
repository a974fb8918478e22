"""A real server on which equal jobs train, and the results that every job must leave however it was disturbed.

`tests.stress.kill_nine` and `tests.stress.pauses` disturb the jobs. The first job runs undisturbed; all others
must end with the same bytes, events and numbers. Both bases take the default path, which is native if possible.
"""

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from adapters.store.store import AdapterStore
from server.model.base.source import EMBEDDED, resolve_base
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import CHILD, ENDED, code_rows, get, processes, submit, succeeded
from tests.kits.cache import CACHE
from tests.kits.native import has_native
from tests.kits.tiny import NATIVE_SIZES, save_tiny_base

Base = Literal["tiny", "real"]
NAME = "codes"
NUM_ROWS = 48
TRAINING: Mapping[Base, Mapping[str, object]] = {
    "tiny": {"epochs": 10, "batch_size": 4, "eval_steps": 3, "checkpoint_steps": 10, "learning_rate": 1e-2},
    "real": {"epochs": 4, "batch_size": 8, "eval_steps": 3, "checkpoint_steps": 2, "learning_rate": 3e-3},
}
TIMES = ("wall_seconds", "tokens_per_second", "peak_memory_bytes")
"""Report fields of time and memory, which differ between any two jobs."""
PATIENCE = 600.0
"""Seconds for a job to end once it is no longer disturbed."""


@dataclass
class TrainingServer:
    """A server that may be killed, and its jobs."""

    base: Base
    home: Path
    model: Path
    rng: random.Random
    server: ServerProcess
    expected: Mapping[str, Any] = field(default_factory=dict)  # the result of the undisturbed job
    num_steps: int = 0  # of the undisturbed job
    seconds: float = 0.0
    jobs: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, base: Base, home: Path, seed: int = 0) -> "TrainingServer":
        """Start a server and run one job undisturbed."""
        model = resolve_base(EMBEDDED, CACHE) if base == "real" else tiny_base(home)
        training = cls(base, home, model, random.Random(seed), start(home, model))
        try:
            job = succeeded(training.server, training.submit(), PATIENCE)
            training.expected = training.left_by(job["id"])
        except BaseException:
            training.server.close()
            raise
        computed_by = training.expected["report"]["environment"]["computed_by"]
        assert (computed_by == ["torch"]) is not has_native(), f"computed by {computed_by}"
        started, finished = (datetime.fromisoformat(job[key]) for key in ("started_at", "finished_at"))
        training.num_steps, training.seconds = job["progress"]["total_steps"], (finished - started).total_seconds()
        return training

    @property
    def digest(self) -> str:
        """The digest that each job publishes."""
        return str(self.expected["adapter"]["digest"])

    def submit(self) -> str:
        """Another job, the same as all others."""
        rows = code_rows(NUM_ROWS)  # held out, too, so that there are enough for a verdict
        body = {"name": NAME, "data": rows, "lora": {"rank": 4}, "validation": rows, "publish_if": "improves_base"}
        self.jobs.append(submit(self.server, **body, training=TRAINING[self.base]))
        return self.jobs[-1]

    def running(self, after_attempt: int = 0) -> int:
        """Wait until a process works on a later attempt of the last job, or on another job; return that
        process."""
        while True:
            job = get(self.server, f"/train/{self.jobs[-1]}")
            if job["status"] in ENDED:
                self.submit()
                after_attempt = 0
            elif job["status"] == "running" and job["attempt"] > after_attempt and processes(self.server, CHILD):
                return int(job["attempt"])
            time.sleep(0.05)

    def restart(self) -> None:
        """Start the server again after its death."""
        self.server.close()
        self.server = start(self.home, self.model)

    def left_by(self, job_id: str) -> dict[str, Any]:
        """Return bytes, events and numbers of a succeeded job, without times and job ids."""
        job, report = get(self.server, f"/train/{job_id}"), get(self.server, f"/train/{job_id}/report")
        events = get(self.server, f"/train/{job_id}/events")
        progress = {key: value for key, value in job["progress"].items() if key not in TIMES}
        return {
            "adapter": job["adapter"] and {key: job["adapter"][key] for key in ("name", "digest")},
            "progress": progress,
            "metrics": job["metrics"],
            "report": {key: _without_latest(value) for key, value in report.items() if key not in TIMES},
            "events": [(event["message"], event["data"]) for event in events if event["type"] == "metrics"],
        }

    def check(self) -> None:
        """Raise AssertionError if a job differs from the undisturbed one, or was published more than once."""
        for job_id in self.jobs:
            succeeded(self.server, job_id, PATIENCE)
            found = self.left_by(job_id)
            for key, value in self.expected.items():
                assert found[key] == value, (
                    f"{job_id} ended with other {key}: {_first_difference(found[key], value)}"
                )
        steps = [data["step"] for _, data in self.expected["events"]]
        assert steps == list(range(1, self.num_steps + 1))
        versions = get(self.server, f"/adapters/{NAME}")["versions"]
        assert sorted(version["job_id"] for version in versions) == sorted(self.jobs)
        AdapterStore(self.home / "adapters").verify(self.digest)


def tiny_base(directory: Path) -> Path:
    """Save and return a base of sizes that native code supports."""
    return save_tiny_base(directory / "tiny", "llama", NATIVE_SIZES)


def start(home: Path, model: Path) -> ServerProcess:
    return ServerProcess(home, model=model, workers=1, max_model_len=256, kv_cache_bytes=1 << 26)


def _first_difference(found: Any, expected: Any) -> str:
    """Return the first difference between two lists or objects."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in expected:
            if found.get(key) != expected[key]:
                return f"{key}: {_first_difference(found.get(key), expected[key])}"
    if isinstance(expected, list) and isinstance(found, list):
        if len(found) != len(expected):
            return f"{len(found)} in the place of {len(expected)}"
        for ours, theirs in zip(found, expected, strict=True):
            if ours != theirs:
                return _first_difference(ours, theirs)
    return f"{found} in the place of {expected}"


def _without_latest(found: Any) -> Any:
    """A report's value without the measurements of the version before, which is another one for each job."""
    if isinstance(found, dict):
        return {key: _without_latest(value) for key, value in found.items() if key != "latest"}
    return found
