"""Chooses each row's next token from its logits.

Sampling is Gumbel-max (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030): the token with the highest
logit / temperature + g, where g is standard Gumbel noise. The noise of a token is a hash of (seed, choice index,
position, token id) and of nothing else, so a request draws the same tokens in any company and on any schedule.

Order of the steps, as Hugging Face's generation does them: repetition penalty (Keskar et al. 2019,
arXiv:1909.05858), presence and frequency penalty and logit bias (as OpenAI's API defines them), the mask of a
constraint, temperature, top-k, top-p (Holtzman et al. 2020, arXiv:1904.09751), min-p (Nguyen et al. 2024,
arXiv:2407.01082).
"""

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from server.engine.request import SamplingParams
from server.engine.sequence import Constraint

_MIN_CANDIDATES = 256  # the first attempt at a top-p set; the whole vocabulary follows for a row that wants more
_MIN_TEMPERATURE = 1e-6  # below it a division would overflow; the likeliest token wins long before
_INT32 = 1 << 32


@dataclass(frozen=True, eq=False)
class Row:
    """What decides one row's token, besides its logits."""

    params: SamplingParams
    index: int  # of the choice
    position: int  # of the new token in its sequence
    token_ids: Seq[int]  # the prompt and the output so far: what the repetition penalty looks at
    num_prompt_tokens: int = 0  # the other penalties look at what comes after them
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities (nats) before temperature and penalties: of the chosen token, and the likeliest."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), best first


@dataclass(frozen=True)
class Sampled:
    """One row's token; None where its constraint has failed, or its logits are no numbers any more, as adapters
    that are too large make them."""

    token_id: int | None
    logprobs: Logprobs | None


def sample(logits: torch.Tensor, rows: Seq[Row]) -> list[Sampled]:
    """The next token of each row of logits (rows, vocab), fp32, which are overwritten."""
    assert logits.shape[0] == len(rows)
    wants_logprobs = [i for i, row in enumerate(rows) if row.params.logprobs]
    logprobs = logits[wants_logprobs].log_softmax(-1) if wants_logprobs else None
    for i, row in enumerate(rows):
        if row.params.changes_logits:
            _penalize(logits[i], row)
        if row.constraint is not None:
            _constrain(logits[i], row.constraint)
    random = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if len(random) == len(rows):
        tokens = _draw(logits, rows)
    else:
        tokens = logits.argmax(-1)
        if random:
            tokens[random] = _draw(logits[random], [rows[i] for i in random])
    # NaN and infinity are the first that argmax finds.
    is_number = logits.gather(1, tokens[:, None])[:, 0].isfinite()
    token_ids = [None if token_id < 0 else token_id for token_id in tokens.where(is_number, -1).tolist()]
    found: dict[int, Logprobs] = {}
    if logprobs is not None:
        for i, row_logprobs in zip(wants_logprobs, logprobs, strict=True):
            if (token_id := token_ids[i]) is not None:
                found[i] = _logprobs(row_logprobs, token_id, rows[i].params.logprobs)
    return [Sampled(token_id, found.get(i)) for i, token_id in enumerate(token_ids)]


def gumbel(rows: Seq[Row], token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for token_ids (rows, n) or (1, n): (rows, n) fp32, decided by row and token alone.

    A 32-bit mix of the token id and two words of the row's key (multipliers of "lowbias32", Wellons 2018). The
    23 highest bits make a uniform strictly between 0 and 1.
    """
    keys = torch.tensor([_key(row) for row in rows], dtype=torch.int32, device=token_ids.device)  # (rows, 2)
    x = token_ids.to(torch.int32) ^ keys[:, :1]
    x = (x ^ _shift_right(x, 16)) * 0x7FEB352D
    x = x ^ keys[:, 1:]
    x = (x ^ _shift_right(x, 15)) * (0x846CA68B - _INT32)
    x = x ^ _shift_right(x, 16)
    uniform = (_shift_right(x, 9).float() + 0.5) * 2.0**-23
    return uniform.log_().neg_().log_().neg_()


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _key(row: Row) -> tuple[int, int]:
    data = struct.pack("<Qqq", row.params.seed, row.index, row.position)
    first, second = struct.unpack("<ii", hashlib.blake2b(data, digest_size=8).digest())
    return first, second


def _penalize(logits: torch.Tensor, row: Row) -> None:
    """Apply the row's penalties and biases to logits (vocab,)."""
    params, device = row.params, logits.device
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(row.token_ids)), device=device)
        scores, penalty = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(row.token_ids[row.num_prompt_tokens :])
        used = torch.tensor(list(counts), dtype=torch.int64, device=device)
        penalties = [params.presence_penalty + params.frequency_penalty * count for count in counts.values()]
        logits[used] -= logits.new_tensor(penalties)
    if params.logit_bias:
        token_ids, biases = zip(*params.logit_bias, strict=True)
        logits[torch.tensor(token_ids, device=device)] += logits.new_tensor(biases)


def _constrain(logits: torch.Tensor, constraint: Constraint) -> None:
    """Leave of logits (vocab,) only those of tokens that may come next; of a failed constraint, none."""
    forbidden = constraint.forbidden()
    if forbidden is None:
        logits.fill_(float("-inf"))
    else:
        logits.masked_fill_(torch.from_numpy(forbidden).to(logits.device), float("-inf"))


def _draw(logits: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
    """Gumbel-max over what the rows' filters leave of logits (rows, vocab): token ids (rows,)."""
    temperature = logits.new_tensor([max(row.params.temperature, _MIN_TEMPERATURE) for row in rows])
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for members, scores, token_ids in _candidates(logits / temperature[:, None], rows):
        chosen = [rows[i] for i in members]
        best = (_min_p(scores, chosen) + gumbel(chosen, token_ids)).argmax(-1, keepdim=True)
        tokens[members] = token_ids.expand(len(members), -1).gather(1, best)[:, 0]
    return tokens


def _candidates(logits: torch.Tensor, rows: Seq[Row]) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """What top-k and top-p leave of logits (rows, vocab), for rows that sort out as many tokens together.

    Yields the rows' indices, their scores (rows, n), -inf where filtered out, and token ids (rows or 1, n).
    """
    vocab = logits.shape[1]
    todo: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        todo.setdefault(_num_candidates(row.params, vocab), []).append(i)
    while todo:
        num, members = todo.popitem()
        chosen = logits if len(members) == len(rows) else logits[members]  # members are in order
        if not num:
            yield members, chosen, torch.arange(vocab, device=logits.device)[None]
            continue
        scores, token_ids, is_short = _filtered(chosen, [rows[i].params for i in members], num)
        if any(is_short):
            short_ones = [i for i, short in zip(members, is_short, strict=True) if short]
            todo[vocab] = sorted(todo.get(vocab, []) + short_ones)
            enough = [j for j, short in enumerate(is_short) if not short]
            members, scores, token_ids = [members[j] for j in enough], scores[enough], token_ids[enough]
        if members:
            yield members, scores, token_ids


def _num_candidates(params: SamplingParams, vocab: int) -> int:
    """How many of the likeliest tokens are sorted out first; 0 where no filter wants it.

    The row's alone to say: with another number, equals come in another order and sums are rounded otherwise.
    """
    if not (params.top_k or params.top_p < 1):
        return 0
    return min(max(_MIN_CANDIDATES, 1 << (params.top_k - 1).bit_length()), vocab)


def _filtered(
    logits: torch.Tensor, params: Seq[SamplingParams], num: int
) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
    """The `num` likeliest tokens of each row, best first, as scores (-inf where filtered out) and token ids, each
    (rows, num); and which rows' top-p wants more than these.
    """
    vocab = logits.shape[1]
    top_ks = [min(one.top_k or vocab, vocab) for one in params]
    top_k = torch.tensor(top_ks, device=logits.device)[:, None]
    top_p = logits.new_tensor([one.top_p for one in params])[:, None]
    scores, token_ids = logits.topk(num, dim=-1)
    scores = scores.masked_fill(torch.arange(num, device=logits.device) >= top_k, float("-inf"))
    # The mass that top-p divides: what top-k left, or the whole vocabulary's. By softmax, which sums up each row
    # in one order; torch's sums share a row among threads where it is alone.
    probabilities = scores.softmax(-1)
    if num < max(top_ks):
        probabilities = torch.where(top_k <= num, probabilities, logits.softmax(-1).gather(1, token_ids))
    mass = probabilities.cumsum(-1)
    is_short = (mass[:, -1:] < top_p) & (top_k > num)
    before = torch.cat((torch.zeros_like(mass[:, :1]), mass[:, :-1]), -1)
    scores = scores.masked_fill((before >= top_p) & (top_p < 1), float("-inf"))
    return scores, token_ids, is_short[:, 0].tolist()


def _min_p(scores: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
    """Drop what is less likely than min_p times the likeliest token."""
    if not any(row.params.min_p for row in rows):
        return scores
    # A row without min-p keeps everything.
    least = [math.log(row.params.min_p) if row.params.min_p else float("-inf") for row in rows]
    log_min_p = scores.new_tensor(least)[:, None]
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) + log_min_p, float("-inf"))


def _logprobs(logprobs: torch.Tensor, token_id: int, num_top: int) -> Logprobs:
    values, token_ids = logprobs.topk(min(num_top, logprobs.shape[0]))
    return Logprobs(float(logprobs[token_id]), tuple(zip(token_ids.tolist(), values.tolist(), strict=True)))
