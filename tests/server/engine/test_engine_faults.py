"""Aborts, failing steps, broken adapters: who is concerned ends with a reason, and nobody else notices."""

import math
from dataclasses import replace

from adapters.errors import CorruptAdapter, InvalidInput
from adapters.lora import LoraWeights
from server.engine.engine import Engine
from server.engine.request import GenerationRequest
from server.engine.scheduler import SchedulerLimits
from server.errors import EngineDead, GenerationFailed
from server.model.base.weights import BaseModel
from tests.engine_kit import (
    GREEDY,
    build_engine,
    check_idle,
    random_adapter,
    refs,
    run,
)
from tests.server.engine.faults import FailingRunner, overflowing
from tests.server.engine.traffic import assert_same, library, prompt


def test_an_abort_frees_everything_at_once(tiny_base: BaseModel) -> None:
    engine = build_engine(tiny_base, library(tiny_base, 2), limits=SchedulerLimits(max_num_seqs=3))
    for i in range(5):
        engine.add(
            GenerationRequest(str(i), prompt(40, seed=i), GREEDY, refs(**{"00": 1.0}) if i % 2 else (), n=2)
        )
    for _ in range(4):
        engine.step()
    for i in range(5):
        engine.abort(str(i))
        engine.blocks.check(engine.scheduler.running)
    engine.abort("unknown")
    check_idle(engine)
    assert engine.step() == []


def failing_engine(base: BaseModel, failing: set[int], limits: SchedulerLimits | None = None) -> Engine:
    engine = build_engine(base, limits=limits)
    engine.runner = FailingRunner(engine.runner, failing)
    return engine


def test_a_failing_step_fails_the_requests_in_it_and_no_others(tiny_base: BaseModel) -> None:
    engine = failing_engine(tiny_base, {3}, SchedulerLimits(max_num_seqs=2))
    requests = [GenerationRequest(str(i), prompt(10, seed=i), GREEDY) for i in range(4)]
    results = run(engine, requests)
    assert [results[str(i), 0].finish_reason for i in range(4)] == ["abort", "abort", "length", "length"]
    error = results["0", 0].error
    assert isinstance(error, GenerationFailed)
    assert "secret" not in str(error)
    assert not engine.is_dead
    check_idle(engine)
    fresh = run(build_engine(tiny_base), requests[2:])
    assert_same(results["2", 0], fresh["2", 0])


def test_blocks_of_a_failed_step_are_not_found(tiny_base: BaseModel) -> None:
    engine = failing_engine(tiny_base, {0})
    request = GenerationRequest("a", prompt(40), GREEDY)
    assert run(engine, [request])["a", 0].error is not None
    again = run(engine, [request])["a", 0]
    assert again.num_cached_tokens == 0
    assert_same(again, run(build_engine(tiny_base), [request])["a", 0])


def test_two_failures_in_a_row_are_survived_again_and_again(tiny_base: BaseModel) -> None:
    engine = failing_engine(tiny_base, {0, 1, 3, 4})
    for i in range(6):
        run(engine, [GenerationRequest(str(i), prompt(5), replace(GREEDY, max_tokens=1))])
    assert not engine.is_dead
    check_idle(engine)


def test_three_failures_in_a_row_end_everything(tiny_base: BaseModel) -> None:
    engine = failing_engine(tiny_base, {1, 2, 3}, SchedulerLimits(max_num_seqs=2))
    requests = [GenerationRequest(str(i), prompt(10, seed=i), GREEDY) for i in range(9)]
    results = run(engine, requests)
    assert engine.is_dead
    errors = [type(result.error) for result in results.values()]
    assert errors.count(GenerationFailed) == 6
    assert errors.count(EngineDead) == 3
    check_idle(engine)


def test_an_adapter_that_can_not_be_loaded_fails_its_own_requests_and_may_come_back(tiny_base: BaseModel) -> None:
    adapters = library(tiny_base, 2)
    broken = {"01"}

    def load(digest: str) -> LoraWeights:
        if digest in broken:
            raise CorruptAdapter("its bytes are gone")
        return adapters[digest]

    engine = build_engine(tiny_base, load)
    requests = [
        GenerationRequest("fine", prompt(10), GREEDY, refs(**{"00": 1.0})),
        GenerationRequest("broken", prompt(10), GREEDY, refs(**{"01": 1.0}), n=2),
        GenerationRequest("blend", prompt(10), GREEDY, refs(**{"00": 0.5, "01": 0.5})),
        GenerationRequest("base", prompt(10), GREEDY),
    ]
    results = run(engine, requests)
    reasons = {key: (result.finish_reason, str(result.error or "")) for key, result in results.items()}
    gone = ("abort", "its bytes are gone")
    assert reasons == {
        ("fine", 0): ("length", ""),
        ("broken", 0): gone,
        ("broken", 1): gone,
        ("blend", 0): gone,
        ("base", 0): ("length", ""),
    }
    check_idle(engine)
    broken.clear()
    found = run(engine, requests)
    assert all(result.finish_reason == "length" for result in found.values())
    assert_same(found["fine", 0], results["fine", 0])
    check_idle(engine)


def test_an_adapter_that_turns_everything_to_nan_harms_nobody_else(tiny_base: BaseModel) -> None:
    """Neither in the same batch nor through the blocks that it leaves behind."""
    adapters = {"huge": random_adapter(tiny_base.config.shape, 0, strength=1e30), **library(tiny_base, 2)}
    fine = [
        GenerationRequest(f"fine{i}", prompt(13, seed=i), GREEDY, a)
        for i, a in enumerate([(), refs(**{"00": 1.0})])
    ]
    expected = run(build_engine(tiny_base, adapters), fine)
    bad = [GenerationRequest(f"bad{i}", prompt(16, seed=9 + i), GREEDY, refs(huge=100.0)) for i in range(3)]
    engine = build_engine(tiny_base, adapters, num_blocks=16)
    together = run(engine, [*bad, *fine])
    for i in range(3):
        result = together[f"bad{i}", 0]
        assert result.finish_reason == "abort"
        assert isinstance(result.error, InvalidInput)
        assert [fault.loc for fault in result.error.errors] == [("adapter",)]
        assert all(math.isfinite(value) for value in result.logprobs)
    afterwards = run(engine, fine)
    for results in (together, afterwards):
        for request in fine:
            assert_same(results[request.request_id, 0], expected[request.request_id, 0])
    check_idle(engine)


def test_numbers_that_overflow_without_adapters_are_the_servers_fault(tiny_base: BaseModel) -> None:
    engine = build_engine(tiny_base, model=overflowing(tiny_base))
    result = run(engine, [GenerationRequest("a", prompt(10), GREEDY)])["a", 0]
    assert isinstance(result.error, GenerationFailed)
    check_idle(engine)
