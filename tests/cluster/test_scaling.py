"""Replicas are added and removed under load, manually and automatically: no request fails, and no answer is
wrong."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.cluster.conftest import needs_ray
from tests.cluster.kit import Cluster, wait_until
from tests.cluster.load import load_on
from tests.end_to_end.server_process import ServerProcess, environment

pytestmark = [pytest.mark.cluster, needs_ray]


@pytest.fixture(autouse=True)
def two_again(cluster: Cluster) -> Iterator[None]:
    """Restore two replicas with their old flags afterwards."""
    yield
    cluster.scale(2)
    wait_until(partial(has_replicas, cluster, 2), "it isn't as before")


def has_replicas(cluster: Cluster, num_replicas: int) -> bool:
    return len(cluster.replicas()) == num_replicas


def pids(cluster: Cluster) -> set[int]:
    return {process.pid for process in cluster.replicas()}


def test_scaling_keeps_running_replicas(api: ServerProcess, single: ServerProcess, cluster: Cluster) -> None:
    before = pids(cluster)
    with load_on([api.url], single) as load:
        for num_replicas in (1, 4, 1):
            cluster.scale(num_replicas)
            wait_until(partial(has_replicas, cluster, num_replicas), "it doesn't scale")
            load.wait_for(12)
            assert before & pids(cluster), "all were restarted"
            before &= pids(cluster)
    assert load.faults == []


def test_rolling_upgrade(api: ServerProcess, single: ServerProcess, cluster: Cluster) -> None:
    """Replicas are replaced one by one: never fewer than before, and at most one more besides those that are
    ending."""
    before = pids(cluster)
    seen: list[set[int]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            seen.append(pids(cluster))

    with load_on([api.url], single) as load, ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            cluster.scale(2, max_queue=17)
            wait_until(lambda: not before & pids(cluster), "old ones stay")
            wait_until(lambda: len(pids(cluster)) == 2, "there are too many")
            load.wait_for(12)
        finally:
            done.set()
        watching.result()
    assert load.faults == []
    assert min(len(found) for found in seen) >= 2
    assert max(len(found - before) for found in seen) == 2
    first_new = next(found for found in seen if found - before)
    assert len(first_new - before) == 1, "both at once"


TELL = (
    "import pathlib, sys, time; from server.cluster.finder import join, replica_counts\n"
    "join(sys.argv[1])\n"
    "while 'stopping' not in replica_counts(): time.sleep(0.1)\n"
    "pathlib.Path(sys.argv[2]).touch()"
)
"""Touches a file as soon as Serve reports that a replica is stopping."""


def test_draining_replica_handles_aborts(api: ServerProcess, cluster: Cluster, tmp_path: Path) -> None:
    """Requests without a reader are freed there, while others continue."""
    streams: list[tuple[ExitStack, ExitStack]] = []  # the first of a pair is read for longer

    def opened(num_choices: int) -> ExitStack:
        body = {"prompt": f"{len(streams)} of {num_choices}", "max_tokens": 3500, "n": num_choices, "stream": True}
        stack = ExitStack()
        stack.enter_context(api.client.stream("POST", "/generate", json=body)).raise_for_status()
        return stack

    stopping = tmp_path / "stopping"
    with ThreadPoolExecutor(1) as pool:
        watching = subprocess.Popen([sys.executable, "-c", TELL, cluster.address, stopping], env=environment())
        scaling = pool.submit(cluster.scale, 1)
        while not stopping.exists():  # both always have some requests that have just started
            streams.append((opened(1), opened(3)))
            for stack in streams.pop(0) if len(streams) > 4 else ():
                stack.close()
            time.sleep(0.5)
            assert watching.poll() in (None, 0)
        assert len(cluster.replicas()) == 2, "it has ended"
        for _, other in streams:
            other.close()
        wait_until(lambda: api.metrics()["smolora_requests_running"] <= len(streams), "they go on", 5)
        assert len(cluster.replicas()) == 2, "it has ended"
        for read, _ in streams:
            read.close()
        scaling.result()
        watching.wait()
    api.wait_until_idle()


def test_replicas_follow_the_load(api: ServerProcess, single: ServerProcess, cluster: Cluster) -> None:
    """More sequences than one batch holds add a second replica, which is removed when they have ended."""
    cluster.scale(1, max_replicas=2, upscale_seconds=1, downscale_seconds=2)
    wait_until(partial(has_replicas, cluster, 1), "it doesn't begin with one")
    done = threading.Event()

    def ask_for_much(number: int) -> None:
        while not done.is_set():
            answer = api.generate(f"{number} is long", max_tokens=1000, n=4, ignore_eos=True)
            assert answer["usage"]["completion_tokens"] == 4000

    with ThreadPoolExecutor(6) as pool, load_on([api.url], single) as load:
        asked = [pool.submit(ask_for_much, number) for number in range(6)]
        try:
            wait_until(partial(has_replicas, cluster, 2), "no second one comes")
            load.wait_for(12)
            assert has_replicas(cluster, 2)
        finally:
            done.set()
        for each in asked:
            each.result()
    wait_until(partial(has_replicas, cluster, 1), "it stays")
    assert load.faults == []
