"""Run one step's chunks through the backend, and return the drawn tokens.

All chunks form one flat batch: first decodes, then prompts. In each of these two groups, sequences with the same
adapters are neighbours, and rare adapter sets come first.
"""

import logging
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import islice
from typing import NamedTuple

import torch

from server.engine.backend import Backend
from server.engine.sampling import LogitsRow, Sampled, score
from server.engine.sequence import Chunk
from server.errors import GenerationFailed
from server.model.device import empty_cache, ints_on, is_out_of_memory

log = logging.getLogger(__name__)


class Drawn(NamedTuple):
    """The tokens drawn after a chunk: one, and one more after each token of its draft."""

    chunk: Chunk
    tokens: tuple[Sampled, ...]

    def agreed(self) -> Seq[Sampled]:
        """Return the tokens that steps without drafts would have drawn: the draft's correct part, and one more.

        If a token after a correct draft couldn't be drawn, this token is left to the next step, which reports why.
        """
        for num, guess in enumerate(self.chunk.draft, 1):
            if self.tokens[num - 1].token_id != guess or self.tokens[num].token_id is None:
                return self.tokens[:num]
        return self.tokens


class Runner:
    """The part of the engine that runs steps on a backend. Only the engine's thread calls it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def run(self, chunks: Seq[Chunk]) -> list[Drawn]:
        """Compute the chunks, and return the tokens drawn after each chunk that reaches its sequence's end.

        The order of the result is unspecified. If the device's memory runs out, empty torch's cache, and raise
        GenerationFailed.
        """
        try:
            return self._run(chunks)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            settings = "SMOLORA_MAX_NUM_SEQS, SMOLORA_KV_CACHE_BYTES or SMOLORA_ADAPTER_CACHE_BYTES"
            log.exception("the device's memory ran out in a step: lower %s", settings)
        empty_cache()  # only now: the error's traceback kept the step's tensors alive
        raise GenerationFailed("the device's memory ran out in a step of this request; try it again")

    @torch.inference_mode()
    def _run(self, chunks: Seq[Chunk]) -> list[Drawn]:
        decodes = _neighbours([chunk for chunk in chunks if chunk.is_decode])
        prefills = _neighbours([chunk for chunk in chunks if not chunk.is_decode])
        ordered = (*decodes, *prefills)
        sampling = [chunk for chunk in ordered if chunk.samples]
        rows = [row for chunk in sampling for row in _rows(chunk)]
        if any(chunk.sequence.scored_from is not None for chunk in ordered):
            found = self._score_and_draw(decodes, prefills, rows)
        else:
            found = self.backend.draw(decodes, prefills, rows)
        tokens = iter(found)
        return [Drawn(chunk, tuple(islice(tokens, 1 + len(chunk.draft)))) for chunk in sampling]

    def _score_and_draw(self, decodes: Seq[Chunk], prefills: Seq[Chunk], rows: Seq[LogitsRow]) -> list[Sampled]:
        """Store the scores that are asked for, and draw the tokens whose sampling inputs are `rows`."""
        ordered = (*decodes, *prefills)
        hidden = self.backend.hidden(decodes, prefills)
        score(self.backend.logits, hidden, ordered)
        places: list[int] = []  # rows of `hidden` after which a token is drawn
        end = 0
        for chunk in ordered:
            end += chunk.num_hidden
            if chunk.samples:
                places += range(end - 1 - len(chunk.draft), end)
        return self.backend.sample(hidden[ints_on(hidden, places)], rows) if rows else []


def _rows(chunk: Chunk) -> Iterator[LogitsRow]:
    """Yield the sampling inputs for the token after the sequence, and for the token after each drafted token."""
    sequence = chunk.sequence
    for num in range(1 + len(chunk.draft)):
        draft, constraint = chunk.draft[:num], sequence.constraint
        if draft and constraint is not None:
            constraint = constraint.after(draft)
        position = sequence.num_tokens + num
        params = sequence.request.sampling
        forbidden = None if constraint is None else constraint.forbidden
        if position - sequence.num_prompt_tokens < params.min_tokens:
            forbidden = sequence.early_ends
        yield LogitsRow(params, sequence.index, position, sequence.token_counts, draft, forbidden)


def _neighbours(chunks: list[Chunk]) -> list[Chunk]:
    """Sort the chunks so that chunks with the same adapters are neighbours.

    Chunks whose adapters are shared by few other chunks come first.
    """
    sharing: dict[bytes, list[Chunk]] = {}
    for chunk in chunks:
        sharing.setdefault(chunk.sequence.adapter_key, []).append(chunk)
    return [chunk for key in sorted(sharing, key=lambda key: (len(sharing[key]), key)) for chunk in sharing[key]]
