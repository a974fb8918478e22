"""The sampler of native code: what `sampler.sample` does, in one call with the logits' product or the whole step.

The torch sampler is its oracle. The noise is the same; a token may differ where two are as good as equal, or where
equals lie on the border of a filter, which go by their ids here.
"""

from collections.abc import Sequence as Seq

import numpy as np
import torch

from server.engine.request import Logprobs
from server.engine.sampling import MIN_TEMPERATURE, LogitsRow, Penalized, Sampled, noise_key
from server.model.native.model import NativeModel
from server.model.native.sampling import Choices, SampleTable


def sample_natively(model: NativeModel, rows: Seq[LogitsRow], given: torch.Tensor) -> list[Sampled]:
    """The next token of each row, of hidden states (rows, hidden) in bf16, or of logits (rows, vocab) in fp32,
    which are overwritten."""
    vocab_size = model.config.vocab_size
    return sampled(model.sample(given, table_of(rows, vocab_size)), rows, vocab_size)


def table_of(rows: Seq[LogitsRow], vocab_size: int) -> SampleTable:
    """How native code chooses the rows' tokens."""
    table = SampleTable(vocab_size)
    for row in rows:
        _add(table, row, vocab_size)
    return table


def sampled(choices: Choices, rows: Seq[LogitsRow], vocab_size: int) -> list[Sampled]:
    """What it has chosen for them."""
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


def _add(table: SampleTable, row: LogitsRow, vocab_size: int) -> None:
    params = row.params
    seen, used, penalties = row.penalized if params.penalizes else Penalized.nothing()
    added_ids, added = used, -penalties
    if params.logit_bias:
        token_ids, biases = zip(*params.logit_bias, strict=True)
        added_ids, added = np.append(added_ids, token_ids), np.append(added, biases)
    forbidden = None
    if row.constraint is not None:
        forbidden = row.constraint.forbidden()
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
