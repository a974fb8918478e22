"""The length of a replica's queue, as one API process knows it."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from server.cluster.client import ReplicatedEngine
from server.cluster.fleet import COUNTERS, Counts, Link, Sent, best, total
from server.cluster.messages import ReplicaState, Welcome
from server.engine.request import EngineStats
from server.model.base.weights import BaseModel
from tests.kits.engines import build_engine
from tests.server.cluster.replicas import Local
from tests.server.engine.async_bench import collect, eventually, on_loop, request

WELCOME = Welcome("base", 4096, 256, 16)
NUM_APIS = 8


@pytest.fixture(scope="module")
def stats(tiny_base: BaseModel) -> EngineStats:
    return build_engine(tiny_base).stats


def send(link: Link, name: str, num: int = 1) -> Sent:
    """Send a request as the client does."""
    sent = Sent(replace(request(), request_id=name), lambda output: None, num, link, is_offered=True)
    link.sent[name] = sent
    return sent


def test_requests_since_the_last_report_count_once_per_process(stats: EngineStats) -> None:
    link = Link("one", WELCOME)
    first = send(link, "first", num=2)
    assert link.queue == 2
    link.take(ReplicaState(stats, num_in_flight=10, num_own=0, num_followers=4))
    assert link.queue == 10 + 4 * 2  # not in the report: the replica hasn't accepted it yet
    first.is_offered = False
    link.take(ReplicaState(stats, num_in_flight=12, num_own=2, num_followers=4))
    assert link.queue == 12
    send(link, "second")
    assert link.queue == 12 + 4
    first.num_unfinished = 1  # ends are known at once
    assert link.queue == 11 + 4
    del link.sent["second"]
    assert link.queue == 11


def test_processes_with_old_reports_do_not_overfill_a_replica(stats: EngineStats) -> None:
    """Eight processes send a batch each between two reports, to replicas that were equally busy."""
    found: Counter[str] = Counter()
    for api in range(NUM_APIS):
        links = [Link(f"replica-{index}", WELCOME) for index in range(4)]
        for index, link in enumerate(links):
            link.take(ReplicaState(stats, num_in_flight=8 * index, num_own=0, num_followers=NUM_APIS))
        for index in range(3):
            sent = send(Link("nowhere"), f"{api}-{index}")
            link = best(links, sent, lambda digest: 1)
            send(link, sent.request.request_id)
            found[link.id] += 1
    queues = [8 * index + found[f"replica-{index}"] for index in range(4)]
    assert sum(found.values()) == NUM_APIS * 3
    assert max(queues) - min(queues) <= NUM_APIS, queues


def test_counters_only_grow_as_replicas_come_and_go() -> None:
    """Prometheus takes a falling sum for a restarted server, and counts everything again."""
    counts = Counts()
    one, other = Link("one", WELCOME, counts), Link("other", WELCOME, counts)

    def report(link: Link, number: int) -> None:
        every: dict[str, Any] = dict.fromkeys(COUNTERS, number)
        link.take(ReplicaState(EngineStats(num_running=1, **every), num_in_flight=1, num_own=1))

    def sums(*links: Link) -> set[int]:
        stats = total(links, counts)
        assert stats.num_running == sum(link.state is not None for link in links)
        return {getattr(stats, name) for name in COUNTERS}

    assert sums() == {0}
    report(one, 1_000_000)  # from before this process started
    report(other, 0)
    assert sums(one, other) == {0}
    report(one, 1_000_010)
    report(other, 5)
    assert sums(one, other) == {15}
    one.state = None  # lost for a moment
    assert sums(one, other) == {15}
    report(one, 1_000_030)
    assert sums(one, other) == {35}
    assert sums(other) == {35}, "what has gone has counted"


def test_a_replica_reports_its_number_of_followers(tiny_base: BaseModel) -> None:
    local = Local(tiny_base, num=1)

    async def main() -> None:
        async with local as engine:
            (link,) = engine._ready_links()
            await collect(engine.submit(request()))
            assert link.state is not None
            assert link.state.num_followers == 1
            other = ReplicatedEngine(local.transport, tiny_base.digest, lambda digest: 1)
            other.start()
            await eventually(lambda: other.ready)
            await eventually(lambda: link.state is not None and link.state.num_followers == 2)
            await other.stop()
            await eventually(lambda: link.state is not None and link.state.num_followers == 1)

    on_loop(main())
