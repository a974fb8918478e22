"""Log-probabilities of given tokens, from the hidden states of the chunks that hold them.

A sequence's scores come together chunk by chunk, in `Sequence.scores`; what is computed again after a preemption
is written again. Leaves to others: which tokens are computed in which step.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch

from server.engine.request import Logprobs
from server.engine.sequence import Chunk
from server.model.device import ints_beside

_SLICE = 32
"""Rows of logits at a time: 32 of SmolLM2's are 6 MB."""


def score(logits_of: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, chunks: Seq[Chunk]) -> None:
    """Note the scores (nats) that follow from hidden (rows, hidden_size): each chunk's last `num_hidden` tokens',
    chunk by chunk.

    The token after position p is scored by the log-softmax of p's logits: before temperature and penalties. Beside
    it come as many of the likeliest tokens as the request's sampling asks for.
    """
    found: list[tuple[Chunk, int]] = []  # and the position whose token is scored
    rows: list[int] = []
    start = 0
    for chunk in chunks:
        sequence = chunk.sequence
        first = chunk.start + chunk.num_tokens - chunk.num_hidden  # the position of its first row
        if (scored_from := sequence.request.scored_from) is not None:
            for position in range(max(chunk.start + 1, scored_from), min(chunk.stop + 1, sequence.num_tokens)):
                found.append((chunk, position))
                rows.append(start + position - 1 - first)
        start += chunk.num_hidden
    if not found:
        return
    index = ints_beside(hidden, rows)
    targets = ints_beside(hidden, [chunk.sequence.token_ids[position] for chunk, position in found])
    num_top = max(chunk.sequence.request.sampling.logprobs for chunk, _ in found)
    scores, top_ids = [], []
    for part, chosen in zip(torch.split(index, _SLICE), torch.split(targets, _SLICE), strict=True):
        logits = logits_of(hidden[part])
        values = logits.gather(1, chosen[:, None])
        if num_top:
            best = logits.topk(min(num_top, logits.shape[1]))
            values = torch.cat((values, best.values), 1)
            top_ids.append(best.indices)
        scores.append(values - logits.logsumexp(-1, keepdim=True))
    ids = torch.cat(top_ids).tolist() if top_ids else [()] * len(found)
    for (chunk, position), (score, *top), likeliest in zip(found, torch.cat(scores).tolist(), ids, strict=True):
        wanted = chunk.sequence.request.sampling.logprobs
        chunk.sequence.scores[position] = Logprobs(score, tuple(zip(likeliest, top, strict=True))[:wanted])
