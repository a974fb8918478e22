"""Each alert is caused on a real server, which a real Prometheus scrapes.

The alerts are those of docker/monitoring with shorter times. A cause is repeated until its alert fires, so the
speed of the machine doesn't matter. tests/test_monitoring.py has the exact thresholds and times, on series.
"""

import os
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import sqlalchemy as sa

from server.database import connect
from server.jobs.tables import Status, jobs
from server.storage.home import Home
from tests.end_to_end.conftest import AdapterFiles
from tests.end_to_end.peft_reference import WEIGHTS
from tests.end_to_end.prometheus_process import Prometheus, needs_prometheus
from tests.end_to_end.server_process import PATIENCE, ServerProcess, command, environment
from tests.end_to_end.training_client import code_rows, get, submit, wait_until
from tests.kits.monitoring import ALERTS, alerts
from tests.kits.small_disk import FILLING, fill, mounted

pytestmark = [pytest.mark.thorough, needs_prometheus]

OPERATOR = "operators-0123456789"
SECONDS = 300.0
"""The time within which a repeated cause must raise its alert."""
NOT_CAUSED = {
    "SmoloraFallback": "needs a GPU whose kernels fail the check at the start",
    "SmoloraMemoryGrows": "needs a server that leaks for a day",
}
"""Alerts that only have series, and why."""
_RANGES = {"5m": "10s", "10m": "30s", "1h": "10m", "6h": "1m", "1d": "1m"}

Cause = Callable[[ServerProcess], object]


def hurried(rules: str) -> str:
    """Return the alerts with shorter ranges, and nearly without `for`."""
    rules = re.sub(r"\[(\w+)\]", lambda found: f"[{_RANGES[found[1]]}]", rules)
    return re.sub(r"for: \w+", "for: 1s", rules)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), OPERATOR, hurried(ALERTS.read_text()))
    yield prometheus
    prometheus.close()


@contextmanager
def scraped(server: ServerProcess, prometheus: Prometheus) -> Iterator[ServerProcess]:
    try:
        prometheus.scrape(server)
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def narrow(
    converted_tiny: Path, prometheus: Prometheus, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Start a server without workers, whose batch, queue and cache are soon full. Its project acme has a job."""
    home = tmp_path_factory.mktemp("narrow")
    flags: dict[str, Any] = {"max_num_seqs": 4, "max_queue": 1, "kv_cache_bytes": "1MiB", "queue_timeout": 60}
    server = ServerProcess(home, OPERATOR, model=converted_tiny, dtype="fp32", api_keys=OPERATOR, **flags)
    assert server.client.put("/projects/acme", json={"max_jobs": 1}).status_code == 200
    job = {"name": "codes", "data": code_rows(8)}
    submitted = server.client.post("/train", json=job, headers={"OpenAI-Project": "acme"})
    assert submitted.status_code == 202, submitted.text
    with scraped(server, prometheus):
        yield server


@pytest.fixture(scope="module")
def working(
    converted_tiny: Path, prometheus: Prometheus, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Start a server with a worker. It ends long requests soon."""
    home = tmp_path_factory.mktemp("working")
    server = ServerProcess(home, model=converted_tiny, dtype="fp32", workers=1, request_timeout=1)
    with scraped(server, prometheus):
        yield server


@pytest.fixture(scope="module")
def small(
    converted_tiny: Path, prometheus: Prometheus, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Start a server on a small disk."""
    with mounted(tmp_path_factory.mktemp("small"), megabytes=400) as disk:
        server = ServerProcess(disk / "home", model=converted_tiny, dtype="fp32", min_free_bytes="20MiB")
        with scraped(server, prometheus):
            yield server


@pytest.fixture(scope="module")
def slow(
    base_dir: Path,
    adapter_files: AdapterFiles,
    prometheus: Prometheus,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    """Start a server of the real base with memory for one of its adapters. The bytes of one are damaged."""
    home = tmp_path_factory.mktemp("slow")
    server = ServerProcess(home, model=base_dir, adapter_cache_bytes="11MiB", max_model_len=4096)
    server.upload("left", adapter_files.left())
    server.upload("right", adapter_files.right())
    digest = server.upload("damaged", adapter_files.make(3))["digest"]
    weights = home / "adapters" / digest[:2] / digest / WEIGHTS
    size = weights.stat().st_size
    weights.unlink()
    weights.write_bytes(bytes(size))
    (home / "adapters" / "packed" / digest).unlink(missing_ok=True)
    with scraped(server, prometheus):
        yield server


def wait(server: ServerProcess) -> None:
    """Do nothing: the server's fixture is the cause."""
    time.sleep(0.5)


@contextmanager
def frozen(server: ServerProcess) -> Iterator[None]:
    """Stop the server's process for the duration of the block."""
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


def post(server: ServerProcess, path: str = "/generate", **fields: object) -> httpx.Response:
    """Send a long generation, or another request. Return the answer, whatever its status is."""
    body = {"prompt": "HTTP 200:", "max_tokens": 480, "ignore_eos": True, "temperature": 0, **fields}
    return httpx.post(server.url + path, json=body, headers=server.headers, timeout=PATIENCE, trust_env=False)


@contextmanager
def generating(server: ServerProcess, number: int, **gauges: int) -> Iterator[bool]:
    """Send several generations, and yield whether /metrics shows at least these numbers before all have ended."""
    with ThreadPoolExecutor(number) as pool:
        sent = [pool.submit(post, server) for _ in range(number)]
        is_seen = False
        while not is_seen and not all(one.done() for one in sent):
            found = server.metrics()
            is_seen = all(found[f"smolora_{name}"] >= least for name, least in gauges.items())
        yield is_seen


def send_at_once(server: ServerProcess) -> None:
    """Send more generations than there are places in the batch and the queue."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: post(server), range(8)))


def fill_batch(server: ServerProcess) -> None:
    """Let a request wait for a place while nothing is computed for a while."""
    with generating(server, 5, requests_waiting=1) as is_waiting:
        if is_waiting:
            with frozen(server):
                time.sleep(10.5)


def exceed_timeout(server: ServerProcess) -> None:
    with generating(server, 1, requests_running=1) as is_running:
        if is_running:
            with frozen(server):
                time.sleep(1.2)


def fill_cache(server: ServerProcess) -> None:
    with generating(server, 4):
        pass


def stall(server: ServerProcess) -> None:
    with frozen(server):
        time.sleep(0.6)
    time.sleep(0.2)


def guess_key(server: ServerProcess) -> None:
    httpx.get(server.url + "/adapters", headers={"Authorization": "Bearer wrong"}, trust_env=False)
    time.sleep(0.1)


def crowd_lane(server: ServerProcess) -> None:
    """Upload many large data sets at once. One thread checks those of one project."""
    content = b'{"text": "one two three four five six seven eight nine ten"}\n' * 150_000

    def upload(number: int) -> None:
        files = {"file": ("rows.jsonl", content + b'{"text": "%d"}\n' % number)}
        httpx.post(
            server.url + "/datasets", files=files, headers=server.headers, timeout=PATIENCE, trust_env=False
        )

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(upload, range(12)))


def back_up_long_ago(server: ServerProcess) -> None:
    """Make a backup, and let it seem nine days old."""
    file = server.home.with_suffix(".tar")
    subprocess.run([*command(("backup", str(file)))[:-1], f"--home={server.home}"], env=environment(), check=True)
    at = time.time() - 9 * 86_400
    os.utime(Home(server.home).backed_up, (at, at))


def run_out_of_files(server: ServerProcess) -> None:
    """Lower the limit on open files to a little more than are open."""
    pid = server.process.pid
    num_open = len(os.listdir(f"/proc/{pid}/fd"))
    _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (num_open + 4, most))
    time.sleep(1)


def queue_for_hours(server: ServerProcess) -> None:
    """Let a job run and another one wait, which seems to be two hours old."""
    if not get(server, "/train?status=queued")["jobs"]:
        submit(server, name="codes", data=code_rows(8), training={"max_steps": 100_000})
    engine = connect(server.home)
    with engine.begin() as connection:
        waits = sa.update(jobs).where(jobs.c.status == Status.QUEUED)
        connection.execute(waits.values(created_at=datetime.now(UTC) - timedelta(hours=2)))
    engine.dispose()
    time.sleep(1)


def limit_jobs(server: ServerProcess) -> None:
    """Limit the time of jobs below what one has run already."""
    submit(server, name="codes", data=code_rows(8), training={"max_steps": 100_000})
    assert server.client.put("/projects/default", json={"max_job_seconds": 1}).status_code == 200
    time.sleep(2)


def restart(server: ServerProcess) -> None:
    words = psutil.Process(server.process.pid).cmdline()
    server.kill()
    log = subprocess.DEVNULL
    server.process = subprocess.Popen(words, env=environment(), stdout=log, stderr=log, start_new_session=True)

    def is_ready() -> bool:
        with suppress(httpx.TransportError):
            return server.client.get("/ready").status_code == 200
        return False

    wait_until(is_ready, what="the start")
    time.sleep(3)  # so that it is scraped


def kill(server: ServerProcess) -> None:
    if server.process.poll() is None:
        server.kill()
    time.sleep(1)


def write(server: ServerProcess) -> None:
    with (server.home.parent / FILLING).open("ab") as file:
        file.write(bytes(1 << 20))
    time.sleep(1)


def fill_disk(server: ServerProcess) -> None:
    fill(server.home.parent, leave=8 << 20)
    time.sleep(1)


def upload(server: ServerProcess) -> None:
    server.client.post("/datasets", files={"file": ("rows.jsonl", b'{"text": "one"}\n')})
    time.sleep(0.1)


def alternate(server: ServerProcess) -> None:
    for name in ("left", "right"):
        assert post(server, adapter=name, max_tokens=1).status_code == 200


def use_damaged(server: ServerProcess) -> None:
    assert post(server, adapter="damaged", max_tokens=1).status_code == 500
    time.sleep(0.1)


def hold_adapter(server: ServerProcess) -> None:
    """Use an adapter until a request for another one gets its memory."""
    with (
        ThreadPoolExecutor(1) as pool,
        server.stream("One", adapter="left", max_tokens=4000, ignore_eos=True) as one,
    ):
        next(one)
        waiting = pool.submit(post, server, adapter="right", max_tokens=1)
        while not waiting.done() and next(one, None):
            pass


def drain(server: ServerProcess) -> None:
    """Stop the server while it answers a request."""
    with (
        suppress(AssertionError, httpx.TransportError),
        server.stream("One", max_tokens=4000, ignore_eos=True) as events,
    ):
        next(events)
        server.terminate()
        list(events)
    time.sleep(0.5)


CAUSES: Mapping[str, tuple[str, Cause]] = {
    "SmoloraJobsWait": ("narrow", wait),
    "SmoloraQuotaFull": ("narrow", wait),
    "SmoloraRefuses": ("narrow", send_at_once),
    "SmoloraCacheFull": ("narrow", fill_cache),
    "SmoloraSlowFirstToken": ("narrow", fill_batch),
    "SmoloraLoopLags": ("narrow", stall),
    "SmoloraWrongKeys": ("narrow", guess_key),
    "SmoloraLaneWaits": ("narrow", crowd_lane),
    "SmoloraBackupOld": ("narrow", back_up_long_ago),
    "SmoloraFilesRunOut": ("narrow", run_out_of_files),
    "SmoloraGenerationsFail": ("working", exceed_timeout),
    "SmoloraJobsQueue": ("working", queue_for_hours),
    "SmoloraJobsFail": ("working", limit_jobs),
    "SmoloraRestarts": ("working", restart),
    "SmoloraDown": ("working", kill),
    "SmoloraDiskFills": ("small", write),
    "SmoloraDiskFull": ("small", fill_disk),
    "SmoloraRefusesWork": ("small", upload),
    "SmoloraAdaptersThrash": ("slow", alternate),
    "SmoloraErrors": ("slow", use_damaged),
    "SmoloraAdaptersWait": ("slow", hold_adapter),
    "SmoloraNotReady": ("slow", drain),
}
"""By alert: the server, and what is repeated there. The last ones of a server leave it unusable."""


def test_every_alert_is_caused_or_named() -> None:
    assert set(CAUSES).isdisjoint(NOT_CAUSED)
    assert {*CAUSES, *NOT_CAUSED} == {alert.name for alert in alerts()}


@pytest.mark.parametrize("alert", CAUSES)
def test_the_cause_of_an_alert_raises_it(
    alert: str, prometheus: Prometheus, request: pytest.FixtureRequest
) -> None:
    fixture, cause = CAUSES[alert]
    server: ServerProcess = request.getfixturevalue(fixture)
    has_fired = threading.Event()
    if cause is not wait:  # the causes before may raise it, too
        wait_until(lambda: alert not in prometheus.firing(server), SECONDS, f"the end of {alert}")

    def repeat() -> None:
        while not has_fired.is_set():
            cause(server)

    with ThreadPoolExecutor(1) as pool:
        repeated = pool.submit(repeat)
        try:
            wait_until(lambda: alert in prometheus.firing(server) or repeated.done(), SECONDS, alert)
        finally:
            has_fired.set()
        repeated.result()
