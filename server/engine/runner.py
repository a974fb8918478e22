"""Runs one step's chunks through the model: chunks in, chosen tokens out.

All chunks go as one flat batch: decodes first, then prompts, each ordered so that sequences under the same
adapters are neighbours and those that are alone come first.
"""

import logging
from collections import Counter
from collections.abc import Sequence as Seq

import torch

from server.engine.forwards import Forward
from server.engine.sampling.logits import LogitsRow
from server.engine.sampling.sampler import Sampled
from server.engine.sampling.scoring import score
from server.engine.scheduler import Chunk
from server.engine.sequence import Sequence
from server.errors import GenerationFailed
from server.model.device import ints_beside
from server.model.gpu import empty_cache, is_out_of_memory

log = logging.getLogger(__name__)


class Runner:
    """Owns the device while a step runs. Called by the engine's thread alone."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def run(self, chunks: Seq[Chunk]) -> list[tuple[Sequence, Sampled]]:
        """Compute the chunks; the next token of each sequence whose chunk reaches its end, in any order.

        Raises GenerationFailed where the device's memory runs out; its cache then begins anew.
        """
        try:
            return self._run(chunks)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            log.exception("lower SMOLORA_MAX_NUM_SEQS, SMOLORA_KV_CACHE_BYTES or SMOLORA_ADAPTER_CACHE_BYTES")
        empty_cache()  # now that the error is gone, and with it the step's tensors
        raise GenerationFailed("the device's memory ran out in a step of this request; try it again")

    @torch.inference_mode()
    def _run(self, chunks: Seq[Chunk]) -> list[tuple[Sequence, Sampled]]:
        decodes = _neighbours([chunk for chunk in chunks if chunk.is_decode])
        prefills = _neighbours([chunk for chunk in chunks if not chunk.is_decode])
        ordered = (*decodes, *prefills)
        hidden = self.forward.hidden(decodes, prefills)
        if any(chunk.sequence.request.scored_from is not None for chunk in ordered):
            score(self.forward.logits, hidden, ordered)
        last, end = [], 0
        for chunk in ordered:
            end += chunk.stop - chunk.start
            if chunk.samples:
                last.append(end - 1)
        if not last:
            return []
        sampling = [chunk.sequence for chunk in ordered if chunk.samples]
        if len(last) < hidden.shape[0]:
            hidden = hidden[ints_beside(hidden, last)]
        rows = [
            LogitsRow(s.request.sampling, s.index, s.num_tokens, s.token_ids, s.num_prompt_tokens, s.constraint)
            for s in sampling
        ]
        return list(zip(sampling, self.forward.sample(hidden, rows), strict=True))


def _neighbours(chunks: list[Chunk]) -> list[Chunk]:
    """The chunks with those of one adapter set side by side, rare sets first."""
    counts = Counter(chunk.sequence.adapter_key for chunk in chunks)
    return sorted(chunks, key=lambda chunk: (counts[chunk.sequence.adapter_key], chunk.sequence.adapter_key))
