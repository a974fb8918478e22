"""Graphs of steps, captured by a stand-in that refuses what a GPU would, with the kernels' torch forms."""

import logging
import random
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from server.engine.cuda_backend import CudaBackend
from server.engine.cuda_graphs import MAX_BYTES, SIZES, GraphSizes
from server.engine.request import SamplingParams
from server.engine.sampling import LogitsRow
from server.engine.sequence import TokenCounts
from server.model.base.weights import BaseModel
from server.model.cuda.variants import Variant
from server.model.rank_rows import Placement
from tests.kits.captured import CapturingLaunch, NotCapturable
from tests.kits.engines import build_engine, check_idle, place, random_adapter, run
from tests.kits.kernels import FAMILY, in_torch
from tests.server.engine.traffic import TIGHT, assert_same, library, requests_of_all_kinds
from tests.server.model.cuda.bases import layers, two_layers

BLOCK = 16
MAX_POSITIONS = 600  # three splits of attention


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return two_layers(tmp_path_factory.mktemp("base"))


def backend_of(base: BaseModel, max_num_seqs: int) -> tuple[CudaBackend, CapturingLaunch]:
    capturing = CapturingLaunch(in_torch())
    backend = CudaBackend(
        base.config,
        base.weights,
        max_positions=MAX_POSITIONS,
        max_num_seqs=max_num_seqs,
        launch=capturing.launch,
        capture=capturing.capture,
    )
    return backend, capturing


def filled(backend: CudaBackend, num_blocks: int) -> list[Placement]:
    """Allocate the backend's memory, fill it with random numbers, and return the places of four adapters."""
    backend.allocate(num_blocks, BLOCK, 64)
    generator = torch.Generator().manual_seed(3)
    for cache in (backend.cache.k, backend.cache.v):
        cache.copy_(torch.randn(cache.shape, generator=generator))
    shape = backend.config.shape
    return place(backend.rows, [random_adapter(shape, i, rank=rank) for i, rank in enumerate((1, 8, 16, 20))])


def step(num: int, placements: list[Placement], seed: int) -> tuple[list[Any], list[LogitsRow], list[int]]:
    """Return the chunks and rows of a decode step of `num` sequences, and the cache slots of its tokens."""
    rng = random.Random(seed)
    chunks: list[Any] = []
    slots = []
    for i in range(num):
        start = rng.choice((3, 40, 255, 256, 511, 590))
        table = array("i", [1 + i]) * (start // BLOCK + 1)  # every page is the sequence's own block
        num_parts = 1 if i == 0 else rng.randint(0, 2)
        parts = tuple((rng.choice(placements), rng.uniform(-1, 1)) for _ in range(num_parts if placements else 0))
        hold = SimpleNamespace(refs=parts, parts=parts)
        sequence = SimpleNamespace(hold=hold, adapter_key=bytes([i]), block_table=table)
        token_ids = (rng.randrange(20, 500),)
        chunks.append(
            SimpleNamespace(sequence=sequence, start=start, num_tokens=1, num_hidden=1, token_ids=token_ids)
        )
        slots.append((1 + i) * BLOCK + start % BLOCK)
    rows = []
    for i in range(num):
        params = SamplingParams(temperature=(0.0, 0.9)[i % 2], seed=i, top_p=(1.0, 0.9)[i % 5 == 0])
        rows.append(LogitsRow(params, i, 9, TokenCounts((), 0)))
    return chunks, rows, slots


@torch.inference_mode()
def test_every_size_answers_as_steps_without_graphs_do(base: BaseModel) -> None:
    """With and without adapters, the most and the fewest tokens of each size: the same tokens, keys and values.

    Nothing else is written except the scratch slot. 18 or 10 launches for each layer, and 5 more.
    """
    with_graphs, capturing = backend_of(base, 256)
    plain = CudaBackend(base.config, base.weights, max_positions=MAX_POSITIONS, launch=in_torch())
    places = filled(with_graphs, 258), filled(plain, 258)
    most = [per_layer * base.config.num_layers + 5 for per_layer in (18, 10)]
    assert capturing.graph_sizes == most * len(SIZES)
    for number, size in enumerate(SIZES):
        for has_adapters in (True, False):
            num = size if has_adapters == (number % 2 == 0) else (0, *SIZES)[number] + 1
            before = with_graphs.cache.k.clone()
            results = []
            for backend, placements in zip((with_graphs, plain), places, strict=True):
                chunks, rows, slots = step(num, placements if has_adapters else [], seed=number)
                results.append(backend.draw(chunks, (), rows))
            assert results[0] == results[1]
            written = torch.zeros(with_graphs.cache.k.shape[1] * BLOCK, dtype=torch.bool)
            written[slots] = True
            changed = (before != with_graphs.cache.k).flatten(1, 2).flatten(2).any(2)  # (layers, slots)
            changed[:, 0] = False  # the scratch slot
            assert torch.equal(changed, written.expand(len(changed), -1))
            for name in ("k", "v"):
                caches = [getattr(backend.cache, name)[:, 1:] for backend in (with_graphs, plain)]
                assert torch.equal(*caches)
    assert capturing.num_replays == 2 * len(SIZES)


def test_launches_of_thirty_layers(tmp_path: Path) -> None:
    """As the 135M base has: at most 552 with adapters and blends, and 312 without."""
    with torch.inference_mode():
        backend, capturing = backend_of(layers(tmp_path, 30), 2)
        filled(backend, 4)
    assert capturing.graph_sizes == [545, 305] * 2


@torch.inference_mode()
def test_steps_that_no_graph_fits_run_without(base: BaseModel) -> None:
    backend, capturing = backend_of(base, 8)
    placements = filled(backend, 32)
    chunks, rows, _ = step(9, placements, seed=1)
    backend.draw(chunks, (), rows)  # more tokens than the largest graph has
    chunks, rows, _ = step(3, placements, seed=1)
    chunks[2].num_hidden = 0  # a token after which none is drawn
    backend.draw(chunks, (), rows[:2])
    chunks[2].num_hidden = 1
    chunks[0].sequence.hold.parts = tuple((placements[3], 0.1) for _ in range(200))
    backend.draw(chunks, (), rows)  # more work items than a graph has room for
    num_replays = [capturing.num_replays]
    chunks, rows, _ = step(3, placements, seed=1)
    backend.draw(chunks, (), rows)
    num_replays.append(capturing.num_replays)
    assert num_replays == [0, 1]


def test_the_engines_answers_are_the_torch_backends(base: BaseModel) -> None:
    requests = requests_of_all_kinds(base, 9)
    results = []
    for backend, capturing in (backend_of(base, 32), (None, None)):
        engine = build_engine(base, library(base), num_blocks=40, max_rank=60, limits=TIGHT, other=backend)
        results.append(run(engine, requests, arrivals=random.Random(0)))
        check_idle(engine)
        engine.close()
        assert capturing is None or capturing.num_replays >= 15
    for key, expected in results[1].items():
        assert_same(results[0][key], expected)


def test_memory_is_what_the_sizes_say_and_bounded(base: BaseModel) -> None:
    backend, _ = backend_of(base, 48)
    backend.allocate(4, BLOCK, 16)
    sizes = GraphSizes.fitting(base.config, 4, 48, MAX_POSITIONS, BLOCK)
    assert sizes is not None
    assert sizes.num_tokens == 48
    assert backend.graphs is not None
    assert backend.graphs.num_bytes == sizes.num_bytes(4)
    for name, config in FAMILY.items():
        found = GraphSizes.fitting(config, 2, 256, 8192, BLOCK)
        assert found is not None
        assert found.num_tokens == 256, name
        assert found.num_bytes(2) <= MAX_BYTES
        longer = GraphSizes.fitting(config, 2, 256, 65_536, BLOCK)
        assert longer is not None
        assert 32 <= longer.num_tokens <= 256
        assert longer.num_bytes(2) <= MAX_BYTES


def test_after_a_failed_capture_steps_run_without_graphs(
    base: BaseModel, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(work: Callable[[], object]) -> Callable[[], object]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    backend = CudaBackend(base.config, base.weights, max_positions=64, launch=in_torch(), capture=fail)
    with caplog.at_level(logging.ERROR):
        placements = filled(backend, 8)
    assert backend.fallbacks == ["no CUDA graphs (RuntimeError): see the log"]
    assert "the host launches each kernel" in caplog.text
    chunks, rows, _ = step(3, placements, seed=1)
    for chunk in chunks:
        chunk.start = 3
    with torch.inference_mode():
        assert len(backend.draw(chunks, (), rows)) == 3


VARIANT = Variant(print, (), {})  # type: ignore[arg-type]  # never launched


def faults(capturing: CapturingLaunch) -> dict[str, Callable[[], object]]:
    """Return work that a graph can't contain."""
    given = torch.zeros(4)
    grids, kept = iter(range(1, 9)), list[torch.Tensor]()

    some: Any = None  # a stream or an event, which can't be made without a GPU

    def another_address() -> None:
        kept.append(given[len(kept) :])
        capturing.launch(VARIANT, (1,), (kept[-1],))

    return {
        "an allocation": lambda: torch.empty(3),
        "a result that is allocated": lambda: given + 1,
        "a host read": lambda: given.tolist(),
        "one number's read": lambda: given[0].item(),
        "a copy to the host": lambda: given.cpu(),
        "a branch on a tensor": lambda: bool(given[0]),
        "a wait for the device": lambda: torch.cuda.synchronize(),
        "a wait for a stream": lambda: torch.cuda.Stream.synchronize(some),
        "a wait for an event": lambda: torch.cuda.Event.synchronize(some),
        "a look at an event": lambda: torch.cuda.Event.query(some),
        "an unknown write": lambda: given.add_(1),
        "another address": another_address,
        "another grid": lambda: capturing.launch(VARIANT, (next(grids),), (given,)),
    }


@pytest.mark.parametrize("name", faults(CapturingLaunch(in_torch())))
def test_the_stand_in_refuses(name: str) -> None:
    capturing = CapturingLaunch(lambda variant, grid, tensors: None)
    work = faults(capturing)[name]
    with torch.inference_mode(), pytest.raises(NotCapturable):
        capturing.capture(work)()
