"""Engines for tests: built over a loaded base, given requests, and run to the end. No code under test is replaced.

The engine returns token ids with log-probabilities only, so every request here asks for one log-probability.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, TypeVar

import torch

from adapters.errors import SmoloraError
from adapters.lora import MODULES, AdapterRef, BaseShape, LoraModule, LoraWeights, ModuleKey
from server.engine.adapter_pool import AdapterPool, Load
from server.engine.backend import Backend
from server.engine.detokenizer import TokenBytes
from server.engine.engine import Engine, EngineConfig
from server.engine.guidance import Guidance
from server.engine.native_backend import NativeBackend
from server.engine.request import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    SequenceOutput,
)
from server.engine.scheduler import SchedulerLimits
from server.engine.torch_backend import TorchBackend
from server.model.base.weights import BaseModel
from server.model.native.model import NativeModel
from server.model.rank_rows import Placement, RankRows, Run
from server.model.smollm import SmolLM
from server.model.text.tokenizer import BaseTokenizer, vocabulary_of

P = ParamSpec("P")
T = TypeVar("T")

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=1)


class Immediate(Executor):
    """An executor that runs each call before `submit` returns."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def token_bytes(tokenizer: BaseTokenizer) -> TokenBytes:
    return TokenBytes(*vocabulary_of(tokenizer))


class EngineLoadingAtOnce(Engine):
    """Loads adapters in the step that asks for them, so that its steps don't depend on the speed of threads."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.pool._placers = self.pool._reads._readers = Immediate()


def build_engine(
    base: BaseModel,
    adapters: Mapping[str, LoraWeights] | Load | None = None,
    *,
    num_blocks: int = 256,
    block_size: int = 16,
    max_rank: int = 512,
    max_model_len: int = 512,
    limits: SchedulerLimits | None = None,
    wake: Callable[[], None] = lambda: None,
    model: SmolLM | None = None,
    guidance: Guidance | None = None,
    native: NativeModel | None = None,
    other: Backend | None = None,
    loads_at_once: bool = False,
) -> Engine:
    """Return an engine with `num_blocks` usable blocks and a total rank of at most `max_rank` on all modules.

    Its backend is torch's, or that of `native`, or `other`.
    """
    adapters = {} if adapters is None else adapters
    model = model or SmolLM(base.config, base.weights, max_positions=max_model_len)
    backend: Backend = TorchBackend(model)
    rank_bytes, block_bytes = backend.bytes_per_rank, backend.bytes_per_block(block_size)
    if native is not None:
        backend = NativeBackend(native)
    backend = other or backend
    config = EngineConfig(
        max_model_len=max_model_len,
        kv_cache_bytes=num_blocks * block_bytes,
        adapter_cache_bytes=max_rank * rank_bytes,
        block_size=block_size,
        scheduler=limits or SchedulerLimits(),
    )
    load = adapters.__getitem__ if isinstance(adapters, Mapping) else adapters
    make = EngineLoadingAtOnce if loads_at_once else Engine
    return make(backend, token_bytes(base.tokenizer), load, config, guidance=guidance, wake=wake)


def random_adapter(
    shape: BaseShape,
    seed: int,
    *,
    rank: int | Callable[[ModuleKey], int] = 8,
    modules: Iterable[str] = MODULES,
    layers: Iterable[int] | None = None,
    strength: float = 0.3,
    dtype: torch.dtype = torch.float32,
) -> LoraWeights:
    """Return random A and B whose product changes a module's output by about `strength` times its input's norm."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[ModuleKey, LoraModule] = {}
    for layer in range(shape.num_layers) if layers is None else layers:
        for name in modules:
            key = ModuleKey(layer, name)
            out, inputs = shape.features[name]
            r = rank if isinstance(rank, int) else rank(key)
            a = torch.randn(r, inputs, generator=generator) / inputs**0.5
            b = torch.randn(out, r, generator=generator) / (r * out) ** 0.5
            scaling = 0.5 + torch.rand((), generator=generator).item()
            found[key] = LoraModule(a.to(dtype), (b * strength * inputs**0.5 / scaling).to(dtype), scaling)
    return LoraWeights(found)


def refs(**weights: float) -> tuple[AdapterRef, ...]:
    """Return a canonical set of adapters from digest=weight."""
    return tuple(sorted(AdapterRef(digest, weight) for digest, weight in weights.items()))


@dataclass
class Result:
    """The engine's output for one choice of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: SmoloraError | None = None

    def take(self, output: SequenceOutput) -> None:
        assert self.finish_reason is None, "news of a choice that has ended"
        self.token_ids += [entry.chosen.token_id for entry in output.logprobs]
        self.logprobs += [entry.chosen.logprob for entry in output.logprobs]
        assert output.num_output_tokens == len(self.token_ids)
        self.text += output.text
        self.num_cached_tokens = output.num_cached_tokens
        self.finish_reason, self.error = output.finish_reason, output.error


Results = dict[tuple[str, int], Result]


def run(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    *,
    arrivals: random.Random | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> Results:
    """Run requests to the end. Return {(request id, choice): result}. `arrivals`: they come at random steps."""
    requests = [replace(r, sampling=replace(r.sampling, logprobs=max(r.sampling.logprobs, 1))) for r in requests]
    results = {(request.request_id, index): Result() for request in requests for index in range(request.n)}
    coming = list(requests)
    if arrivals is not None:
        arrivals.shuffle(coming)
    num_idle = 0
    deadline = time.process_time() + 300  # processor time, since other processes may use the cores
    while coming or engine.has_work:
        assert num_idle < 50_000, f"the engine is idle but has work: {engine.stats}"
        assert time.process_time() < deadline, f"the engine doesn't finish: {engine.stats}"
        while coming and (arrivals is None or not engine.has_work or arrivals.random() < 0.5):
            request = coming.pop(0)
            engine.check(request)
            engine.add(request)
        num_steps = engine.num_steps
        outputs = engine.step()
        for output in outputs:
            results[output.request_id, output.index].take(output)
        after_step()
        if engine.num_steps == num_steps and not outputs:
            time.sleep(0.0005)  # an adapter is being loaded
            num_idle += 1
    return results


def check_idle(engine: Engine) -> None:
    """Assert that no blocks or adapters are in use."""
    assert not engine.has_work
    engine.blocks.check([])
    assert engine.blocks.num_used_blocks == 0
    assert not engine._streams
    check_pool(engine.pool)
    assert all(adapter.num_holds == 0 for adapter in engine.pool._adapters.values())


def check_pool(pool: AdapterPool) -> None:
    """Assert that the pool's free rows are exactly the rows that no resident adapter covers."""
    for (group, kind), extents in pool._spaces.items():
        covered: set[int] = set()
        for adapter in pool._adapters.values():
            if adapter.placement is None or group not in adapter.placement:
                continue
            place = adapter.placement[group]
            first, length = (
                (place.first_row, place.rows.num_rows)
                if kind == "rows"
                else (place.first_unit, place.rows.num_units)
            )
            indices = set(range(first, first + length))
            assert not indices & covered, "two adapters share rows"
            covered |= indices
        free = {index for start, gap in extents._free for index in range(start, start + gap)}
        assert free == set(range(extents.capacity)) - covered
        assert extents.num_free == len(free)


def place(rows: RankRows, adapters: Sequence[LoraWeights], seed: int = 0) -> list[Placement]:
    """Put adapters into the pools in a random order, with gaps; all other rows are NaN."""
    rng = random.Random(seed)
    for tensor in (*rows.a.values(), *rows.b.values()):
        tensor.fill_(float("nan"))
    next_row: Counter[str] = Counter()
    next_unit: Counter[str] = Counter()
    placements: dict[int, Placement] = {}
    for i in rng.sample(range(len(adapters)), len(adapters)):
        runs: dict[str, Run] = {}
        for group, needs in rows.needs(adapters[i]).items():
            first_row, first_unit = next_row[group] + rng.randrange(3), next_unit[group] + rng.randrange(5)
            runs[group] = Run(needs, first_row, first_unit)
            next_row[group], next_unit[group] = first_row + needs.num_rows, first_unit + needs.num_units
            assert next_row[group] <= rows.num_rows(group), "the test's pool is too small"
            assert next_unit[group] <= rows.num_units(group), "the test's pool is too small"
        placements[i] = Placement(runs)
        rows.place(adapters[i], placements[i])
    return [placements[i] for i in range(len(adapters))]
