"""A busy day in short: `python -m tests.stress.soak --minutes 30 --chart soak.png`, or `make soak`.

A real server on the real base serves projects that publish, train, delete, disconnect and lose their keys, all at
once, while its memory, descriptors, threads and cache are sampled. After a warm-up nothing may grow, at the end no
resource may be held, and no answer may be unexpected.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from server.access.keys import Keys
from server.access.principal import OPERATOR, SCOPES
from server.database import connect
from server.model.base.source import EMBEDDED, resolve_base
from server.model.base.weights import load_base
from server.storage.home import Home
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import code_rows
from tests.kits.cache import CACHE
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.stress.fault_load import diagnosed

PROJECTS = ("default", "acme", "other")
NUM_CALLERS = 6
LEFT_OUT = 1 / 3
"""Warm-up as a share of the time: caches fill."""
MIB = 1 << 20
GROWTH = 32 * MIB
"""Allowed growth of resident memory between the middle and the last third; allocators keep memory once needed."""
LONG = 600.0
"""Seconds after which memory must be constant."""
EXPECTED = frozenset({200, 201, 202, 204, 404, 409, 429})
REVOKED_SECONDS = 5.0
"""Seconds until a stream whose key was revoked must end, on a busy machine."""


@dataclass
class Sample:
    """Measurements at one moment, in seconds from the start."""

    at: float
    rss: int  # bytes: the server's own process, without its workers
    descriptors: int
    threads: int
    kv_blocks_used: int
    waiting: int
    answer_seconds: float  # for a request of three tokens


@dataclass
class Soak:
    """A run. `faults` are unexpected events."""

    server: ServerProcess
    files: Sequence[dict[str, tuple[str, bytes]]]
    secrets: dict[str, str]
    ends: threading.Event = field(default_factory=threading.Event)
    samples: list[Sample] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str, response: httpx.Response | None = None) -> None:
        with self.lock:
            self.counts[what] += 1
            if response is not None and response.status_code not in EXPECTED:
                self.faults.append(f"{what}: {response.status_code} {response.text[:200]}")

    def client(self, secret: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {secret}"}
        return httpx.Client(base_url=self.server.url, headers=headers, timeout=120, trust_env=False)

    def run(self, work: Callable[["Soak", random.Random], None], seed: int) -> None:
        """Repeat `work` until the end; an exception is a fault."""
        rng = random.Random(seed)
        while not self.ends.is_set():
            try:
                work(self, rng)
            except Exception as error:
                with self.lock:
                    self.faults.append(f"{work.__name__}: {type(error).__name__}: {error}")
                time.sleep(1)


def call(soak: Soak, rng: random.Random) -> None:
    """Send a request of some project: whole, streamed, or abandoned halfway."""
    with soak.client(soak.secrets[rng.choice(PROJECTS)]) as client:
        adapter = rng.choice(["base", "a", "b", "a*0.5+b*0.5", "acme/shared"])
        body: dict[str, Any] = {"prompt": "HTTP 404 means " * rng.randint(1, 40), "adapter": adapter}
        body |= {"max_tokens": rng.randint(1, 48), "ignore_eos": True}
        if rng.random() < 0.5:
            soak.count("answers", client.post("/generate", json=body))
            return
        with client.stream("POST", "/generate", json=body | {"stream": True, "max_tokens": 96}) as response:
            lines = response.iter_lines()
            if rng.random() < 0.4:
                next(lines, None)
                soak.count("disconnects")
                return
            last = [line for line in lines if line][-1]
            soak.count("streams", response if response.status_code != 200 else None)
            if response.status_code == 200 and last != "data: [DONE]":
                raise AssertionError(f"a stream ended with {last[:200]}")


def publish(soak: Soak, rng: random.Random) -> None:
    """Publish a new version of one of two names, and delete old ones."""
    with soak.client(soak.secrets[project := rng.choice(PROJECTS)]) as client:
        name = rng.choice("ab")
        made = client.post(f"/adapters/{name}", files=rng.choice(soak.files))
        soak.count("publishes", made)
        if project == "acme":
            client.post("/adapters/shared", files=rng.choice(soak.files))
            soak.count("shares", client.put("/adapters/shared/visibility", json={"visibility": "public"}))
        for adapter in (name, *(["shared"] if project == "acme" else [])):
            versions = client.get(f"/adapters/{adapter}").json()["versions"]
            for version in versions[:-2]:
                soak.count("deletes", client.delete(f"/adapters/{adapter}/{version['version']}"))
    soak.ends.wait(rng.uniform(0.5, 2))


def train(soak: Soak, rng: random.Random) -> None:
    """Run a job of two steps to its end; delete its files and its adapter."""
    with soak.client(soak.secrets[rng.choice(PROJECTS)]) as client:
        body = {"name": "trained", "data": code_rows(24), "training": {"max_steps": 2}, "lora": {"rank": 4}}
        job = client.post("/train", json=body)
        soak.count("jobs", job)
        path = f"/train/{job.json()['id']}"
        while (status := client.get(path).json()["status"]) in ("queued", "running") and not soak.ends.is_set():
            time.sleep(0.5)
        if status == "failed":
            raise AssertionError(client.get(path).text)
        if status == "succeeded":
            client.delete(path)
            client.delete("/adapters/trained")
    soak.ends.wait(rng.uniform(1, 5))


def revoke(soak: Soak, rng: random.Random) -> None:
    """Create a key, start a long stream with it, and revoke the key: the stream must end."""
    operator = soak.server.client
    key = operator.post("/keys", json={"name": "short", "project": rng.choice(PROJECTS)}).json()
    with soak.client(key["secret"]) as client:
        body = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/generate", json=body) as response:
            lines = response.iter_lines()
            next(lines, None)
            start = time.monotonic()
            operator.delete(f"/keys/{key['id']}")
            notices = [line for line in lines if "revoked" in line]
            took = time.monotonic() - start
        soak.count("revocations")
        if response.status_code == 200 and (not notices or took > REVOKED_SECONDS):
            raise AssertionError(f"a revoked key's stream went on for {took:.1f} s, with the notices {notices}")
        if client.get("/adapters").status_code != 401:
            raise AssertionError("a revoked key opened something")
    soak.ends.wait(rng.uniform(1, 4))


def look(soak: Soak, process: psutil.Process, started: float) -> None:
    """Take a sample."""
    begun = time.perf_counter()
    soak.count("looks", soak.server.client.post("/generate", json={"prompt": "Hello", "max_tokens": 3}))
    took = time.perf_counter() - begun
    metrics = soak.server.metrics()
    used, waiting = (int(metrics[f"smolora_{name}"]) for name in ("kv_blocks_used", "requests_waiting"))
    with process.oneshot():
        sample = Sample(
            time.monotonic() - started,
            process.memory_info().rss,
            process.num_fds(),
            process.num_threads(),
            used,
            waiting,
            took,
        )
    soak.samples.append(sample)


def judge(soak: Soak, idle: Sample) -> list[str]:
    """Return what grew, and what is still held once nothing runs."""
    last = soak.samples[-1].at
    thirds = [
        [sample for sample in soak.samples if first * last <= sample.at <= first * last + last / 3]
        for first in (LEFT_OUT, 1 - LEFT_OUT)
    ]
    found = list(soak.faults)
    bounds = {"descriptors": 16, "threads": 4}
    if last >= LONG:  # earlier, the cache is still touched for the first time
        bounds["rss"] = GROWTH
    for name, most in bounds.items():
        middle, end = (statistics.median(getattr(sample, name) for sample in third) for third in thirds)
        if end - middle > most:
            found.append(f"{name} grew from {middle:.0f} to {end:.0f}")
    if idle.kv_blocks_used or idle.waiting:
        found.append(f"at the end {idle.kv_blocks_used} blocks are held, and {idle.waiting} requests wait")
    return found


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Draw a chart of four lines over the minutes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4, 1, figsize=(8, 9), sharex=True, layout="constrained")
    minutes = [sample.at / 60 for sample in samples]
    lines: Sequence[tuple[str, Callable[[Sample], float]]] = (
        ("resident memory, MiB", lambda sample: sample.rss / MIB),
        ("descriptors and threads", lambda sample: sample.descriptors),
        ("blocks of keys and values in use", lambda sample: sample.kv_blocks_used),
        ("seconds for three tokens", lambda sample: sample.answer_seconds),
    )
    for axis, (title, value) in zip(axes, lines, strict=True):
        axis.plot(minutes, [value(sample) for sample in samples], label="descriptors")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylim(bottom=0)
    axes[1].plot(minutes, [sample.threads for sample in samples], label="threads")
    axes[1].legend(fontsize=8)
    axes[-1].set_xlabel("minutes")
    figure.savefig(path, dpi=110)


def prepared(home: Path) -> tuple[ServerProcess, dict[str, str], list[dict[str, tuple[str, bytes]]]]:
    """Start a server with keys, one per project, and adapters to publish."""
    model = resolve_base(EMBEDDED, CACHE)
    database = connect(home)
    keys = Keys(database, Home(home).keyed)
    _, operator = keys.create("operator", who=OPERATOR, scopes=SCOPES)
    secrets = {project: keys.create("soak", who=OPERATOR, project=project)[1] for project in PROJECTS}
    database.dispose()
    server = ServerProcess(home, key=operator, model=model, workers=1)
    shape = load_base(model).config.shape
    files = [as_parts(*peft_files(seed, rank=4, shape=shape)) for seed in range(6)]
    for secret in secrets.values():
        headers = {"Authorization": f"Bearer {secret}"}
        for name in ("a", "b", "shared"):
            httpx.post(f"{server.url}/adapters/{name}", files=files[0], headers=headers, timeout=120)
    return server, secrets, files


def main(arguments: list[str] | None = None) -> int:
    """Run the soak test. Return 1 if anything grew, was held or went wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--chart", type=Path, help="where to draw it")
    parser.add_argument("--out", type=Path, help="where to write all samples as JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        home = Path(scratch) / "home"
        server, secrets, files = prepared(home)
        try:
            soak = Soak(server, files, secrets)
            works = [call] * NUM_CALLERS + [publish, train, revoke]
            threads = [threading.Thread(target=soak.run, args=(work, seed)) for seed, work in enumerate(works)]
            process, started = psutil.Process(server.process.pid), time.monotonic()
            for thread in threads:
                thread.start()
            while time.monotonic() - started < 60 * options.minutes:
                look(soak, process, started)
                time.sleep(min(5.0, options.minutes))
            soak.ends.set()
            for thread in threads:
                thread.join()
            server.wait_until_idle()
            look(soak, process, started)
            idle = soak.samples.pop()
            found = judge(soak, idle)
            found += diagnosed(home)
            if "Traceback" in server.log():
                found.append(server.log()[-2000:])
        finally:
            server.close()
    if options.chart:
        draw(soak.samples, options.chart)
    if options.out:
        options.out.write_text(json.dumps([asdict(sample) for sample in soak.samples]), encoding="utf-8")
    shown = [dict(soak.counts), *(asdict(soak.samples[number]) for number in (0, len(soak.samples) // 2, -1))]
    said = [*map(json.dumps, shown), "\n".join(found[:40]) or "nothing grew, and nothing is held"]
    sys.stdout.write("\n".join(said) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
