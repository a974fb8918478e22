"""Several replicas as one engine: equal answers, aborts, refusals, and lost replicas."""

import asyncio
from dataclasses import replace
from functools import partial

import pytest

from adapters.errors import InvalidInput, SmoloraError
from server.cluster import client as client_module
from server.cluster import replica as replica_module
from server.cluster.fleet import Link, Sent
from server.cluster.messages import Batch
from server.cluster.replica import EngineReplica
from server.engine import async_engine
from server.engine.async_engine import OutputStream
from server.engine.request import GenerationRequest, SamplingParams, SequenceOutput
from server.engine.scheduler import SchedulerLimits
from server.errors import Draining, EngineDead, NotReady, QueueFull
from server.model.base.weights import BaseModel
from server.serve.engine import guidance_of
from tests.kits.engines import build_engine, run
from tests.server.cluster.replicas import Local, LocalTransport, sent
from tests.server.engine.async_bench import LONG, Bench, collect, eventually, on_loop, outcome, request
from tests.server.engine.faults import SlowLoad
from tests.server.engine.traffic import assert_same, library, prompt, requests_of_all_kinds

TUNED = request(adapters={"00": 1.0})
SHORT = request()
SLOW = replace(request(), sampling=LONG)


async def end_of(stream: OutputStream) -> SmoloraError | None:
    """Return the error that ends a running stream, or None."""
    try:
        async for output in stream:
            if output.error is not None:
                return output.error
    except SmoloraError as error:
        return error
    return None


async def first_of(stream: OutputStream) -> SequenceOutput | SmoloraError:
    """Return the stream's first output, or its refusal."""
    try:
        return await anext(stream)
    except SmoloraError as error:
        return error


def test_answers_are_those_of_one_engine(tiny_base: BaseModel) -> None:
    adapters, requests = library(tiny_base), requests_of_all_kinds(tiny_base, 16)
    expected = run(build_engine(tiny_base, adapters), requests)
    local = Local(tiny_base, adapters)

    async def main() -> None:
        async with local as engine:
            found = await asyncio.gather(*(collect(engine.submit(one)) for one in requests))
            for one, results in zip(requests, found, strict=True):
                for index, result in results.items():
                    assert_same(result, expected[one.request_id, index])
            assert engine.num_in_flight == 0
            await eventually(lambda: engine.stats.num_running == 0 and engine.stats.kv_blocks_used == 0)
            num_tokens = sum(len(result.token_ids) for result in expected.values())
            await eventually(lambda: engine.stats.output_tokens == num_tokens)
            assert {place for place, _ in local.transport.submitted} == {"replica-0", "replica-1"}
            assert local.transport.num_messages < num_tokens / 2  # one message has a step of several sequences

    on_loop(main())


def is_idle(bench: Bench) -> bool:
    return bench.asynchronous.num_in_flight == 0


def test_a_stream_that_is_closed_is_aborted(tiny_base: BaseModel) -> None:
    local = Local(tiny_base)

    async def main() -> None:
        async with local as engine:
            running = engine.submit(SLOW)
            await anext(running)
            unsent = engine.submit(replace(SLOW, request_id="at once"))
            await unsent.aclose()
            await running.aclose()
            assert engine.num_in_flight == 0
            for bench in local.benches.values():
                await eventually(partial(is_idle, bench))
                assert bench.engine.stats.output_tokens < 300

    on_loop(main())


def test_a_burst_does_not_overflow_a_readers_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a stall many outputs arrive at once; the reader runs in between."""
    monkeypatch.setattr(async_engine, "MAX_UNREAD", 200)
    pieces = [SequenceOutput("r", 0, "a", 1, 1, 0) for _ in range(1000)]
    pieces[-1] = replace(pieces[-1], finish_reason="length")

    async def main() -> None:
        engine, link = client_module.ReplicatedEngine(LocalTransport(), "", lambda _: 1), Link("replica-0")
        stream = OutputStream(1, lambda: None)
        link.sent["r"] = Sent(SHORT, stream.put, 1, link=link)
        reading = asyncio.create_task(end_of(stream))
        await engine._deliver(link, Batch(tuple(pieces)))
        assert await reading is None

    on_loop(main())


def test_a_replica_lost_before_the_first_token_is_retried(tiny_base: BaseModel) -> None:
    expected = run(build_engine(tiny_base, library(tiny_base, 4)), [TUNED])["r", 0]
    slow = SlowLoad(tiny_base)
    local = Local(tiny_base, slow)

    async def main() -> None:
        async with local as engine:
            asked = asyncio.ensure_future(collect(engine.submit(TUNED)))
            await eventually(lambda: slow.num_started == 1)
            first = local.place_of("r")
            local.transport.cut(first)
            await eventually(lambda: slow.num_started == 2)
            slow.go.set()
            assert_same((await asked)[0], expected)
            assert local.place_of("r") != first

    on_loop(main())


def test_a_replica_lost_while_it_refuses(tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is retried once, on one replica: one stream can't have two answers."""
    expected = run(build_engine(tiny_base), [SHORT])["r", 0]
    local, submit = Local(tiny_base), LocalTransport.submit
    engine = local.client

    async def refuses(
        transport: LocalTransport, replica: str, client: str, request: GenerationRequest
    ) -> SmoloraError | None:
        if transport.submitted:
            return await submit(transport, replica, client, request)
        transport.submitted.append((replica, request.request_id))
        asyncio.get_running_loop().call_soon(engine._lose, engine._links[replica])
        return EngineDead()

    monkeypatch.setattr(LocalTransport, "submit", refuses)

    async def main() -> None:
        async with local:
            assert_same((await collect(engine.submit(SHORT)))[0], expected)
            assert len(local.transport.submitted) == 2

    on_loop(main())


def test_streams_of_a_lost_replica_go_on_at_another(tiny_base: BaseModel) -> None:
    """The reader gets each token once, and the same as from one engine."""
    adapters = library(tiny_base)
    requests = [one for one in requests_of_all_kinds(tiny_base, 16) if one.sampling.max_tokens > 2]
    expected = run(build_engine(tiny_base, adapters), requests)
    local = Local(tiny_base, adapters)

    async def main() -> None:
        async with local as engine:
            streams = [engine.submit(one) for one in requests]
            slow = engine.submit(replace(SLOW, request_id="slow"))
            await anext(slow)
            found = [asyncio.ensure_future(collect(stream)) for stream in streams]
            local.transport.cut(local.place_of("slow"))
            assert await end_of(slow) is None
            for one, results in zip(requests, await asyncio.gather(*found), strict=True):
                for index, result in results.items():
                    assert_same(result, expected[one.request_id, index])
            assert len(local.transport.submitted) > len(requests) + 1
            assert engine.num_in_flight == 0

    on_loop(main())


def test_a_stream_is_not_continued_on_another_kind_of_processor(
    tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_PATIENCE_SECONDS", 0.05)
    kinds = iter(("amx", "avx2"))
    monkeypatch.setattr(replica_module, "kind_of", lambda _: next(kinds))
    local = Local(tiny_base)

    async def main() -> None:
        async with local as engine:
            stream = engine.submit(SLOW)
            await anext(stream)
            local.transport.cut(local.place_of("r"))
            assert isinstance(await end_of(stream), EngineDead)
            assert len(local.transport.submitted) == 1
            assert engine.ready  # the other one is ready

    on_loop(main())


def test_accepted_requests_wait_for_a_replica(tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowLoad(tiny_base)
    local = Local(tiny_base, slow, num=1)

    async def main() -> None:
        async with local as engine:
            first = asyncio.ensure_future(outcome(engine.submit(TUNED)))
            await eventually(lambda: slow.num_started == 1)
            local.transport.cut("replica-0")
            local.transport.remove("replica-0")
            await eventually(lambda: not engine.ready)
            with pytest.raises(NotReady):
                engine.submit(request("refused"))
            slow.go.set()
            local.benches["another"] = Local(tiny_base, slow, num=1).benches["replica-0"]
            local.bring("another")
            assert await first is None
            monkeypatch.setattr(client_module, "_PATIENCE_SECONDS", 0.05)
            second = asyncio.ensure_future(outcome(engine.submit(replace(SLOW, request_id="s"))))
            await asyncio.sleep(0)
            local.transport.cut("another")
            assert isinstance(await second, EngineDead)

    on_loop(main())


def test_a_leaving_replica_finishes_its_requests(tiny_base: BaseModel) -> None:
    local = Local(tiny_base)

    async def main() -> None:
        async with local as engine:
            stream = engine.submit(SLOW)
            await anext(stream)
            leaving = local.place_of("r")
            local.transport.remove(leaving)
            others = [engine.submit(request(f"o{number}", num=10 + number)) for number in range(4)]
            assert [await outcome(other) for other in others] == [None] * 4
            assert leaving not in {place for place, name in local.transport.submitted if name.startswith("o")}
            assert await end_of(stream) is None
            await eventually(lambda: leaving not in engine._links)

    on_loop(main())


def test_a_leaving_replica_is_used_until_its_successor_reports(tiny_base: BaseModel) -> None:
    """Serve announces the new replica and the end of the old one at the same time."""
    local = Local(tiny_base, num=1)

    async def main() -> None:
        async with local as engine:
            stream = engine.submit(SLOW)
            await anext(stream)
            (replica,) = local.transport.replicas.values()
            local.transport.replicas = {"successor": replica}  # not reachable yet
            local.transport.tell()
            assert await outcome(engine.submit(request("other"))) is None
            assert local.place_of("other") == "replica-0"
            await stream.aclose()
            await eventually(lambda: not engine._links["replica-0"].sent)
            await asyncio.sleep(
                3 * replica_module.PULSE_SECONDS
            )  # it has reported again, and runs none of our requests
            assert await outcome(engine.submit(request("another"))) is None
            stream = engine.submit(SLOW)
            await anext(stream)
            local.transport.replicas = {}
            local.transport.tell()
            with pytest.raises(NotReady):  # otherwise it would never get rid of requests
                engine.submit(request("late"))
            assert await end_of(stream) is None

    on_loop(main())


def test_a_lost_replica_has_no_statistics_and_the_others_keep_theirs(tiny_base: BaseModel) -> None:
    local = Local(tiny_base)

    async def main() -> None:
        async with local as engine:
            asked = [outcome(engine.submit(request(f"{number}", num=10 + number))) for number in range(8)]
            assert await asyncio.gather(*asked) == [None] * 8
            done = {name: bench.engine.stats.output_tokens for name, bench in local.benches.items()}
            assert all(done.values())

            def counted() -> dict[str, int]:
                found = engine.stats_by_replica(is_complete=True)
                return {name: stats.output_tokens for name, stats in found.items()}

            await eventually(lambda: counted() == done)
            assert engine.stats.output_tokens == sum(done.values())
            before = engine.stats
            local.transport.cut("replica-0")
            await eventually(lambda: len(engine._ready_links()) == 1)
            assert counted() == {"replica-1": done["replica-1"]}
            assert engine.stats.kv_blocks_total == before.kv_blocks_total / 2
            local.transport.remove("replica-0")
            await eventually(lambda: "replica-0" not in engine._links)
            assert counted() == {"replica-1": done["replica-1"]}

    on_loop(main())


def test_refusals(tiny_base: BaseModel) -> None:
    limits = SchedulerLimits(max_num_seqs=1)
    local = Local(tiny_base, limits=limits, max_queue=1)

    async def main() -> None:
        async with local as engine:
            with pytest.raises(InvalidInput, match="exceed 512"):
                engine.submit(request(num=600))
            with pytest.raises(InvalidInput, match="logit_bias"):
                engine.submit(replace(request(), sampling=SamplingParams(logit_bias=((512, 1.0),))))
            streams = [engine.submit(replace(SLOW, request_id=f"{index}")) for index in range(6)]
            refused = [isinstance(await first_of(stream), QueueFull) for stream in streams[4:]]
            assert refused == [True, True]  # two run, two wait; the others were refused by both replicas
            await eventually(lambda: all(link.state and link.state.refusal for link in engine._links.values()))
            with pytest.raises(QueueFull):
                engine.check_queue(1)
            for stream in streams:
                await stream.aclose()
            engine.drain()
            assert engine.draining
            with pytest.raises(Draining):
                engine.submit(request("late"))

    on_loop(main())


def test_max_in_flight_of_all_replicas(tiny_base: BaseModel) -> None:
    """Limits: for one sequence, what every replica can run; for all, the sum of the replicas."""
    limits = SchedulerLimits(max_num_seqs=1)
    local = Local(tiny_base, limits=limits, max_queue=2)
    local.benches["replica-1"] = Bench(tiny_base, limits=limits, max_queue=4, num_blocks=9)
    fewest = local.benches["replica-1"].asynchronous.max_num_tokens
    assert fewest < local.benches["replica-0"].asynchronous.max_num_tokens
    assert (local.client.max_num_tokens, local.client.max_in_flight) == (None, None)

    async def main() -> None:
        async with local as engine:
            assert (engine.max_num_tokens, engine.max_in_flight) == (fewest, 3 + 5)
            link = engine._links["replica-0"]
            assert link.welcome is not None
            other = replace(link.welcome, base_digest="another")
            engine._links["another"] = Link("another", welcome=other, is_new=False)
            assert engine.max_in_flight == 3 + 5
            del engine._links["another"]
            link.welcome = replace(link.welcome, max_in_flight=None)  # an older version doesn't report it
            assert engine.max_in_flight is None

    on_loop(main())


def test_a_lost_replica_still_counts_in_max_in_flight(tiny_base: BaseModel) -> None:
    """A request that fits only both replicas must be retried, not made smaller: clients don't repeat a 400."""
    local = Local(tiny_base, limits=SchedulerLimits(max_num_seqs=1), max_queue=2)

    def most() -> int | None:
        return local.client.max_in_flight

    async def main() -> None:
        local.client.start()
        local.bring("replica-0")
        local.client._update_replicas(frozenset(local.benches))  # the other one is listed but hasn't reported
        await eventually(lambda: local.client.ready)
        assert most() is None
        local.bring("replica-1")
        await eventually(lambda: most() == 3 + 3)
        local.transport.cut("replica-1")
        await eventually(lambda: len(local.client._ready_links()) == 1)
        assert most() is None  # it may be followed again
        local.transport.remove("replica-1")
        await eventually(lambda: "replica-1" not in local.client._links)
        assert most() == 3 + 3  # its replacement hasn't been announced yet
        await local.__aexit__()

    on_loop(main())


def test_replicas_of_another_base_are_not_used(tiny_base: BaseModel, caplog: pytest.LogCaptureFixture) -> None:
    local = Local(tiny_base, num=1)
    local.client._base_digest = "another"

    async def main() -> None:
        local.client.start()
        local.bring("replica-0")
        await asyncio.sleep(1.2)  # it is queried more than once
        assert not local.client.ready
        await local.__aexit__()

    on_loop(main())
    (message,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "replica replica-0 has another base than this process" in message


def test_a_dead_engine_fails_its_health_check(tiny_base: BaseModel) -> None:
    local = Local(tiny_base, num=1, failing={0, 1, 2})

    async def main() -> None:
        async with local as engine:
            for number in range(3):
                await first_of(engine.submit(request(f"{number}")))
            await eventually(lambda: local.benches["replica-0"].asynchronous.dead)
            await eventually(lambda: not engine.ready)
            (replica,) = local.transport.replicas.values()
            with pytest.raises(EngineDead):
                await replica.check_health()

    on_loop(main())


def test_a_replica_says_how_busy_it_is(tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers on its machine yield according to this number."""
    monkeypatch.setattr(replica_module, "PULSE_SECONDS", 0.01)
    said = list[int]()

    async def main() -> None:
        engine = Bench(tiny_base).asynchronous
        replica = EngineReplica(
            engine, guidance_of(tiny_base), tiny_base.digest, tiny_base.config.vocab_size, said.append
        )
        messages = replica.follow("client")
        await anext(messages)
        assert await replica.submit("client", replace(SLOW, n=2)) is None
        assert said[-1] == 2
        await eventually(lambda: said[-1] == 0)
        assert said.count(2) > 1, "it is said again while they run"
        await messages.aclose()
        await replica.stop()

    on_loop(main())


def test_messages_survive_pickling() -> None:
    for error in (QueueFull("full", retry_after=2.5), InvalidInput.of("prompt", "is empty"), EngineDead()):
        other = sent(error)
        assert type(other) is type(error)
        assert (str(other), vars(other)) == (str(error), vars(error))
    one = replace(SLOW, prompt_token_ids=prompt(3))
    assert sent(one) == one
