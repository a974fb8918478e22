"""The backend in Triton kernels, for NVIDIA GPUs. Not yet run on a GPU, so no setting chooses it yet.

A step uploads one buffer of lists, and launches ten kernels for each layer, and two more for each group of modules
if tokens have adapters. It waits for the device once, for the chosen tokens. The step's tensors are views of
buffers that only grow, so their addresses stay the same. The torch backend is its test oracle.
"""

import math
import struct
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from server.engine.backend import Backend, StepAdapters
from server.engine.sampling import MIN_TEMPERATURE, LogitsRow, Sampled, noise_key, sample
from server.engine.sequence import Chunk
from server.model.base.config import ModelConfig
from server.model.base.weights import BaseWeights
from server.model.cuda.lora import TILE
from server.model.cuda.variants import Variant, launch, variants
from server.model.cuda.work import GroupItems, Ints, attention_work, lora_work
from server.model.device import to_device
from server.model.ops.norms import rotary_table
from server.model.rank_rows import RowFormat

Launch = Callable[[Variant, tuple[int, ...], Seq[torch.Tensor]], None]
_MAX_SHORT = 32
"""Steps of more tokens use the tall form of products, which reads weights less often and has the same bits."""
_MAX_PROGRAMS = 1024
"""Programs of a kernel over a list of work; each may take several items."""


@dataclass(frozen=True, eq=False)
class _GroupLists:
    """The work of one group of modules on the device, as `lora_shrink` and `lora_expand` take it."""

    items: torch.Tensor
    ranges: torch.Tensor
    num_items: torch.Tensor
    num_programs: int


@dataclass(frozen=True, eq=False)
class _Step:
    """One step's lists on the device, and their sizes."""

    num_tokens: int
    token_ids: torch.Tensor  # (tokens,)
    positions: torch.Tensor  # (tokens,)
    slots: torch.Tensor  # (tokens,): where each token's keys and values go
    needed: torch.Tensor  # (rows,): the tokens whose hidden states are returned
    tables: torch.Tensor  # the pages of all sequences
    works: torch.Tensor
    parts: torch.Tensor
    num_parts: int
    counts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # tokens, works, chunks
    chunks: torch.Tensor | None  # of tokens that have adapters
    groups: dict[str, _GroupLists]
    words: torch.Tensor  # (rows, 3): `_words` of the tokens to draw


class CudaBackend(Backend):
    """A backend that computes with the kernels of `server.model.cuda`."""

    is_batch_invariant = True

    def __init__(
        self, config: ModelConfig, weights: BaseWeights, *, max_positions: int, launch: Launch = launch
    ) -> None:
        """`launch` runs a kernel; tests give another one."""
        dtype, device = weights.embed.dtype, weights.embed.device
        super().__init__(config, RowFormat(dtype, dtype), dtype, device)
        self._weights = weights
        self._launch = launch
        self._cos, self._sin = rotary_table(max_positions, config.head_dim, config.rope_theta).to(weights.embed)
        self._variants: dict[str, Variant] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._counts: dict[int, torch.Tensor] = {}  # numbers of rows, on the device
        self._adapters: StepAdapters[tuple[Ints, dict[str, GroupItems]] | None] = StepAdapters(
            lambda runs: lora_work(runs, self.rows.layouts) if runs else None
        )

    def allocate(self, num_blocks: int, block_size: int, max_rank: int) -> None:
        super().allocate(num_blocks, block_size, max_rank)
        self._variants = variants(self.config, block_size)

    def hidden(self, decodes: Seq[Chunk], prefills: Seq[Chunk]) -> torch.Tensor:
        return self._forward(self._prepare((*decodes, *prefills), ()))

    def _forward(self, step: _Step) -> torch.Tensor:
        config, weights, num = self.config, self._weights, step.num_tokens
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        stream = self._buffer("stream", num, config.hidden_size)  # the residual stream
        x = self._buffer("x", num, config.hidden_size)
        qkv = self._buffer("qkv", num, heads + 2 * kv_heads, dim)
        q, attended = (self._buffer(name, num, heads, dim) for name in ("q", "attended"))
        part_out = self._buffer("part_out", step.num_parts, heads, dim, dtype=torch.float32)
        part_lse = self._buffer("part_lse", step.num_parts, heads, dtype=torch.float32)
        gate_up = self._buffer("gate_up", num, 2 * config.intermediate_size)
        inner = self._buffer("inner", num, config.intermediate_size)
        swiglu = self._variants["swiglu"]
        tiles = -(-config.intermediate_size // int(swiglu.constants["BLOCK"]))
        num_programs = min(len(step.works), _MAX_PROGRAMS)
        torch.index_select(weights.embed, 0, step.token_ids, out=stream)
        for index, layer in enumerate(weights.layers):
            k_cache, v_cache = self.cache.k[index], self.cache.v[index]
            self._norm(stream, layer.input_norm, x)
            self._product("qkv", step, index, x, layer.qkv, qkv.view(num, -1))
            rotary = "rotary_write, not rotated" if index in config.nope_layers else "rotary_write"
            tensors = (qkv, self._cos, self._sin, step.positions, step.slots, q, k_cache, v_cache)
            self._launch(self._variants[rotary], (num, heads + 2 * kv_heads), tensors)
            tensors = (q, k_cache, v_cache, step.tables, step.works, step.counts[1], part_out, part_lse)
            self._launch(self._variants["attention_split"], (num_programs, kv_heads), tensors)
            combined = (part_out, part_lse, step.parts, attended)
            self._launch(self._variants["attention_combine"], (num, heads), combined)
            self._product("o", step, index, attended.view(num, -1), layer.o, stream)
            self._norm(stream, layer.post_norm, x)
            self._product("gate_up", step, index, x, layer.gate_up, gate_up)
            self._launch(swiglu, (num, tiles), (gate_up, inner))
            self._product("down", step, index, inner, layer.down, stream)
        last = stream.index_select(0, step.needed)
        found = torch.empty_like(last)
        if len(last):
            self._norm(last, weights.final_norm, found)
        return found

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        num = len(hidden)
        found = torch.empty(num, self.config.vocab_size, dtype=torch.float32, device=self._device)
        if num:
            if num not in self._counts:
                self._counts[num] = to_device(torch.tensor([num], dtype=torch.int32), self._device)
            self._linear("head", self._counts[num], num, hidden.contiguous(), self._weights.lm_head, found)
        return found

    def sample(self, hidden: torch.Tensor, rows: Seq[LogitsRow]) -> list[Sampled]:
        (words,) = self._upload("words", [_words(rows)])
        return self._choose(hidden, rows, words)

    def _choose(self, hidden: torch.Tensor, rows: Seq[LogitsRow], words: torch.Tensor) -> list[Sampled]:
        """Draw with the kernel, and with torch's operations for rows that need more than a temperature.

        Which of the two draws depends only on the row, so its token doesn't depend on other rows.
        """
        logits = self.logits(hidden)
        plain = [i for i, row in enumerate(rows) if _is_plain(row)]
        others = [i for i, row in enumerate(rows) if not _is_plain(row)]
        found: dict[int, Sampled] = {}
        if plain:
            tokens = torch.empty(len(rows), dtype=torch.int32, device=self._device)
            self._launch(self._variants["gumbel_argmax"], (len(rows),), (logits, words, tokens))
            token_ids = tokens.tolist()
            found |= {i: Sampled(token_ids[i] if token_ids[i] >= 0 else None, None) for i in plain}
        if others:
            index = to_device(torch.tensor(others), self._device)
            found |= zip(others, sample(logits[index], [rows[i] for i in others]), strict=True)
        return [found[i] for i in range(len(rows))]

    def draw(self, decodes: Seq[Chunk], prefills: Seq[Chunk], rows: Seq[LogitsRow]) -> list[Sampled]:
        step = self._prepare((*decodes, *prefills), rows)
        hidden = self._forward(step)
        return self._choose(hidden, rows, step.words) if rows else []

    def _prepare(self, chunks: Seq[Chunk], rows: Seq[LogitsRow]) -> _Step:
        size = self.cache.block_size
        lengths = [chunk.num_tokens for chunk in chunks]
        tables = [
            chunk.sequence.block_table[: -(-(chunk.start + n) // size)]
            for chunk, n in zip(chunks, lengths, strict=True)
        ]
        table_starts = np.cumsum([0, *map(len, tables)])[:-1]
        flat = np.array([page for table in tables for page in table], np.int64)
        ends = np.cumsum(lengths)
        offsets = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        positions = np.repeat([chunk.start for chunk in chunks], lengths) + offsets
        pages = flat[np.repeat(table_starts, lengths) + positions // size]
        needed = [
            i for chunk, end in zip(chunks, ends.tolist(), strict=True) for i in range(end - chunk.num_hidden, end)
        ]
        starts = [chunk.start for chunk in chunks]
        stops = [chunk.start + n for chunk, n in zip(chunks, lengths, strict=True)]
        group = self.config.num_heads // self.config.num_kv_heads
        work = attention_work(starts, stops, table_starts.tolist(), group)
        lora = self._adapters.of(chunks)
        all_chunks, groups = lora or (np.empty((0, 2), np.int32), {})
        arrays = [
            np.array([i for chunk in chunks for i in chunk.token_ids]),
            positions,
            pages * size + positions % size,
            np.array(needed),
            flat,
            work.works,
            work.parts,
            *(np.array([count]) for count in (ends[-1], len(work.works), len(all_chunks))),
            all_chunks,
            _words(rows),
            *(array for one in groups.values() for array in (one.items, one.ranges, np.array([len(one.items)]))),
        ]
        token_ids, at, slots, wanted, tables_, works, parts, *rest = self._upload("lists", arrays)
        lists = iter(rest[5:])
        return _Step(
            num_tokens=int(ends[-1]),
            token_ids=token_ids,
            positions=at,
            slots=slots,
            needed=wanted,
            tables=tables_,
            works=works,
            parts=parts,
            num_parts=work.num_parts,
            counts=(rest[0], rest[1], rest[2]),
            chunks=rest[3] if lora else None,
            words=rest[4],
            groups={
                name: _GroupLists(next(lists), next(lists), next(lists), min(len(all_chunks), _MAX_PROGRAMS))
                for name, one in groups.items()
            },
        )

    def _norm(self, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
        self._launch(self._variants["rms_norm"], (len(x),), (x, weight, y))

    def _product(
        self, name: str, step: _Step, layer: int, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor
    ) -> None:
        """Write a group's product with the adapters' to y, or add it to y if y is the residual stream."""
        self._linear(name, step.counts[0], step.num_tokens, x, weight, y)
        if step.chunks is None or not len(step.groups[name].items):
            return
        lists, a_rows, b_units = step.groups[name], self.rows.a[name][layer], self.rows.b[name][layer]
        hidden = self._buffer("lora", len(lists.items), TILE, TILE)
        shrink = (x, a_rows, lists.items, lists.num_items, hidden)
        self._launch(self._variants[f"lora_shrink {name}"], (lists.num_programs,), shrink)
        expand = (hidden, b_units, lists.items, lists.ranges, step.chunks, step.counts[2], y)
        self._launch(self._variants[f"lora_expand {name}"], (lists.num_programs,), expand)

    def _linear(
        self, name: str, count: torch.Tensor, num: int, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor
    ) -> None:
        height, rows = ("short", 16) if num <= _MAX_SHORT else ("tall", 64)
        variant = self._variants[f"linear {name}, {height}"]
        columns = int(variant.constants["N"]) // int(variant.constants["BLOCK_N"])
        self._launch(variant, (columns, -(-num // rows)), (x, weight, y, y, count))

    def _buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return an uninitialized tensor at the beginning of a buffer, which grows if it must."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=dtype or self._dtype, device=self._device)
        return self._buffers[name][:size].view(shape)

    def _upload(self, name: str, arrays: Seq[npt.NDArray[np.integer]]) -> list[torch.Tensor]:
        """Return the arrays as int32 in a buffer, after one copy. Each begins at a multiple of 16 bytes."""
        ends = np.cumsum([-(-array.size // 4) * 4 for array in arrays])
        joined = np.zeros(int(ends[-1]), np.int32)
        views = []
        for array, end in zip(arrays, ends.tolist(), strict=True):
            first = end - -(-array.size // 4) * 4
            joined[first : first + array.size] = array.ravel()
            views.append((first, array.size, array.shape))
        host = torch.from_numpy(joined)
        sent = self._buffer(name, len(joined), dtype=torch.int32)
        sent.copy_(host if self._device.type == "cpu" else host.pin_memory(), non_blocking=True)
        return [sent[first : first + size].view(shape) for first, size, shape in views]


def _is_plain(row: LogitsRow) -> bool:
    """Return whether a row's token depends only on its logits, temperature and noise."""
    params = row.params
    return not (
        params.changes_logits
        or params.logprobs
        or params.top_k
        or params.min_p
        or params.top_p < 1
        or row.forbidden is not None
    )


def _words(rows: Seq[LogitsRow]) -> Ints:
    """Return three words for each row: the bits of its temperature, and the two words of its noise key."""
    words = np.empty((len(rows), 3), np.int32)
    for i, row in enumerate(rows):
        temperature = max(row.params.temperature, MIN_TEMPERATURE) if row.params.temperature > 0 else 0.0
        words[i] = struct.unpack("<iii", struct.pack("<f", temperature) + noise_key(row))
    return words
