"""Runs one step's chunks through the model: tensors in, chosen tokens out.

All chunks go as one flat batch: decodes first, then prompts, each ordered so that sequences under the same
adapters are neighbours and those that are alone come first.
"""

from collections import Counter
from collections.abc import Sequence as Seq

import torch

from server.engine.adapter_pool import AdapterLease
from server.engine.paged_attention import PagedAttention, PagedCache, to_device
from server.engine.sampler import Row, Sampled, sample
from server.engine.scheduler import Chunk
from server.engine.sequence import Sequence
from server.model.lora_batch import LoraBatch, TokenRun
from server.model.rank_rows import RankRows
from server.model.smollm import Adapters, NoAdapters, SmolLM

_Signature = tuple[tuple[int, int, bytes, int], ...]


class Runner:
    """Owns the device while a step runs. Called by the engine's thread alone."""

    def __init__(self, model: SmolLM, cache: PagedCache, rows: RankRows) -> None:
        self.model = model
        self.cache = cache
        self.rows = rows
        self._adapters: Adapters = NoAdapters()
        self._signature: list[tuple[int, int, object]] = []

    @torch.inference_mode()
    def run(self, chunks: Seq[Chunk]) -> list[tuple[Sequence, Sampled]]:
        """Compute the chunks; the next token of each sequence whose chunk reaches its end, in any order."""
        decodes = _neighbours([chunk for chunk in chunks if chunk.is_decode])
        prefills = _neighbours([chunk for chunk in chunks if not chunk.is_decode])
        ordered = (*decodes, *prefills)
        token_ids = [
            token_id for chunk in ordered for token_id in chunk.sequence.token_ids[chunk.start : chunk.stop]
        ]
        positions = [position for chunk in ordered for position in range(chunk.start, chunk.stop)]
        device = self.model.device
        hidden = self.model.forward(
            to_device(torch.tensor(token_ids), device),
            to_device(torch.tensor(positions), device),
            PagedAttention(self.cache, decodes, prefills),
            self._lora(ordered),
        )
        last, end = [], 0
        for chunk in ordered:
            end += chunk.stop - chunk.start
            if chunk.samples:
                last.append(end - 1)
        if not last:
            return []
        sampling = [chunk.sequence for chunk in ordered if chunk.samples]
        if len(last) < hidden.shape[0]:
            hidden = hidden[to_device(torch.tensor(last), device)]
        rows = [Row(s.request.sampling, s.index, s.num_tokens, s.token_ids) for s in sampling]
        return list(zip(sampling, sample(self.model.logits(hidden), rows), strict=True))

    def _lora(self, chunks: Seq[Chunk]) -> Adapters:
        """The adapters of the batch; those of the last step where tokens and rows are the same."""
        runs: list[TokenRun] = []
        signature: list[tuple[int, int, object]] = []
        start, key = 0, b""
        for chunk in chunks:
            lease = chunk.sequence.lease
            assert isinstance(lease, AdapterLease)
            stop = start + chunk.stop - chunk.start
            if lease.refs and runs and chunk.sequence.adapter_key == key and runs[-1].stop == start:
                runs[-1] = TokenRun(runs[-1].start, stop, lease.parts)
            elif lease.refs:
                runs.append(TokenRun(start, stop, lease.parts))
            start, key = stop, chunk.sequence.adapter_key
        if not runs:
            return NoAdapters()
        signature = [(run.start, run.stop, run.parts) for run in runs]
        if not _same(signature, self._signature):
            self._adapters, self._signature = LoraBatch(self.rows, runs), signature
        return self._adapters


def _same(first: list[tuple[int, int, object]], second: list[tuple[int, int, object]]) -> bool:
    return len(first) == len(second) and all(
        a[:2] == b[:2] and a[2] is b[2] for a, b in zip(first, second, strict=True)
    )


def _neighbours(chunks: list[Chunk]) -> list[Chunk]:
    """The chunks with those of one adapter set side by side, rare sets first."""
    counts = Counter(chunk.sequence.adapter_key for chunk in chunks)
    return sorted(chunks, key=lambda chunk: (counts[chunk.sequence.adapter_key], chunk.sequence.adapter_key))
