"""The engine on the cuda backend, with the kernels' torch forms, against the torch backend."""

import random
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from server.engine import cuda_step
from server.engine.cuda_backend import CudaBackend
from server.engine.cuda_step import joined, upload
from server.engine.request import EngineStats, GenerationRequest, SamplingParams
from server.engine.sampling import LogitsRow
from server.engine.sequence import TokenCounts
from server.engine.torch_backend import TorchBackend
from server.model.base.weights import BaseModel, BaseWeights
from server.model.cuda.variants import Variant
from server.model.cuda.work import Ints
from server.model.rank_rows import Placement, Run
from server.model.smollm import SmolLM
from tests.kits.engines import GREEDY, Results, build_engine, check_idle, refs, run
from tests.kits.kernels import FAMILY, Launch, in_torch
from tests.server.engine.traffic import TIGHT, assert_same, library, requests_of_all_kinds
from tests.server.model.cuda.bases import two_layers


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return two_layers(tmp_path_factory.mktemp("base"))


def answers(
    base: BaseModel, requests: Sequence[GenerationRequest], launch: Launch | None, num_blocks: int, max_rank: int
) -> tuple[Results, EngineStats]:
    """Return the answers of the cuda backend with this launch, or of the torch backend."""
    cuda = None if launch is None else CudaBackend(base.config, base.weights, max_positions=512, launch=launch)
    engine = build_engine(
        base,
        library(base),
        num_blocks=num_blocks,
        max_rank=max_rank,
        limits=TIGHT,
        other=cuda,
        loads_at_once=True,  # otherwise the numbers of preemptions and evictions depend on threads
    )
    found = run(engine, requests, arrivals=random.Random(0))
    check_idle(engine)
    engine.close()
    return found, engine.stats


@pytest.mark.parametrize(("num_blocks", "max_rank"), [(256, 512), (14, 40)], ids=["roomy", "tight"])
def test_answers_are_the_torch_backends(base: BaseModel, num_blocks: int, max_rank: int) -> None:
    """Mixed batches, blends, cached prefixes; if room is tight, preemptions and evictions, too."""
    requests = requests_of_all_kinds(base, 9)
    requests += [replace(requests[i], request_id=f"{i} again") for i in (0, 4, 5)]
    expected, _ = answers(base, requests, None, num_blocks, max_rank)
    found, stats = answers(base, requests, in_torch(), num_blocks, max_rank)
    assert found.keys() == expected.keys()
    for key, result in expected.items():
        assert_same(found[key], result)
    assert stats.prefix_cached_tokens
    assert bool(stats.preemptions) == bool(stats.adapter_evictions) == (num_blocks == 14)


def test_a_decode_step_launches_a_bounded_number_of_kernels(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 for each layer, or 18 with any adapters and blends, and 3 for the tokens; one upload."""
    counts: Counter[str] = Counter()
    torch_forms = in_torch()

    def launch(variant: Variant, grid: tuple[int, ...], tensors: Sequence[torch.Tensor]) -> None:
        counts["launches"] += 1
        assert all(tensor.data_ptr() % 16 == 0 and tensor.is_contiguous() for tensor in tensors), variant
        torch_forms(variant, grid, tensors)

    def counted(words: Ints, to: torch.Tensor) -> None:
        counts["uploads"] += 1
        upload(words, to)

    monkeypatch.setattr(cuda_step, "upload", counted)
    backend = CudaBackend(base.config, base.weights, max_positions=512, launch=launch)
    engine = build_engine(base, library(base), other=backend, loads_at_once=True)
    plain = replace(GREEDY, logprobs=0, max_tokens=40)
    cases = ((((), ()), 10), ((refs(**{"00": 1.0}), refs(**{"02": 0.5, "03": -1.0})), 18))
    for adapters, most in cases:
        for number, held in enumerate(adapters):
            engine.add(GenerationRequest(f"{number} of {most}", (5, 6, 7), plain, held))
        while [bool(sequence.num_output_tokens) for sequence in engine.scheduler.running] != [True, True]:
            assert engine.has_work, "the one ended before the other's first token"
            engine.step()
        counts.clear()
        engine.step()
        assert counts == {"launches": most * base.config.num_layers + 3, "uploads": 1}
        while engine.has_work:
            engine.step()
    engine.close()


def test_plain_rows_are_drawn_by_the_kernel_and_others_by_torch(base: BaseModel) -> None:
    """A row's token is the torch backend's, and doesn't depend on the other rows."""
    drawn: list[int] = []
    torch_forms = in_torch()

    def launch(variant: Variant, grid: tuple[int, ...], tensors: Sequence[torch.Tensor]) -> None:
        drawn.extend(grid if len(tensors) == 3 and variant.kernel.__name__ == "gumbel_argmax" else ())
        torch_forms(variant, grid, tensors)

    backend = CudaBackend(base.config, base.weights, max_positions=64, launch=launch)
    oracle = TorchBackend(SmolLM(base.config, base.weights, max_positions=64))
    for one in (backend, oracle):
        one.allocate(4, 16, 16)
    hidden = torch.randn(6, base.config.hidden_size, generator=torch.Generator().manual_seed(1))
    plain = SamplingParams(temperature=0.9, seed=3)
    params = [
        plain,
        replace(plain, temperature=0.0),
        replace(plain, top_p=0.5),
        replace(plain, repetition_penalty=2.0),
        replace(plain, logprobs=2),
        replace(plain, temperature=1e-9),
    ]
    rows = [LogitsRow(param, i, 9, TokenCounts((1, 2, 3), 3)) for i, param in enumerate(params)]
    with torch.inference_mode():
        expected = [one.token_id for one in oracle.sample(hidden, rows)]
        assert [one.token_id for one in backend.sample(hidden, rows)] == expected
        assert drawn == [6]
        for i, row in enumerate(rows):
            assert backend.sample(hidden[i : i + 1], [row])[0].token_id == expected[i]


@pytest.mark.real
@pytest.mark.thorough
def test_the_real_base_answers_as_on_the_torch_backend(real_base: BaseModel) -> None:
    requests = [
        GenerationRequest("base", tuple(range(100, 130)), replace(GREEDY, max_tokens=5)),
        GenerationRequest("blend", (504, 260, 99), replace(GREEDY, max_tokens=5), refs(**{"00": 0.7, "03": -0.4})),
    ]
    expected, _ = answers(real_base, requests, None, 64, 64)
    found, _ = answers(real_base, requests, in_torch(), 64, 64)
    for key, result in expected.items():
        assert_same(found[key], result)


@pytest.mark.parametrize("num_parts", [0, 1, 2])
def test_the_lists_of_256_long_sequences_are_small(num_parts: int) -> None:
    """At 1,024 tokens each, with distinct adapters of rank 16 or blends of two: at most 256 kB in one upload."""
    config = replace(FAMILY["135M"], num_layers=1)
    weights = BaseWeights(torch.empty(1, config.hidden_size), (), torch.empty(0), torch.empty(0))
    backend = CudaBackend(config, weights, max_positions=1024, launch=in_torch())
    backend.allocate(4, 16, 16 * 256)
    needs = backend.rows.layout.needs(dict.fromkeys(config.shape.features, 16))
    placements = [
        Placement({group: Run(need, i * need.num_rows, i * need.num_units) for group, need in needs.items()})
        for i in range(256)
    ]
    chunks: list[Any] = []
    for i in range(256):
        parts = tuple((placements[(i + part) % 256], 0.5) for part in range(num_parts))
        hold = SimpleNamespace(refs=parts, parts=parts)
        sequence = SimpleNamespace(hold=hold, adapter_key=bytes([i]), block_table=array("i", range(64)))
        chunks.append(SimpleNamespace(sequence=sequence, start=1023, num_tokens=1, num_hidden=1, token_ids=(5,)))
    rows = [LogitsRow(SamplingParams(), i, 9, TokenCounts((), 0)) for i in range(256)]
    lists = backend._lists(chunks, rows)
    assert lists.num_parts == 4 * 256
    assert lists.has_adapters is bool(num_parts)
    words, _ = joined(list(lists.arrays.values()))
    assert 20_000 < words.nbytes <= 256_000
