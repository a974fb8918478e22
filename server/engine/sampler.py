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
import struct
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from server.engine.request import SamplingParams
from server.engine.sequence import Constraint

_MIN_CANDIDATES = 256  # the first attempt at a top-p set; the whole vocabulary follows where it is too small
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
    logits = logits / temperature[:, None]
    filtered = [i for i, row in enumerate(rows) if row.params.top_k or row.params.top_p < 1]
    whole = [i for i, row in enumerate(rows) if not (row.params.top_k or row.params.top_p < 1)]
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    if whole:
        chosen = logits[whole] if filtered else logits
        every_token = torch.arange(logits.shape[1], device=logits.device)[None]
        chosen_rows = [rows[i] for i in whole]
        tokens[whole] = (_min_p(chosen, chosen_rows) + gumbel(chosen_rows, every_token)).argmax(-1)
    if filtered:
        chosen_rows = [rows[i] for i in filtered]
        scores, candidates = _candidates(logits[filtered], chosen_rows)
        best = (_min_p(scores, chosen_rows) + gumbel(chosen_rows, candidates)).argmax(-1, keepdim=True)
        tokens[filtered] = candidates.gather(1, best)[:, 0]
    return tokens


def _candidates(logits: torch.Tensor, rows: Seq[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """What top-k and top-p leave, best first: (scores, token ids), each (rows, n); -inf where filtered out."""
    vocab = logits.shape[1]
    top_k = torch.tensor([row.params.top_k or vocab for row in rows], device=logits.device)[:, None]
    top_p = logits.new_tensor([row.params.top_p for row in rows])[:, None]
    num = max([_MIN_CANDIDATES, *(row.params.top_k for row in rows)])
    while True:
        num = min(num, vocab)
        scores, token_ids = logits.topk(num, dim=-1)  # (rows, num)
        scores = scores.masked_fill(torch.arange(num, device=logits.device) >= top_k, float("-inf"))
        # The mass that top-p divides: what top-k left, or the whole vocabulary's.
        total = torch.where(top_k < vocab, scores.logsumexp(-1, True), logits.logsumexp(-1, True))
        mass = (scores - total).exp().cumsum(-1)
        if num == vocab or bool(((mass[:, -1:] >= top_p) | (top_k <= num)).all()):
            before = torch.cat((torch.zeros_like(mass[:, :1]), mass[:, :-1]), -1)
            return scores.masked_fill((before >= top_p) & (top_p < 1), float("-inf")), token_ids
        num = vocab


def _min_p(scores: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
    """Drop what is less likely than min_p times the likeliest token."""
    if not any(row.params.min_p for row in rows):
        return scores
    # log(0) = -inf: a row without min-p keeps everything.
    log_min_p = scores.new_tensor([row.params.min_p for row in rows]).log()[:, None]
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) + log_min_p, float("-inf"))


def _logprobs(logprobs: torch.Tensor, token_id: int, num_top: int) -> Logprobs:
    values, token_ids = logprobs.topk(min(num_top, logprobs.shape[0]))
    return Logprobs(float(logprobs[token_id]), tuple(zip(token_ids.tolist(), values.tolist(), strict=True)))
