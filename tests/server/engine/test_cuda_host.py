"""The host's work in a decode step on the cuda backend: time, uploads and waits. Kernels do nothing here.

A step of 256 sequences of 1,024 tokens may take 2.7 ms of the host's time, and one upload of 256 kB with adapters
of rank 16. Higher ranks have more work items: blends of two of rank 32 upload 289 kB, and of rank 64 461 kB.
"""

import statistics
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from server.engine.cuda_backend import CudaBackend
from server.engine.cuda_step import upload
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.sampling import LogitsRow
from server.engine.sequence import TokenCounts
from server.model.base.weights import BaseModel
from server.model.cuda.variants import Variant
from server.model.cuda.work import Ints
from server.model.rank_rows import Placement, Run
from tests.kits.engines import build_engine, refs
from tests.kits.fake_gpu.cuda import fake_cuda, on_card
from tests.server.engine.step_kit import decoding
from tests.server.engine.traffic import library, prompt
from tests.server.model.cuda.bases import two_layers

NUM_SEQS, NUM_TOKENS, NUM_STEPS = 256, 1024, 30
MAX_SECONDS, MAX_BYTES = 2.7e-3, 256_000


def launch(variant: Variant, grid: tuple[int, ...], tensors: Sequence[torch.Tensor]) -> None:
    name = variant.kernel.__name__
    if name == "gumbel_argmax":
        tensors[2].fill_(77)
    elif name == "linear":  # logits have to be finite
        tensors[2].zero_()


def capture(work: Callable[[], object]) -> Callable[[], object]:
    return lambda: None


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return two_layers(tmp_path_factory.mktemp("base"))


def sequences(backend: CudaBackend, num_parts: int) -> list[Any]:
    """Return what a step needs of sequences, each with its own adapter of rank 16 or a blend of two."""
    needs = backend.rows.layout.needs(dict.fromkeys(backend.config.shape.features, 16))
    placements = [
        Placement({group: Run(need, i * need.num_rows, i * need.num_units) for group, need in needs.items()})
        for i in range(NUM_SEQS)
    ]
    found = []
    for i in range(NUM_SEQS):
        parts = tuple((placements[(i + part) % NUM_SEQS], 0.5) for part in range(num_parts))
        hold = SimpleNamespace(refs=parts, parts=parts)
        table = array("i", [1 + (i + page) % 500 for page in range(NUM_TOKENS // 16)])
        found.append(SimpleNamespace(hold=hold, adapter_key=bytes([i]), block_table=table))
    return found


@pytest.mark.parametrize("num_parts", [0, 1, 2])
def test_256_sequences_take_little_time_and_one_small_upload(
    base: BaseModel, num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[int] = []

    def counted(words: Ints, to: torch.Tensor) -> None:
        uploads.append(words.nbytes)
        upload(words, to)

    monkeypatch.setattr("server.engine.cuda_graphs.upload", counted)
    backend = CudaBackend(base.config, base.weights, max_positions=2048, launch=launch, capture=capture)
    backend.allocate(512, 16, 16 * NUM_SEQS)
    known = sequences(backend, num_parts)
    counts, seconds = TokenCounts((), 0), []
    with torch.inference_mode():
        for number in range(NUM_STEPS):
            chunks: list[Any] = [
                SimpleNamespace(
                    sequence=one, start=NUM_TOKENS - 1, num_tokens=1, num_hidden=1, token_ids=(number,)
                )
                for one in known
            ]
            params = SamplingParams(temperature=0.8, seed=number)
            rows = [LogitsRow(params, i, number, counts) for i in range(NUM_SEQS)]
            begun = time.thread_time()
            tokens = backend.draw(chunks, (), rows)
            seconds.append(time.thread_time() - begun)
            assert [token.token_id for token in tokens] == [77] * NUM_SEQS
    assert len(uploads) == NUM_STEPS
    assert 20_000 < max(uploads) <= MAX_BYTES
    assert min(seconds) <= MAX_SECONDS, statistics.median(seconds)


@pytest.mark.parametrize(
    ("given", "num_waits"),
    [
        ({"temperature": 0.0}, 1),
        ({}, 1),
        ({"repetition_penalty": 1.2}, 1),
        ({"top_p": 0.9}, 2),
        ({"logprobs": 5}, 2),
    ],
)
@pytest.mark.parametrize("num_parts", [0, 2])
def test_a_step_waits_for_its_tokens_alone(
    base: BaseModel, num_parts: int, given: dict[str, Any], num_waits: int
) -> None:
    """On the fake GPU, which counts every wait and every copy from the host.

    Top-p and log-probabilities are torch's operations: a second wait.
    """
    sampling = replace(SamplingParams(max_tokens=50, temperature=0.8, ignore_eos=True), **given)
    with fake_cuda() as card:
        card_base = on_card(base)
        backend = CudaBackend(
            base.config, card_base.weights, max_positions=512, max_num_seqs=8, launch=launch, capture=capture
        )
        engine = build_engine(card_base, library(base), other=backend, loads_at_once=True)
        requests = [
            GenerationRequest(
                f"r{i}",
                prompt(20 + i, seed=i),
                replace(sampling, seed=i),
                refs(**{f"{(i + part) % 16:02}": 0.5 for part in range(num_parts)}),
            )
            for i in range(8)
        ]
        decoding(engine, requests)
        engine.speculator.extend = list  # type: ignore[assignment,method-assign]  # equal tokens are easy to guess
        card.main.clear()
        engine.step()
        waits, uploads = [what for what, _ in card.main.waits.elements()], dict(card.main.uploads)
        num_kernels = card.main.num_kernels
        engine.close()
    assert waits == ["tolist"] * num_waits
    if not given or given == {"temperature": 0.0}:
        assert uploads == {torch.int32: 1}
        assert num_kernels <= 1
