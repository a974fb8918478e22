"""The tensors of the key/value cache, and one step's attention over them (`smollm.Attention`)."""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from server.engine.sequence import Chunk
from server.model.base.config import ModelConfig
from server.model.device import to_device
from server.model.ops.attention import (
    DecodePlan,
    attend_decode,
    attend_sequence,
    causal_bias,
    plan_decode,
)


class PagedCache:
    """Keys and values of every layer: (layers, num_blocks, block_size, kv_heads, head_dim) each.

    Zeroed, so that padding is finite; on a CPU the pages are taken from the system as they are written.
    `by_block`: (num_blocks, layers, ...) in its place, so that a block's numbers lie together, and pages that are
    taken for it hold hardly anything else.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        by_block: bool = False,
    ) -> None:
        self.config = config
        self.block_size = block_size
        first = (num_blocks, config.num_layers) if by_block else (config.num_layers, num_blocks)
        shape = (*first, block_size, config.num_kv_heads, config.head_dim)
        self.k = _zeros(shape, dtype, device)
        self.v = _zeros(shape, dtype, device)

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        return 2 * config.num_layers * block_size * config.kv_size * dtype.itemsize


@dataclass(frozen=True, eq=False)
class _Run:
    """The tokens [start, stop) of the flat batch, all of one sequence, and what they attend to."""

    start: int
    stop: int
    slots: torch.Tensor | None  # of all positions up to the last new one; None: the new ones are all there are
    bias: torch.Tensor | None


class PagedAttention:
    """Attention of one flat batch: first the tokens of `decodes`, one each, then those of `prefills`."""

    def __init__(self, cache: PagedCache, decodes: Seq[Chunk], prefills: Seq[Chunk]) -> None:
        self._cache = cache
        device, size = cache.k.device, cache.block_size
        tables = [chunk.sequence.block_table for chunk in (*decodes, *prefills)]
        slots = [
            table[position // size] * size + position % size
            for table, chunk in zip(tables, (*decodes, *prefills), strict=True)
            for position in range(chunk.start, chunk.stop)
        ]
        self._slots = to_device(torch.tensor(slots, dtype=torch.int64), device)
        # A lone decode needs no padding: it goes like any other run of one sequence's tokens.
        self._num_decodes = len(decodes) if len(decodes) > 1 else 0
        self._plan = self._plan_decodes(decodes) if self._num_decodes else None
        self._runs: list[_Run] = []
        start = self._num_decodes
        for chunk in (*decodes[self._num_decodes :], *prefills):
            self._runs.append(self._run(chunk, start))
            start = self._runs[-1].stop

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Write the new k, v (tokens, kv_heads, head_dim) and attend with q (tokens, heads, head_dim); like q."""
        k_cache, v_cache = self._cache.k[layer], self._cache.v[layer]
        k_slots, v_slots = k_cache.flatten(0, 1), v_cache.flatten(0, 1)  # (slots, kv_heads, head_dim)
        k_slots.index_copy_(0, self._slots, k)
        v_slots.index_copy_(0, self._slots, v)
        parts = []
        if self._plan is not None:
            parts.append(attend_decode(self._plan, q[: self._num_decodes], k_cache, v_cache))
        for run in self._runs:
            tokens = slice(run.start, run.stop)
            # copies, which `attend_sequence` may overwrite
            keys = k[tokens].clone() if run.slots is None else k_slots.index_select(0, run.slots)
            values = v[tokens].clone() if run.slots is None else v_slots.index_select(0, run.slots)
            parts.append(attend_sequence(q[tokens], keys, values, run.bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _plan_decodes(self, decodes: Seq[Chunk]) -> DecodePlan:
        size, config = self._cache.block_size, self._cache.config
        num_blocks = max(-(-chunk.stop // size) for chunk in decodes)
        tables = [chunk.sequence.block_table[:num_blocks] for chunk in decodes]
        padded = torch.tensor([table + [0] * (num_blocks - len(table)) for table in tables])
        lengths = torch.tensor([chunk.stop for chunk in decodes])
        device = self._cache.k.device
        return plan_decode(
            to_device(padded, device),
            to_device(lengths, device),
            block_size=size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=self._cache.k.dtype,
            gather_values=device.type != "cpu",
        )

    def _run(self, chunk: Chunk, start: int) -> _Run:
        device, size = self._cache.k.device, self._cache.block_size
        new = chunk.stop - chunk.start
        slots = None
        if chunk.start:
            table = torch.tensor(chunk.sequence.block_table, dtype=torch.int64)
            position = torch.arange(chunk.stop)
            slots = to_device(table[position // size] * size + position % size, device)
        bias = causal_bias(chunk.start, new, self._cache.k.dtype, device)
        return _Run(start, start + new, slots, bias)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page; numpy's zeros are pages that the system clears when they are first touched.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
