"""The length of a replica's queue, as one API process knows it."""

from collections import Counter
from dataclasses import replace

import pytest

from server.cluster.client import ReplicatedEngine
from server.cluster.fleet import Link, Sent, best, resident_in, total
from server.cluster.messages import ReplicaState, Welcome
from server.engine.request import EngineStats
from server.model.base.weights import BaseModel
from tests.kits.engines import build_engine, refs
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


def test_the_replica_with_the_most_of_a_blend_is_chosen() -> None:
    """Loaded, or loading for a request of this process; what else is loaded doesn't count."""
    names = {"none": "x", "one": "ax", "both": "abx", "coming": "ax"}
    links = [Link(name, WELCOME) for name in names]
    for link in links:
        resident = EngineStats(resident=frozenset(names[link.id]))
        link.take(ReplicaState(resident, num_in_flight=0, num_own=0))
    blend = replace(send(Link("nowhere"), "blend").request, adapters=refs(a=0.5, b=0.5))
    assert [sorted(resident_in(link, frozenset("ab"))) for link in links] == [[], ["a"], ["a", "b"], ["a"]]
    assert best(links, Sent(blend, lambda output: None, 1), lambda digest: 1).id == "both"
    sent = send(links[-1], "sent")
    sent.request = replace(sent.request, adapters=refs(b=1.0, c=1.0))
    assert resident_in(links[-1], frozenset("ab")) == frozenset("ab")


def test_a_total_adds_up_the_replicas_that_report() -> None:
    one, other, lost = (Link(name, WELCOME) for name in ("one", "other", "lost"))
    one.take(ReplicaState(EngineStats(num_running=1, steps=3, max_adapter_rank=8), num_in_flight=1, num_own=1))
    other.take(ReplicaState(EngineStats(num_running=2, steps=4, max_adapter_rank=16), num_in_flight=2, num_own=0))
    assert total([one, other, lost]) == EngineStats(num_running=3, steps=7, max_adapter_rank=16)


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


def test_each_replica_has_one_reporter_among_the_processes(tiny_base: BaseModel) -> None:
    """If the reporter leaves, another process becomes the reporter."""
    local = Local(tiny_base, num=2)

    async def main() -> None:
        async with local as engine:
            others = [ReplicatedEngine(local.transport, tiny_base.digest, lambda digest: 1) for _ in range(2)]
            for other in others:
                other.start()
            await eventually(lambda: all(len(other._ready_links()) == 2 for other in others))

            def reported(*clients: ReplicatedEngine) -> list[str]:
                return sorted(name for client in clients for name in client.stats_by_replica(is_complete=False))

            both = ["replica-0", "replica-1"]
            assert all(sorted(other.stats_by_replica(is_complete=True)) == both for other in (engine, *others))
            assert reported(engine, *others) == both
            await engine.stop()
            await eventually(lambda: reported(*others) == both)
            await others[0].stop()
            await eventually(lambda: reported(others[1]) == both)
            await others[1].stop()

    on_loop(main())
