"""The backend in torch, for any device. It is the test oracle of the other backends."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate

import torch

from server.engine.backend import Backend, PagedCache, StepAdapters
from server.engine.sampling import LogitsRow, Sampled, sample
from server.engine.sequence import Chunk
from server.model.device import ints_on, to_device
from server.model.lora_batch import LoraBatch
from server.model.ops.attention import (
    DecodePlan,
    attend_decode,
    attend_sequence,
    causal_bias,
    plan_decode,
)
from server.model.rank_rows import RowFormat
from server.model.smollm import Adapters, NoAdapters, SmolLM


class TorchBackend(Backend):
    """A backend that computes with `SmolLM` and a paged cache."""

    name = "torch"
    is_batch_invariant = False  # torch's products round differently for one row than for several

    def __init__(self, model: SmolLM) -> None:
        super().__init__(model.config, RowFormat.of_torch(model.dtype, model.device), model.dtype, model.device)
        self._model = model
        self._adapters: StepAdapters[Adapters] = StepAdapters(
            lambda runs: LoraBatch(self.rows, runs) if runs else NoAdapters()
        )

    def hidden(self, decodes: Seq[Chunk], prefills: Seq[Chunk]) -> torch.Tensor:
        chunks = (*decodes, *prefills)
        positions = [chunk.start + i for chunk in chunks for i in range(chunk.num_tokens)]
        hidden = self._model.forward(
            to_device(torch.tensor([i for chunk in chunks for i in chunk.token_ids]), self._device),
            to_device(torch.tensor(positions), self._device),
            PagedAttention(self.cache, decodes, prefills),
            self._adapters.of(chunks),
        )
        ends = accumulate(chunk.num_tokens for chunk in chunks)
        needed = [i for chunk, end in zip(chunks, ends, strict=True) for i in range(end - chunk.num_hidden, end)]
        return hidden if len(needed) == len(positions) else hidden[ints_on(hidden, needed)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden)

    def sample(self, hidden: torch.Tensor, rows: Seq[LogitsRow]) -> list[Sampled]:
        return sample(self._model.logits(hidden), rows)

    def draw(self, decodes: Seq[Chunk], prefills: Seq[Chunk], rows: Seq[LogitsRow]) -> list[Sampled]:
        hidden = self.hidden(decodes, prefills)
        return self.sample(hidden, rows) if rows else []


@dataclass(frozen=True, eq=False)
class _Run:
    """Tokens [start, stop) of the flat batch, all of one sequence, and what they attend to."""

    start: int
    stop: int
    slots: torch.Tensor | None  # cache slots of all positions up to the last new token; None if all are new
    bias: torch.Tensor | None


class PagedAttention:
    """The attention of one step (`smollm.Attention`): first the tokens of `decodes`, then those of `prefills`."""

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
        # A single decode needs no padding, so it is computed like a prompt's tokens.
        self._num_decodes = len(decodes) if len(decodes) > 1 else 0
        self._plan = self._plan_decodes(decodes) if self._num_decodes else None
        self._runs: list[_Run] = []
        start = self._num_decodes
        for chunk in (*decodes[self._num_decodes :], *prefills):
            self._runs.append(self._run(chunk, start))
            start = self._runs[-1].stop

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Cache the new k, v (tokens, kv_heads, head_dim), and return the attention output, shaped like q.

        q is (tokens, heads, head_dim).
        """
        k_cache, v_cache = self._cache.k[layer], self._cache.v[layer]
        k_slots, v_slots = k_cache.flatten(0, 1), v_cache.flatten(0, 1)  # (slots, kv_heads, head_dim)
        k_slots.index_copy_(0, self._slots, k)
        v_slots.index_copy_(0, self._slots, v)
        parts = []
        if self._plan is not None:
            parts.append(attend_decode(self._plan, q[: self._num_decodes], k_cache, v_cache))
        for run in self._runs:
            tokens = slice(run.start, run.stop)
            # `attend_sequence` may overwrite these copies.
            keys = k[tokens].clone() if run.slots is None else k_slots.index_select(0, run.slots)
            values = v[tokens].clone() if run.slots is None else v_slots.index_select(0, run.slots)
            parts.append(attend_sequence(q[tokens], keys, values, run.bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _plan_decodes(self, decodes: Seq[Chunk]) -> DecodePlan:
        size, config = self._cache.block_size, self._cache.config
        num_blocks = max(-(-chunk.stop // size) for chunk in decodes)
        tables = [chunk.sequence.block_table[:num_blocks].tolist() for chunk in decodes]
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
