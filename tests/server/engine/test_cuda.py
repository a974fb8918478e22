"""The engine on a GPU: answers equal transformers' on the CPU, few waits, concurrent loads, and memory."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.engine.backend import Backend
from server.engine.engine import Engine
from server.engine.guidance import Guidance
from server.engine.request import GenerationRequest
from server.engine.scheduler import SchedulerLimits
from server.engine.self_check import MAX_LENGTH, check
from server.engine.torch_backend import TorchBackend
from server.model.base.weights import BaseModel, load_base
from server.model.device import choose_device
from server.model.smollm import SmolLM
from server.serve.engine import step_bytes
from tests.kits.engines import GREEDY, build_engine, check_idle, random_adapter, refs, run
from tests.kits.gpu import NEEDS_GPU, waits
from tests.kits.grammars import guidance_of
from tests.server.engine.step_kit import EVERYTHING, LETTERS, PENALIZED, PLAIN, SAMPLED, decoding, rows
from tests.server.engine.test_engine import assert_follows_the_merged_model
from tests.server.engine.traffic import TIGHT, library, prompt, requests_of_all_kinds

pytestmark = NEEDS_GPU


@pytest.fixture(scope="module")
def tiny(tiny_base: BaseModel) -> BaseModel:
    """Return the tiny base in fp32, on the GPU."""
    choose_device("cuda", "fp32")
    return load_base(tiny_base.directory, torch.float32, "cuda")


@pytest.fixture(scope="module")
def real(base_dir: Path) -> BaseModel:
    """Return the real base as it is served, on the GPU."""
    device, dtype = choose_device("cuda", "auto")
    return load_base(base_dir, dtype, device)


@pytest.fixture(scope="module")
def guidance(tiny_base: BaseModel) -> Iterator[Guidance]:
    guidance = guidance_of(tiny_base.tokenizer, tiny_base.config.vocab_size, (2,))
    guidance.check(LETTERS)
    yield guidance
    guidance.close()


def test_requests_of_all_kinds(tiny: BaseModel, tiny_base_dir: Path) -> None:
    adapters, requests = library(tiny), requests_of_all_kinds(tiny, 32)
    model = SmolLM(tiny.config, tiny.weights, max_positions=512)
    engine = build_engine(tiny, adapters, model=model, num_blocks=24, block_size=8, max_rank=40, limits=TIGHT)
    results = run(engine, requests, arrivals=random.Random(0))
    check_idle(engine)
    engine.close()
    assert engine.stats.preemptions > 0
    greedy = [r for r in requests if r.sampling.temperature == 0 and r.sampling.repetition_penalty == 1]
    found = [results[request.request_id, 0] for request in greedy]
    assert_follows_the_merged_model(tiny_base_dir, adapters, greedy, found)


def test_bf16_ends_and_frees_everything(tiny_base: BaseModel) -> None:
    base = load_base(tiny_base.directory, torch.bfloat16, "cuda")
    engine = build_engine(base, library(base), num_blocks=24, block_size=8, max_rank=40, limits=TIGHT)
    results = run(engine, requests_of_all_kinds(base, 32), arrivals=random.Random(0))
    check_idle(engine)
    engine.close()
    assert all(result.finish_reason == "length" for result in results.values())


@pytest.mark.parametrize(
    ("requests", "num_waits"),
    [
        pytest.param(rows(), 3, id="plain"),
        pytest.param(rows(num_parts=1), 3, id="mixed"),
        pytest.param(rows(SAMPLED), 3, id="sampled"),
        pytest.param(rows(PENALIZED), 3, id="penalties"),
        pytest.param(rows(replace(PLAIN, logprobs=5)), 3, id="logprobs"),
        pytest.param(rows(EVERYTHING, num_parts=1, grammar=LETTERS), 5, id="everything"),
    ],
)
def test_a_step_waits_as_rarely_as_on_the_fake_gpu(
    tiny: BaseModel, guidance: Guidance, requests: list[GenerationRequest], num_waits: int
) -> None:
    """Counted by torch itself, which also sees waits within operations."""
    engine = build_engine(tiny, library(tiny), guidance=guidance, loads_at_once=True)
    decoding(engine, requests)
    found = waits(engine.step)
    engine.close()
    assert 1 <= len(found) <= num_waits, found


def cold_start(engine: Engine, cold: GenerationRequest) -> int:
    """Return the number of steps between the request's arrival and its admission."""
    before = engine.num_steps
    engine.add(cold)
    while engine.stats.num_waiting:
        engine.step()
    return engine.num_steps - before


@pytest.mark.real
def test_an_adapter_is_loaded_during_steps(real: BaseModel) -> None:
    """Others continue meanwhile. The adapter gets the rows of an idle one, and answers as when warm."""
    shape = real.config.shape
    adapters = {name: random_adapter(shape, seed, rank=64) for seed, name in enumerate(("cold", "other"))}
    warm = build_engine(real, adapters, max_rank=128)
    cold = GenerationRequest("cold", prompt(40), replace(GREEDY, max_tokens=24), refs(cold=1.0))
    expected = run(warm, [cold])["cold", 0]
    warm.close()
    engine = build_engine(real, adapters, max_rank=64)
    run(engine, [replace(cold, request_id="other", adapters=refs(other=1.0))])
    decoding(engine, rows(replace(PLAIN, max_tokens=400)))
    assert cold_start(engine, cold) >= 2
    assert engine.stats.adapter_evictions == 1
    found: list[int] = []
    while len(found) < len(expected.token_ids):
        outputs = [output for output in engine.step() if output.request_id == "cold"]
        found += [entry.chosen.token_id for output in outputs for entry in output.logprobs]
    engine.close()
    assert found[:8] == expected.token_ids[:8], "later ones may leave it at a near tie: its company is another"


@pytest.mark.real
def test_a_step_takes_no_more_memory_than_reserved(real: BaseModel) -> None:
    limits = SchedulerLimits.on("cuda", 8)
    engine = build_engine(real, num_blocks=1100, max_model_len=2048, limits=limits)
    requests = [
        GenerationRequest(f"r{i}", prompt(1900 - 7 * i, seed=i), replace(SAMPLED, max_tokens=40, logprobs=5))
        for i in range(8)
    ]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(engine, requests)
    engine.close()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= step_bytes(real.config, real.dtype.itemsize, limits, 2048)


def kernels_backend(base: BaseModel) -> Backend:
    """Return the backend in Triton kernels with CUDA graphs, as the server has it."""
    pytest.importorskip("triton", reason="needs triton")
    from server.engine.cuda_backend import CudaBackend
    from server.engine.cuda_graphs import capture_on_gpu

    capture = capture_on_gpu(base.device)
    return CudaBackend(base.config, base.weights, max_positions=2048, capture=capture)


@pytest.mark.real
def test_the_kernels_answer_as_torch_does(real: BaseModel) -> None:
    """In graphs and without; and a token's bits don't depend on its company."""
    oracle = TorchBackend(SmolLM(real.config, real.weights, max_positions=2048, pack=True))
    backend = kernels_backend(real)
    found = check(real, backend, oracle, MAX_LENGTH)
    assert not found.beyond
    assert found.is_batch_invariant
    assert not backend.fallbacks


@pytest.mark.real
@pytest.mark.parametrize(("num_parts", "per_layer"), [(0, 10), (1, 18), (2, 18)])
def test_a_decode_step_of_the_kernels_is_within_its_budgets(
    real: BaseModel, num_parts: int, per_layer: int
) -> None:
    """Of kernels, as the profiler counts them, in one graph; of waits, and of copies from the host."""
    engine = build_engine(real, library(real), max_model_len=2048, other=kernels_backend(real), loads_at_once=True)
    decoding(engine, rows(num_parts=num_parts))
    assert len(waits(engine.step)) <= 1
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        engine.step()
        torch.cuda.synchronize()
    engine.close()
    names = [event.name for event in profiler.events() or ()]
    on_gpu = [event.name for event in profiler.events() or () if str(event.device_type).endswith("CUDA")]
    assert names.count("cudaGraphLaunch") == 1
    assert len([name for name in on_gpu if "HtoD" in name]) <= 1
    kernels = [name for name in on_gpu if not name.startswith(("Memcpy", "Memset"))]
    assert real.config.num_layers * 9 < len(kernels) <= real.config.num_layers * per_layer + 12
