"""The forward of one step's chunks, in torch or in native code: chunks in, hidden states and tokens out."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from server.engine.adapter_pool import AdapterHold
from server.engine.native_sampling import sample_natively, sampled, table_of
from server.engine.paged_attention import PagedAttention, PagedCache
from server.engine.sampling import LogitsRow, Sampled, sample
from server.engine.sequence import Chunk
from server.model.device import ints_beside, to_device
from server.model.lora_batch import LoraBatch, TokenRun
from server.model.native.model import NativeLora, NativeModel, StepTables
from server.model.rank_rows import RankRows
from server.model.smollm import Adapters, NoAdapters, SmolLM

T = TypeVar("T")


class Forward(Protocol):
    """What a runner needs of a model, its cache and its adapters.

    The first `decodes` have one token each; drafts behind them are for backends that are batch invariant.
    """

    def hidden(self, decodes: Seq[Chunk], prefills: Seq[Chunk]) -> torch.Tensor:
        """Final hidden states (rows, hidden) of each chunk's last `num_hidden` tokens, in this order; all tokens'
        keys and values are cached."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits (rows, vocab) of chosen rows of `hidden`."""
        ...

    def sample(self, hidden: torch.Tensor, rows: Seq[LogitsRow]) -> list[Sampled]:
        """The next token of each of chosen rows of `hidden`."""
        ...

    def draw(self, decodes: Seq[Chunk], prefills: Seq[Chunk], rows: Seq[LogitsRow]) -> list[Sampled]:
        """The next token of every row of what `hidden` would answer: both in one."""
        ...


class TorchForward:
    """`SmolLM` on any device."""

    def __init__(self, model: SmolLM, cache: PagedCache, rows: RankRows) -> None:
        self.model = model
        self._cache = cache
        self._adapters: _Kept[Adapters] = _Kept(lambda runs: LoraBatch(rows, runs) if runs else NoAdapters())

    def hidden(self, decodes: Seq[Chunk], prefills: Seq[Chunk]) -> torch.Tensor:
        chunks = (*decodes, *prefills)
        positions = [chunk.start + i for chunk in chunks for i in range(chunk.num_tokens)]
        hidden = self.model.forward(
            to_device(torch.tensor([i for chunk in chunks for i in chunk.token_ids]), self.model.device),
            to_device(torch.tensor(positions), self.model.device),
            PagedAttention(self._cache, decodes, prefills),
            self._adapters.of(chunks),
        )
        ends = accumulate(chunk.num_tokens for chunk in chunks)
        needed = [i for chunk, end in zip(chunks, ends, strict=True) for i in range(end - chunk.num_hidden, end)]
        return hidden if len(needed) == len(positions) else hidden[ints_beside(hidden, needed)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.logits(hidden)

    def sample(self, hidden: torch.Tensor, rows: Seq[LogitsRow]) -> list[Sampled]:
        return sample(self.model.logits(hidden), rows)

    def draw(self, decodes: Seq[Chunk], prefills: Seq[Chunk], rows: Seq[LogitsRow]) -> list[Sampled]:
        hidden = self.hidden(decodes, prefills)
        return self.sample(hidden, rows) if rows else []


class NativeForward:
    """`NativeModel`, over the same cache and rank rows."""

    def __init__(self, model: NativeModel, cache: PagedCache, rows: RankRows) -> None:
        self._model = model
        self.cache = cache
        self._adapters = _Kept(lambda runs: NativeLora(rows, runs))

    def hidden(self, decodes: Seq[Chunk], prefills: Seq[Chunk]) -> torch.Tensor:
        return self._model.forward(self._tables((*decodes, *prefills)))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden)

    def sample(self, hidden: torch.Tensor, rows: Seq[LogitsRow]) -> list[Sampled]:
        return sample_natively(self._model, rows, hidden)

    def draw(self, decodes: Seq[Chunk], prefills: Seq[Chunk], rows: Seq[LogitsRow]) -> list[Sampled]:
        vocab_size = self._model.config.vocab_size
        table = table_of(rows, vocab_size)
        return sampled(self._model.draw(self._tables((*decodes, *prefills)), table), rows, vocab_size)

    def _tables(self, chunks: Seq[Chunk]) -> StepTables:
        """Of the chunks' step."""
        token_ids: list[int] = []
        runs: list[tuple[int, ...]] = []
        blocks: list[int] = []
        for chunk in chunks:
            start = len(token_ids)
            token_ids += chunk.token_ids
            runs.append((start, len(token_ids), chunk.start, len(blocks), chunk.num_hidden))
            blocks += chunk.sequence.block_table
        return StepTables(
            np.array(token_ids, np.int64),
            np.array(runs, np.int64),
            np.array(blocks, np.int32),
            self.cache.k,
            self.cache.v,
            self._adapters.of(chunks),
        )


class _Kept(Generic[T]):
    """The adapters of a batch; those of the last step where tokens and rows are the same."""

    def __init__(self, build: Callable[[Seq[TokenRun]], T]) -> None:
        self._build = build
        self._runs: list[TokenRun] = []
        self._built: T | None = None

    def of(self, chunks: Seq[Chunk]) -> T:
        runs = _token_runs(chunks)
        if self._built is None or not _same(runs, self._runs):
            self._built, self._runs = self._build(runs), runs
        return self._built


def _token_runs(chunks: Seq[Chunk]) -> list[TokenRun]:
    """The tokens that have adapters, neighbours with the same ones together."""
    runs: list[TokenRun] = []
    start, key = 0, b""
    for chunk in chunks:
        hold = chunk.sequence.hold
        assert isinstance(hold, AdapterHold)
        stop = start + chunk.num_tokens
        if hold.refs and runs and chunk.sequence.adapter_key == key and runs[-1].stop == start:
            runs[-1] = TokenRun(runs[-1].start, stop, hold.parts)
        elif hold.refs:
            runs.append(TokenRun(start, stop, hold.parts))
        start, key = stop, chunk.sequence.adapter_key
    return runs


def _same(first: list[TokenRun], second: list[TokenRun]) -> bool:
    return len(first) == len(second) and all(
        (a.start, a.stop) == (b.start, b.stop) and a.parts is b.parts for a, b in zip(first, second, strict=True)
    )
