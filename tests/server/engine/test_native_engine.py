"""The native backend: a request's bits don't depend on other requests, in 16 bits."""

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import server.model.native.model as native_model_module
from server.engine.engine import Engine
from server.engine.native_backend import NativeBackend
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.scheduler import SchedulerLimits
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.model.huge_pages import HUGE_PAGE
from server.model.native.abi import call
from server.model.native.model import NativeModel
from tests.kits.engines import GREEDY, build_engine, random_adapter, refs, run
from tests.kits.native import native_model
from tests.kits.tiny import save_tiny_base

LENGTHS = (5, 70, 1, 64, 66, 130, 17, 33, 9, 100, 65, 3)
LONG = 2048  # from this number of positions on, threads share one sequence (kernels/step_attention.h)
BLENDS: tuple[dict[str, float], ...] = (
    {},
    {"a": 1.0},
    {"b": 1.0},
    {"a": 0.7, "b": -0.3},
    {"c": 2.0},
    {"a": 0.2, "b": 0.3, "c": 0.5},
)


TWO_BLOCKS = """
from pathlib import Path
from types import SimpleNamespace
import torch
from server.engine.backend import PagedCache

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

sizes = SimpleNamespace(num_layers=30, num_kv_heads=3, head_dim=64)
cache = PagedCache(sizes, 2000, 16, torch.bfloat16, torch.device("cpu"), by_block=True)
cache.k[0] = cache.k[0]  # torch begins to copy
before = resident()
for tensor in (cache.k, cache.v):
    tensor[1007:1009] = 1
print(resident() - before)
"""
"""The bytes of keys, and of values, that two blocks use."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    directory = save_tiny_base(tmp_path_factory.mktemp("native-engine") / "tiny", options=sizes, seed=4)
    return load_base(resolve_base(str(directory), directory.parent), torch.bfloat16)


def engine_of(base: BaseModel, native: NativeModel, strength: float) -> Engine:
    shape = base.config.shape
    adapters = {
        name: random_adapter(shape, seed, rank=rank, strength=strength)
        for seed, (name, rank) in enumerate({"a": 16, "b": 3, "c": 8}.items())
    }
    return build_engine(base, adapters, native=native)


def requests(num_tokens: int) -> list[GenerationRequest]:
    sampled = replace(GREEDY, temperature=0.9, seed=7)
    return [
        GenerationRequest(
            f"request-{index}",
            tuple(random.Random(index).choices(range(100, 500), k=length)),
            replace(sampled if index % 3 == 2 else GREEDY, max_tokens=num_tokens),
            refs(**BLENDS[index % len(BLENDS)]),
        )
        for index, length in enumerate(LENGTHS)
    ]


def test_a_lone_prompt_is_computed_in_one_step(base: BaseModel) -> None:
    limits = SchedulerLimits(max_prefill_tokens=200)
    engine = build_engine(base, native=native_model(base, num_threads=2), limits=limits)
    engine.add(replace(requests(1)[0], prompt_token_ids=tuple(range(100, 500))))
    engine.step()
    assert engine.has_work
    engine.step()
    assert not engine.has_work


def test_a_step_is_one_native_call(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds for prompts, decodes, adapters, blends and sampling. Only scores need more calls."""
    calls: list[str] = []

    def record(function: Callable[..., int], *arguments: object) -> None:
        calls.append(function.__name__)
        call(function, *arguments)

    engine = engine_of(base, native_model(base, num_threads=2), 1.0)
    monkeypatch.setattr(native_model_module, "call", record)
    assert len(run(engine, requests(6))) == len(LENGTHS)
    assert calls == ["smolora_draw"] * engine.num_steps
    calls.clear()
    nothing = SamplingParams(max_tokens=0)
    engine.add(GenerationRequest("scored", tuple(range(100, 120)), nothing, scored_from=3))
    engine.step()
    assert calls == ["smolora_forward", "smolora_logits"]


def test_scores_of_continuations_have_the_same_bits_alone_and_among_other_requests(base: BaseModel) -> None:
    """So whatever chunks and steps compute them, and whether their prompt is cached."""
    native = native_model(base, num_threads=2)
    continuations = tuple((100 + n % 3, 200 + n, 2) for n in range(20))
    scored = [
        replace(
            one,
            request_id=f"s{n}",
            sampling=SamplingParams(max_tokens=0),
            scored_from=len(one.prompt_token_ids),
            continuations=continuations,
        )
        for n, one in enumerate(requests(1))
    ]
    alone = [_scores(engine_of(base, native, 0.5), [one])[one.request_id] for one in scored]
    engine = engine_of(base, native, 0.5)
    for _ in range(2):
        found = _scores(engine, [*scored, *requests(20)])
        assert [found[one.request_id] for one in scored] == alone


def _scores(engine: Engine, asked: list[GenerationRequest]) -> dict[str, tuple[float, ...]]:
    for request in asked:
        engine.add(request)
    found: dict[str, tuple[float, ...]] = {}
    while engine.has_work:
        found |= {output.request_id: output.scores for output in engine.step() if output.finish_reason}
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is read")
def test_unused_blocks_take_no_memory(base: BaseModel) -> None:
    """It is measured in a new process."""
    done = subprocess.run([sys.executable, "-c", TWO_BLOCKS], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) <= 4 * HUGE_PAGE
    engine = build_engine(base, native=native_model(base, num_threads=2))
    assert isinstance(engine.runner.backend, NativeBackend)
    assert engine.runner.backend.cache.k.shape[:2] == (engine.blocks.num_blocks, base.config.num_layers)


def check_company(base: BaseModel, strength: float, num_tokens: int) -> None:
    native = native_model(base, num_threads=2)
    together = run(engine_of(base, native, strength), requests(num_tokens))
    for request in requests(num_tokens):
        alone = run(engine_of(base, native, strength), [request])  # its cache has no prefix of the prompt
        own = request.request_id, 0
        assert len(alone[own].token_ids) == num_tokens
        assert alone[own] == together[own]


def test_an_answer_does_not_depend_on_other_requests(base: BaseModel) -> None:
    """Tokens and log-probabilities, bit for bit, in 16 bits."""
    check_company(base, strength=0.3, num_tokens=20)


@pytest.mark.real
@pytest.mark.thorough  # a tiny base above; on this one end_to_end/test_native_parity.py has the answers
def test_an_answer_does_not_depend_on_other_requests_on_the_real_base(base_dir: Path) -> None:
    check_company(load_base(base_dir), strength=0.03, num_tokens=6)


def check_threads(base: BaseModel, threads: tuple[int, ...]) -> None:
    longest = 2 * LONG
    found = []
    for num_threads in threads:
        native = native_model(base, longest, num_threads)
        engine = build_engine(base, num_blocks=longest // 8, max_model_len=longest, native=native)
        sampled = replace(GREEDY, temperature=0.9, seed=7, max_tokens=12, logprobs=5)
        asked = [
            GenerationRequest(
                f"request-{index}", tuple(random.Random(index).choices(range(100, 500), k=length)), sampled
            )
            for index, length in enumerate((LONG + 100, LONG - 6, 60))
        ]
        found.append([run(engine, asked[:count]) for count in (1, 3)])
    assert all(one == found[0] for one in found)
    alone, together = found[0]
    assert alone == {own: replace(together[own], num_cached_tokens=0) for own in alone}
    assert all(together[own].num_cached_tokens > LONG for own in alone)


def test_long_contexts_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    """Their attention is divided differently: three threads share two key heads, each of which is split."""
    sizes = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2 * LONG,
    }
    directory = save_tiny_base(tmp_path / "tiny", options=sizes, seed=4)
    check_threads(load_base(resolve_base(str(directory), tmp_path), torch.bfloat16), (1, 3))


@pytest.mark.real
@pytest.mark.thorough  # a tiny base above
def test_long_contexts_do_not_depend_on_threads_on_the_real_base(base_dir: Path) -> None:
    check_threads(load_base(base_dir), (1, 2, 4))


def test_scores_and_minimum_lengths_do_not_change_an_answer(base: BaseModel) -> None:
    """Bit for bit. Meanwhile the scored prompts are computed in the same steps as other requests."""
    native = native_model(base, num_threads=2)
    end = (base.config.eos_token_ids[0], -100.0)
    plain = [replace(one, sampling=replace(one.sampling, logit_bias=(end,))) for one in requests(12)]
    found = run(engine_of(base, native, 0.3), plain)
    engine = engine_of(base, native, 0.3)
    for number, request in enumerate(plain):
        sampling = replace(request.sampling, min_tokens=12 * (number % 2))
        engine.add(replace(request, sampling=sampling, scored_from=1 if number % 3 else None))
    answers: dict[str, list[float]] = {}
    while engine.has_work:
        for output in engine.step():
            drawn = output.logprobs[len(output.scores) :]
            answers.setdefault(output.request_id, []).extend(entry.chosen.logprob for entry in drawn)
    assert answers == {name: result.logprobs for (name, _), result in found.items()}
