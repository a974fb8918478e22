"""Replicas come and go under load, by command and by themselves: no request fails, and no answer is wrong."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.cluster.conftest import needs_ray
from tests.cluster.kit import Cluster, wait_until
from tests.cluster.load import load_on
from tests.end_to_end.server_process import ServerProcess

pytestmark = [pytest.mark.cluster, needs_ray]


@pytest.fixture(autouse=True)
def two_again(cluster: Cluster) -> Iterator[None]:
    """Afterwards there are two replicas with the flags that they had."""
    yield
    cluster.scale(2)
    wait_until(partial(has_replicas, cluster, 2), "it isn't as before")


def has_replicas(cluster: Cluster, num_replicas: int) -> bool:
    return len(cluster.replicas()) == num_replicas


def pids(cluster: Cluster) -> set[int]:
    return {process.pid for process in cluster.replicas()}


def test_scaling_keeps_those_that_run(api: ServerProcess, single: ServerProcess, cluster: Cluster) -> None:
    before = pids(cluster)
    with load_on([api.url], single) as load:
        for num_replicas in (1, 4, 1):
            cluster.scale(num_replicas)
            wait_until(partial(has_replicas, cluster, num_replicas), "it doesn't scale")
            load.wait_for(12)
            assert before & pids(cluster), "all were restarted"
            before &= pids(cluster)
    assert load.faults == []


def test_a_rolling_upgrade(api: ServerProcess, single: ServerProcess, cluster: Cluster) -> None:
    """One after the other: there is never one fewer than before, and at most one more beside those that end."""
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
