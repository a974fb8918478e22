"""Runs one step's chunks through the model: chunks in, drawn tokens out.

All chunks go as one flat batch: decodes first, then prompts, each ordered so that sequences under the same
adapters are neighbours and those that are alone come first.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import islice
from typing import NamedTuple

import torch

from server.engine.backend import Backend
from server.engine.sampling import LogitsRow, Sampled, score
from server.engine.sequence import Chunk
from server.errors import GenerationFailed
from server.model.device import empty_cache, ints_beside, is_out_of_memory

log = logging.getLogger(__name__)


class Drawn(NamedTuple):
    """What was drawn behind a chunk: a token, and one more behind each token of its draft."""

    chunk: Chunk
    tokens: tuple[Sampled, ...]

    def agreed(self) -> Seq[Sampled]:
        """Those that would have been drawn one by one: as far as the draft foresaw them, and the one after.

        A token that could not be drawn behind a draft is left to the next step, which has the reason.
        """
        for num, guess in enumerate(self.chunk.draft, 1):
            if self.tokens[num - 1].token_id != guess or self.tokens[num].token_id is None:
                return self.tokens[:num]
        return self.tokens


class Runner:
    """Owns the device while a step runs. Called by the engine's thread alone."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def run(self, chunks: Seq[Chunk]) -> list[Drawn]:
        """Compute the chunks; what is drawn for each one that reaches its sequence's end, in any order.

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
    def _run(self, chunks: Seq[Chunk]) -> list[Drawn]:
        decodes = _neighbours([chunk for chunk in chunks if chunk.is_decode])
        prefills = _neighbours([chunk for chunk in chunks if not chunk.is_decode])
        ordered = (*decodes, *prefills)
        sampling = [chunk for chunk in ordered if chunk.samples]
        rows = [row for chunk in sampling for row in _rows(chunk)]
        if any(chunk.sequence.request.scored_from is not None for chunk in ordered):
            found = self._score_and_draw(decodes, prefills, rows)
        else:
            found = self.backend.draw(decodes, prefills, rows)
        tokens = iter(found)
        return [Drawn(chunk, tuple(islice(tokens, 1 + len(chunk.draft)))) for chunk in sampling]

    def _score_and_draw(self, decodes: Seq[Chunk], prefills: Seq[Chunk], rows: Seq[LogitsRow]) -> list[Sampled]:
        """Note the scores of chunks that have any, whose hidden states no token is drawn from."""
        ordered = (*decodes, *prefills)
        hidden = self.backend.hidden(decodes, prefills)
        score(self.backend.logits, hidden, ordered)
        places: list[int] = []  # of `hidden`, that a token is drawn from
        end = 0
        for chunk in ordered:
            end += chunk.num_hidden
            if chunk.samples:
                places += range(end - 1 - len(chunk.draft), end)
        return self.backend.sample(hidden[ints_beside(hidden, places)], rows) if rows else []


def _rows(chunk: Chunk) -> Iterator[LogitsRow]:
    """What decides the token behind the sequence's own, and behind each of the draft's if it is right so far."""
    sequence = chunk.sequence
    for num in range(1 + len(chunk.draft)):
        draft, constraint = chunk.draft[:num], sequence.constraint
        if draft and constraint is not None:
            constraint = constraint.after(draft)
        position = sequence.num_tokens + num
        params = sequence.request.sampling
        forbidden = None if constraint is None else constraint.forbidden
        yield LogitsRow(params, sequence.index, position, sequence.token_counts, draft, forbidden)


def _neighbours(chunks: list[Chunk]) -> list[Chunk]:
    """The chunks with those of one adapter set side by side, rare sets first."""
    counts = Counter(chunk.sequence.adapter_key for chunk in chunks)
    return sorted(chunks, key=lambda chunk: (counts[chunk.sequence.adapter_key], chunk.sequence.adapter_key))
