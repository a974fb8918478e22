"""The backend in native code, for CPUs, in bf16.

Its sampler draws the same tokens as `sampling.sample`, its test oracle, but in one call. A drawn token can differ
if two tokens' scores (logits with noise) are almost equal, or if a filter must choose between tokens with equal
scores: native code then prefers the lower token id.
"""

from collections.abc import Sequence as Seq

import numpy as np
import torch

from server.engine.backend import Backend, StepAdapters
from server.engine.request import Logprobs
from server.engine.sampling import MIN_TEMPERATURE, LogitsRow, Penalized, Sampled, noise_key
from server.engine.sequence import Chunk
from server.model.native.model import ROW_FORMAT, NativeLora, NativeModel, StepTables
from server.model.native.sampling import Choices, SampleTable


class NativeBackend(Backend):
    """A backend that computes with `NativeModel` and a paged cache."""

    name = "native"
    is_batch_invariant = True
    _caches_by_block = True

    def __init__(self, model: NativeModel) -> None:
        super().__init__(model.config, ROW_FORMAT, torch.bfloat16, torch.device("cpu"))
        self._model = model
        self._adapters = StepAdapters(lambda runs: NativeLora(self.rows, runs))

    def hidden(self, decodes: Seq[Chunk], prefills: Seq[Chunk]) -> torch.Tensor:
        return self._model.forward(self._tables((*decodes, *prefills)))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden)

    def sample(self, hidden: torch.Tensor, rows: Seq[LogitsRow]) -> list[Sampled]:
        return sample_natively(self._model, rows, hidden)

    def draw(self, decodes: Seq[Chunk], prefills: Seq[Chunk], rows: Seq[LogitsRow]) -> list[Sampled]:
        vocab_size = self.config.vocab_size
        table = _sample_table(rows, vocab_size)
        return _sampled(self._model.draw(self._tables((*decodes, *prefills)), table), rows, vocab_size)

    def _tables(self, chunks: Seq[Chunk]) -> StepTables:
        """Return the native model's inputs for a step that computes these chunks."""
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


def sample_natively(model: NativeModel, rows: Seq[LogitsRow], given: torch.Tensor) -> list[Sampled]:
    """Return each row's next token.

    `given` is hidden states (rows, hidden) in bf16, or logits (rows, vocab) in fp32. Logits are overwritten.
    """
    vocab_size = model.config.vocab_size
    return _sampled(model.sample(given, _sample_table(rows, vocab_size)), rows, vocab_size)


def _sample_table(rows: Seq[LogitsRow], vocab_size: int) -> SampleTable:
    table = SampleTable(vocab_size)
    for row in rows:
        _add(table, row, vocab_size)
    return table


def _add(table: SampleTable, row: LogitsRow, vocab_size: int) -> None:
    params = row.params
    seen, used, penalties = row.penalized if params.penalizes else Penalized.nothing()
    added_ids, added = used, -penalties
    if params.logit_bias:
        token_ids, biases = zip(*params.logit_bias, strict=True)
        added_ids, added = np.append(added_ids, token_ids), np.append(added, biases)
    forbidden = None
    if row.forbidden is not None:
        forbidden = row.forbidden()
        if forbidden is None:
            forbidden = np.ones(vocab_size, np.bool_)
    is_random = params.temperature > 0
    table.add(
        temperature=max(params.temperature, MIN_TEMPERATURE) if is_random else 0.0,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        key=int.from_bytes(noise_key(row), "little", signed=True) if is_random else 0,
        num_top=params.logprobs,
        repetition_penalty=params.repetition_penalty,
        seen=seen,
        added_ids=added_ids,
        added=added,
        forbidden=forbidden,
    )


def _sampled(choices: Choices, rows: Seq[LogitsRow], vocab_size: int) -> list[Sampled]:
    token_ids = choices.token_ids.tolist()
    found: list[Sampled] = []
    for i, (row, token_id) in enumerate(zip(rows, token_ids, strict=True)):
        if token_id < 0:
            found.append(Sampled(None, None))
        elif num := min(row.params.logprobs, vocab_size):
            chosen, *values = choices.logprobs[i, : 1 + num].tolist()
            top = zip(choices.top_ids[i, :num].tolist(), values, strict=True)
            found.append(Sampled(token_id, Logprobs(chosen, tuple(one for one in top if one[0] >= 0))))
        else:
            found.append(Sampled(token_id, None))
    return found
