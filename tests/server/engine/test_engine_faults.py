"""Aborts, failing steps and broken adapters end their own requests with a reason, and no others."""

import math
import threading
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Self

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.errors import CorruptAdapter, InvalidInput, Unavailable
from adapters.lora import LoraWeights
from server.engine.detokenizer import TextStream, TokenBytes
from server.engine.engine import Engine
from server.engine.guidance import Constraint
from server.engine.request import GenerationRequest, SequenceOutput
from server.engine.scheduler import SchedulerLimits, Step
from server.engine.sequence import Sequence
from server.errors import EngineDead, GenerationFailed
from server.model.base.weights import BaseModel
from server.model.rank_rows import Needs, Stored
from tests.kits.engines import (
    GREEDY,
    Result,
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


def test_a_failing_step_fails_only_its_own_requests(tiny_base: BaseModel) -> None:
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


def test_two_failures_in_a_row_are_survived_repeatedly(tiny_base: BaseModel) -> None:
    engine = failing_engine(tiny_base, {0, 1, 3, 4})
    for i in range(6):
        run(engine, [GenerationRequest(str(i), prompt(5), replace(GREEDY, max_tokens=1))])
    assert not engine.is_dead
    check_idle(engine)


def test_three_failures_in_a_row_end_all_requests(tiny_base: BaseModel) -> None:
    engine = failing_engine(tiny_base, {1, 2, 3}, SchedulerLimits(max_num_seqs=2))
    requests = [GenerationRequest(str(i), prompt(10, seed=i), GREEDY) for i in range(9)]
    results = run(engine, requests)
    assert engine.is_dead
    errors = [type(result.error) for result in results.values()]
    assert errors.count(GenerationFailed) == 6
    assert errors.count(EngineDead) == 3
    check_idle(engine)


def test_an_unreadable_adapter_fails_its_requests_and_is_read_again(tiny_base: BaseModel) -> None:
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


def test_a_nan_adapter_affects_no_other_request(tiny_base: BaseModel) -> None:
    """It affects neither its batch nor later sequences that reuse its blocks."""
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


def test_an_overflow_without_adapters_is_a_server_error(tiny_base: BaseModel) -> None:
    engine = build_engine(tiny_base, model=overflowing(tiny_base))
    result = run(engine, [GenerationRequest("a", prompt(10), GREEDY)])["a", 0]
    assert isinstance(result.error, GenerationFailed)
    check_idle(engine)


class BrokenConstraint(Constraint):
    """A grammar that allows everything and fails on the third token."""

    is_complete = False
    error = None
    awaits_mask = False
    max_draft = 0

    def __init__(self, vocab_size: int) -> None:
        self.allowed = np.zeros(vocab_size, np.bool_)
        self.num_accepted = 0

    def forbidden(self) -> NDArray[np.bool_]:
        return self.allowed

    def forced(self, max_tokens: int) -> tuple[int, ...]:
        return ()

    def accept(self, token_id: int) -> None:
        self.num_accepted += 1
        if self.num_accepted == 3:
            raise AssertionError("a secret of the grammar")

    def num_allowed(self, token_ids: Seq[int]) -> int:
        return 0

    def after(self, token_ids: Seq[int]) -> Self:
        return self


class BrokenStream(TextStream):
    """Text that fails at its third token, or at its end."""

    def __init__(self, token_bytes: TokenBytes, *, at_end: bool) -> None:
        super().__init__(token_bytes, ())
        self.at_end = at_end
        self.num_pushed = 0

    def push(self, token_id: int) -> str:
        self.num_pushed += 1
        assert self.at_end or self.num_pushed < 3, "a secret of the text"
        return super().push(token_id)

    def finish(self) -> str:
        raise AssertionError("a secret of the text")


def break_(engine: Engine, what: str) -> None:
    """Break something of the request "bad", which has been added."""
    bad = next(sequence for sequence in engine._streams if sequence.request.request_id == "bad")
    mark_computed, reserve, admit = engine.blocks.mark_computed, engine.blocks.reserve, engine.blocks.admit

    def mark(sequence: Sequence) -> None:
        assert sequence is not bad or sequence.num_output_tokens < 2, "a secret of the cache"
        mark_computed(sequence)

    def reserve_some(sequence: Sequence, num_tokens: int) -> bool:
        assert sequence is not bad or sequence.num_output_tokens < 2, "a secret of the cache"
        return reserve(sequence, num_tokens)

    def admit_others(sequence: Sequence, *, num_spare_blocks: int) -> bool:
        assert sequence is not bad, "a secret of the cache"
        return admit(sequence, num_spare_blocks=num_spare_blocks)

    match what:
        case "room":
            vars(engine.blocks)["reserve"] = reserve_some
        case "admission":
            vars(engine.blocks)["admit"] = admit_others
        case "grammar":
            bad.constraint = BrokenConstraint(engine._vocab_size)
        case "blocks":
            vars(engine.blocks)["mark_computed"] = mark
        case _:
            engine._streams[bad] = BrokenStream(engine._token_bytes, at_end=what == "end of the text")


@pytest.mark.parametrize(
    ("what", "num_tokens"),
    [("text", 2), ("end of the text", 15), ("grammar", 2), ("blocks", 2), ("room", 2), ("admission", 0)],
)
def test_a_failure_of_one_sequence_affects_no_other(
    tiny_base: BaseModel, what: str, num_tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Failures are in the detokenizer, a grammar and the cache's blocks, before and after the forward pass."""
    bad, *fine = [GenerationRequest(name, prompt(10, seed=ord(name[0])), GREEDY) for name in ("bad", "one", "two")]
    expected = run(build_engine(tiny_base), fine)
    engine = build_engine(tiny_base)
    engine.add(bad)
    break_(engine, what)
    for request in fine:
        engine.add(request)
    results = {key: Result() for key in expected}
    of_bad: list[SequenceOutput] = []
    while engine.has_work:
        for output in engine.step():
            if output.request_id == "bad":
                of_bad.append(output)
            else:
                results[output.request_id, output.index].take(output)
    for key, result in expected.items():
        assert_same(results[key], result)
    *_, failed = of_bad
    assert sum(output.num_new_tokens for output in of_bad) == num_tokens
    assert [output.finish_reason for output in of_bad] == [None] * num_tokens + ["abort"]
    assert isinstance(failed.error, GenerationFailed)
    assert "secret" not in str(failed.error)
    assert caplog.text.count("a sequence failed") == 1
    assert engine.num_failures == 0
    check_idle(engine)


def failing_schedule(engine: Engine, failing: set[int]) -> None:
    """Have calls of the engine's scheduler named in `failing` (counted from 0) raise."""
    num_calls = 0
    schedule = engine.scheduler.schedule

    def fail() -> Step:
        nonlocal num_calls
        num_calls += 1
        step = schedule()
        assert num_calls - 1 not in failing, "a secret of the scheduler"
        return step

    vars(engine.scheduler)["schedule"] = fail


def test_two_failing_schedules_are_survived(tiny_base: BaseModel) -> None:
    requests = [GenerationRequest(str(i), prompt(10, seed=i), GREEDY) for i in range(4)]
    expected = run(build_engine(tiny_base), requests)
    engine = build_engine(tiny_base, limits=SchedulerLimits(max_num_seqs=2))
    failing_schedule(engine, {0, 1, 5, 6, 20})
    found = run(engine, requests)
    for key, result in expected.items():
        assert_same(found[key], result)
    assert not engine.is_dead
    check_idle(engine)


def test_three_failing_schedules_in_a_row_end_all_requests(tiny_base: BaseModel) -> None:
    engine = build_engine(tiny_base)
    failing_schedule(engine, {2, 3, 4})
    results = run(engine, [GenerationRequest(str(i), prompt(10), GREEDY) for i in range(3)])
    assert [type(result.error) for result in results.values()] == [EngineDead] * 3
    assert engine.is_dead


def test_a_failing_schedule_still_reports_failed_adapters(tiny_base: BaseModel) -> None:
    """Sequences that the schedule had failed before it raised end for their clients, too."""

    def load(digest: str) -> LoraWeights:
        raise CorruptAdapter("its bytes are gone")

    engine = build_engine(tiny_base, load)
    failing_schedule(engine, set(range(0, 1000, 2)))
    result = run(engine, [GenerationRequest("a", prompt(10), GREEDY, refs(**{"00": 1.0}))])["a", 0]
    assert result.finish_reason == "abort"
    check_idle(engine)


def test_a_pool_failure_fails_only_the_adapters_requests(
    tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = library(tiny_base, 2)
    engine = build_engine(tiny_base, adapters)
    needs = engine.pool.rows.needs

    def fail(stored: Stored) -> Needs:
        assert stored is not adapters["01"], "a secret of the pool"
        return needs(stored)

    monkeypatch.setattr(engine.pool.rows, "needs", fail)
    requests = [
        GenerationRequest("base", prompt(10), GREEDY),
        GenerationRequest("fine", prompt(10), GREEDY, refs(**{"00": 1.0})),
        GenerationRequest("bad", prompt(10), GREEDY, refs(**{"00": 0.5, "01": 0.5})),
    ]
    results = run(engine, requests)
    assert [results[name, 0].finish_reason for name in ("base", "fine", "bad")] == ["length", "length", "abort"]
    assert isinstance(results["bad", 0].error, GenerationFailed)
    check_idle(engine)


def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the system start no more threads, as with `ulimit -u`."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


def test_cold_adapters_need_no_new_thread(tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build_engine(tiny_base, library(tiny_base, 4))
    no_threads(monkeypatch)
    requests = [GenerationRequest("base", prompt(10), GREEDY)]
    requests += [GenerationRequest(f"a{i}", prompt(10), GREEDY, refs(**{f"{i:02}": 1.0})) for i in range(4)]
    assert {result.finish_reason for result in run(engine, requests).values()} == {"length"}
    check_idle(engine)


def test_an_engine_without_threads_is_not_created(tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    start, num_started = threading.Thread.start, 0

    def start_five(thread: threading.Thread) -> None:
        nonlocal num_started
        num_started += 1
        if num_started > 5:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_five)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        build_engine(tiny_base)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("executor", [0, 1], ids=["readers", "placers"])
def test_a_load_without_a_thread_fails_the_adapters_requests(tiny_base: BaseModel, executor: int) -> None:
    engine = build_engine(tiny_base, library(tiny_base, 1))
    engine._loaders[executor].shutdown()
    requests = [
        GenerationRequest("base", prompt(10), GREEDY),
        GenerationRequest("cold", prompt(10), GREEDY, refs(**{"00": 1.0})),
    ]
    results = run(engine, requests)
    assert results["base", 0].finish_reason == "length"
    assert isinstance(results["cold", 0].error, Unavailable)
    check_idle(engine)
