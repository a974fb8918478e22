"""The native forward pass compared with `SmolLM` on the same weights, which other tests compare with Hugging Face.

Its weights are bf16: `SmolLM` in fp32 on the same values is the reference, and `SmolLM` in bf16 shows the errors
of 16 bits. The native pass keeps sums and the residual stream in fp32, and must be more accurate than that.
"""

import ctypes
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from server.model.base.config import ModelConfig
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.model.lora_batch import LoraBatch, TokenRun
from server.model.native.build import NativeUnavailable
from server.model.native.model import ROW_FORMAT, NativeLora, NativeModel, StepTables
from server.model.rank_rows import Placement, RankRows, RowFormat
from server.model.smollm import NoAdapters, SmolLM
from tests.kits.engines import place, random_adapter
from tests.kits.native import SHAPES, native_library, widened
from tests.kits.tiny import save_tiny_base

CPU = torch.device("cpu")
MAX_POSITIONS = 512


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return native_library()


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, library: ctypes.CDLL) -> "Pair":
    architecture, options = SHAPES[request.param]
    directory = save_tiny_base(tmp_path_factory.mktemp("native") / "tiny", architecture, options, seed=3)
    converted = resolve_base(str(directory), directory.parent)
    return Pair.of(load_base(converted, torch.bfloat16), library)


@dataclass
class Pair:
    """One base in both forms, and two adapters."""

    base: BaseModel
    exact: SmolLM  # the same values in fp32
    native: NativeModel
    rows: RankRows
    exact_rows: RankRows
    placements: list[Placement]
    exact_placements: list[Placement]

    @classmethod
    def of(cls, base: BaseModel, library: ctypes.CDLL, strength: float = 0.3) -> "Pair":
        shape = base.config.shape
        adapters = [
            random_adapter(shape, 0, rank=16, strength=strength, dtype=torch.bfloat16),
            random_adapter(shape, 1, rank=3, modules=["q_proj", "o_proj", "up_proj", "down_proj"], layers=[0, 2]),
            random_adapter(
                shape, 2, rank=lambda key: 1 + (7 * key.layer + len(key.module)) % 11, strength=strength
            ),
        ]
        rows = RankRows(shape, max_rank=64, row_format=ROW_FORMAT, device=CPU)
        exact_rows = RankRows(shape, max_rank=64, row_format=RowFormat.of_torch(torch.float32, CPU), device=CPU)
        return cls(
            base,
            SmolLM(base.config, widened(base.weights), max_positions=MAX_POSITIONS),
            NativeModel(library, base.config, base.weights, max_positions=MAX_POSITIONS, num_threads=2),
            rows,
            exact_rows,
            place(rows, adapters),
            place(exact_rows, adapters),
        )

    @property
    def config(self) -> ModelConfig:
        return self.base.config

    def runs(self, placements: list[Placement], lengths: Sequence[int]) -> list[TokenRun]:
        """Return adapters: none for the first sequence, then an adapter, a blend with a negative weight, another;
        repeated."""
        blends: list[list[tuple[int, float]]] = [[], [(0, 1.0)], [(0, 0.5), (1, -0.7), (2, 1.5)], [(1, 1.0)]]
        runs, start = [], 0
        for index, length in enumerate(lengths):
            if blend := blends[index % len(blends)]:
                parts = tuple((placements[adapter], weight) for adapter, weight in blend)
                runs.append(TokenRun(start, start + length, parts))
            start += length
        return runs

    def lora(self, lengths: Sequence[int], with_adapters: bool) -> NativeLora:
        return NativeLora(self.rows, self.runs(self.placements, lengths) if with_adapters else [])

    @torch.inference_mode()
    def expected(self, sequences: Sequence[list[int]], with_adapters: bool) -> torch.Tensor:
        """Return fp32 logits of every token."""
        lengths = [len(sequence) for sequence in sequences]
        runs = self.runs(self.exact_placements, lengths) if with_adapters else []
        return self._torch(self.exact, sequences, LoraBatch(self.exact_rows, runs) if runs else NoAdapters())

    @torch.inference_mode()
    def in_torch_bf16(self, sequences: Sequence[list[int]]) -> torch.Tensor:
        model = SmolLM(self.config, self.base.weights, max_positions=MAX_POSITIONS)
        return self._torch(model, sequences, NoAdapters())

    @staticmethod
    def _torch(model: SmolLM, sequences: Sequence[list[int]], adapters: NoAdapters | LoraBatch) -> torch.Tensor:
        ids = torch.tensor([token for sequence in sequences for token in sequence])
        positions = torch.tensor([index for sequence in sequences for index in range(len(sequence))])
        return model.logits(model.forward(ids, positions, Causal([len(s) for s in sequences]), adapters))


@dataclass
class Causal:
    """Plain attention within each of the batch's sequences."""

    lengths: list[int]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = []
        for one in zip(*(x.split(self.lengths) for x in (q, k, v)), strict=True):
            q1, k1, v1 = (x.transpose(0, 1)[None] for x in one)
            parts.append(
                F.scaled_dot_product_attention(q1, k1, v1, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
            )
        return torch.cat(parts)


@dataclass
class Cache:
    """A cache with blocks in random order that contain another owner's leftovers."""

    config: ModelConfig
    block_size: int = 16
    num_blocks: int = 480
    k: torch.Tensor = field(init=False)
    v: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        shape = (self.num_blocks, config.num_layers, self.block_size, config.num_kv_heads, config.head_dim)
        self.k, self.v = (torch.full(shape, 1e3, dtype=torch.bfloat16) for _ in range(2))
        self._free = random.Random(0).sample(range(self.num_blocks), self.num_blocks)

    def table(self, length: int) -> list[int]:
        return [self._free.pop() for _ in range(-(-length // self.block_size))]


def sequences_of(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    chooser = random.Random(seed)
    return [[chooser.randrange(vocab_size) for _ in range(length)] for length in lengths]


def native_logits(
    pair: Pair,
    sequences: Sequence[list[int]],
    with_adapters: bool,
    *,
    cuts: Sequence[Sequence[int]] | None = None,
    block_size: int = 16,
    wanted: Callable[[int, int], int] = lambda index, length: length,
) -> torch.Tensor:
    """Return fp32 logits of every token. Sequences run together, each in pieces that end at its `cuts`. Of a piece
    of `length` tokens, only the logits of the last `wanted(index, length)` tokens are requested."""
    cuts = cuts or [[len(sequence)] for sequence in sequences]
    cache = Cache(pair.config, block_size)
    block_tables = [cache.table(len(sequence)) for sequence in sequences]
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    starts = [0] * len(sequences)
    for step in range(max(map(len, cuts))):
        ids: list[int] = []
        runs: list[tuple[int, int, int, int, int]] = []
        blocks: list[int] = []
        lengths: list[int] = []
        counts: list[int] = []
        start = 0
        for index, sequence in enumerate(sequences):
            stop = cuts[index][step] if step < len(cuts[index]) else starts[index]
            piece = sequence[starts[index] : stop]
            lengths.append(len(piece))
            counts.append(wanted(index, len(piece)))
            if piece:
                runs.append((start, start + len(piece), starts[index], len(blocks), counts[-1]))
            ids += piece
            blocks += block_tables[index]
            start += len(piece)
            starts[index] = stop
        step_tables = StepTables(
            np.array(ids, np.int64),
            np.array(runs, np.int64),
            np.array(blocks, np.int32),
            cache.k,
            cache.v,
            pair.lora(lengths, with_adapters),
        )
        hidden = pair.native.forward(step_tables)
        for index, part in enumerate(pair.native.logits(hidden).split(counts)):
            found[index].append(part)
    return torch.cat([part for parts in found for part in parts])


LENGTHS = (70, 1, 130, 3, 17, 48, 5, 97)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("block_size", [16, 32, 48])
def test_logits_are_closer_to_fp32_than_torchs_16_bits(pair: Pair, block_size: int) -> None:
    sequences = sequences_of(LENGTHS[:3], pair.config.vocab_size)
    expected = pair.expected(sequences, with_adapters=False)
    error = relative_error(native_logits(pair, sequences, False, block_size=block_size), expected)
    assert error < 0.02
    assert error < relative_error(pair.in_torch_bf16(sequences), expected)


def test_adapters_and_blends(pair: Pair) -> None:
    sequences = sequences_of(LENGTHS, pair.config.vocab_size)
    expected = pair.expected(sequences, with_adapters=True)
    found = native_logits(pair, sequences, with_adapters=True)
    assert relative_error(found, expected) < 0.03
    # They must have an effect.
    assert relative_error(native_logits(pair, sequences, with_adapters=False), expected) > 0.3


@pytest.mark.parametrize("with_adapters", [False, True])
def test_pieces_and_company_change_nothing(pair: Pair, with_adapters: bool) -> None:
    """Bitwise."""
    sequences = sequences_of(LENGTHS[:4], pair.config.vocab_size, seed=1)
    cuts = [[13, 40, 41, 42, 70], [1], [64, 66, 69, 130], [1, 2, 3]]
    whole = native_logits(pair, sequences, with_adapters)
    assert torch.equal(native_logits(pair, sequences, with_adapters, cuts=cuts), whole)
    alone = native_logits(pair, sequences[:1], with_adapters=False)
    assert torch.equal(alone, whole[: len(sequences[0])])


@pytest.mark.parametrize("with_adapters", [False, True])
@pytest.mark.parametrize("counts", [(1,) * 8, (0, 1, 65, 0, 17, 47, 0, 97), (0, 0, 0, 0, 0, 0, 0, 1)])
def test_requested_logits_have_the_same_bits(pair: Pair, counts: tuple[int, ...], with_adapters: bool) -> None:
    sequences = sequences_of(LENGTHS, pair.config.vocab_size, seed=4)
    whole = native_logits(pair, sequences, with_adapters).split(LENGTHS)
    found = native_logits(pair, sequences, with_adapters, wanted=lambda index, length: counts[index])
    expected = [logits[len(logits) - count :] for logits, count in zip(whole, counts, strict=True)]
    assert torch.equal(found, torch.cat(expected))


def test_step_without_requested_logits(pair: Pair) -> None:
    """Keys and values are cached anyway: the following tokens have the same bits."""
    sequences = sequences_of(LENGTHS[:4], pair.config.vocab_size, seed=5)
    ends = [[length - 1, length] if length > 1 else [0, 1] for length in LENGTHS[:4]]
    whole = native_logits(pair, sequences, with_adapters=True).split(LENGTHS[:4])
    found = native_logits(
        pair, sequences, with_adapters=True, cuts=ends, wanted=lambda index, length: int(length == 1)
    )
    assert torch.equal(found, torch.stack([logits[-1] for logits in whole]))


def test_decoding_token_by_token(pair: Pair) -> None:
    sequences = sequences_of((33, 20, 41, 2), pair.config.vocab_size, seed=2)
    cuts = [[30, 31, 32, 33], [16, 17, 18, 19, 20], [40, 41], [1, 2]]
    found = native_logits(pair, sequences, with_adapters=True, cuts=cuts)
    assert torch.equal(found, native_logits(pair, sequences, with_adapters=True))
    assert relative_error(found, pair.expected(sequences, with_adapters=True)) < 0.03


def test_an_overflow_shows(pair: Pair) -> None:
    sequences = sequences_of((9, 9), pair.config.vocab_size)
    runs = [TokenRun(0, 9, ((pair.placements[0], 1e30),))]
    cache = Cache(pair.config)
    blocks = cache.table(9) + cache.table(9)
    tables = StepTables(
        np.array(sequences[0] + sequences[1], np.int64),
        np.array([(0, 9, 0, 0, 9), (9, 18, 0, 1, 9)], np.int64),
        np.array(blocks, np.int32),
        cache.k,
        cache.v,
        NativeLora(pair.rows, runs),
    )
    logits = pair.native.logits(pair.native.forward(tables))
    assert not logits[:9].isfinite().any()
    assert logits[9:].isfinite().all()


def test_the_base_is_not_written(pair: Pair) -> None:
    before = [tensor.clone() for _, tensor in pair.base.weights.tensors()]
    native_logits(pair, sequences_of(LENGTHS, pair.config.vocab_size), with_adapters=True)
    after = [tensor for _, tensor in pair.base.weights.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_unsupported_bases_are_refused(tiny_base: BaseModel, library: ctypes.CDLL) -> None:
    with pytest.raises(NativeUnavailable, match="bf16"):
        NativeModel(library, tiny_base.config, tiny_base.weights, max_positions=8, num_threads=1)
    half = load_base(tiny_base.directory, torch.bfloat16)
    with pytest.raises(NativeUnavailable, match="head_dim is no multiple of 32"):
        NativeModel(library, half.config, half.weights, max_positions=8, num_threads=1)


@pytest.mark.real
@pytest.mark.thorough  # over HTTP: end_to_end/test_native_parity.py
def test_the_real_base(base_dir: Path, library: ctypes.CDLL) -> None:
    pair = Pair.of(load_base(base_dir), library, strength=0.05)
    sequences = sequences_of((150, 1, 70, 12), pair.config.vocab_size, seed=5)
    expected = pair.expected(sequences, with_adapters=False)
    found = native_logits(pair, sequences, with_adapters=False)
    ours, theirs = relative_error(found, expected), relative_error(pair.in_torch_bf16(sequences), expected)
    assert ours < min(0.6 * theirs, 0.02)
    blended = pair.expected(sequences, with_adapters=True)
    assert relative_error(native_logits(pair, sequences, with_adapters=True), blended) < 0.02
