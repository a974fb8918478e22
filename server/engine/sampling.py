"""What changes a step's logits before tokens are chosen from them: penalties, biases and constraints.

In this order, as Hugging Face's generation applies them: repetition penalty (Keskar et al. 2019,
arXiv:1909.05858), presence and frequency penalty and logit bias (as OpenAI's API defines them), the mask of a
constraint. Each is done for all rows at once, so that a device gets its numbers in one copy.

Chooses each row's next token from its logits.

Sampling is Gumbel-max (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030): the token with the highest
logit / temperature + g, where g is standard Gumbel noise. The noise of a token is a hash of (seed, choice index,
position, token id) and of nothing else, so a request draws the same tokens in any company and on any schedule.

Before it come the changes of `logits`, then temperature, top-k, top-p (Holtzman et al. 2020, arXiv:1904.09751) and
min-p (Nguyen et al. 2024, arXiv:2407.01082), in the order of Hugging Face's generation.

The host waits for the device at most three times, whatever rows ask for: to know which of them top-p wants more
of, for the tokens with the ids of likely ones, and for log-probabilities.

Log-probabilities of given tokens, from the hidden states of the chunks that hold them.

A sequence's scores come together chunk by chunk, in `Sequence.scores`; what is computed again after a preemption
is written again. Leaves to others: which tokens are computed in which step.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from server.engine.request import Logprobs, SamplingParams
from server.engine.sequence import Chunk, TokenCounts
from server.model.device import floats_beside, ints_beside, to_device


class Penalized(NamedTuple):
    """Tokens whose logits penalties change; each token once."""

    seen: NDArray[np.int64]  # that the repetition penalty is for
    used: NDArray[np.int64]  # that the presence and the frequency penalty are for
    penalties: NDArray[np.float64]  # what these take off the logits of each of `used`

    @classmethod
    def nothing(cls) -> Self:
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True, eq=False)
class LogitsRow:
    """What decides one row's token, besides its logits."""

    params: SamplingParams
    index: int  # of the choice
    position: int  # of the new token in its sequence
    counts: TokenCounts  # of the prompt and the output so far
    draft: Seq[int] = ()  # tokens that follow them
    forbidden: Callable[[], NDArray[np.bool_] | None] | None = None  # `Constraint.forbidden`, if there is one

    @property
    def penalized(self) -> Penalized:
        """What the penalties change. Only asked if one applies."""
        params = self.params
        tokens, counts = self.counts.of(self.draft)
        is_used = counts > 0
        used, presence, frequency = tokens[is_used], params.presence_penalty, params.frequency_penalty
        if not (presence or frequency):
            used = used[:0]
        seen = tokens if params.repetition_penalty != 1 else tokens[:0]
        penalties = presence + frequency * counts[is_used][: len(used)].astype(np.float64)
        return Penalized(seen, used, penalties)


def penalize(logits: torch.Tensor, rows: Seq[LogitsRow]) -> None:
    """Apply the rows' penalties and biases to logits (rows, vocab), each kind of all rows at once."""
    flat, vocab = logits.view(-1), logits.shape[1]
    seen, used, biased = _Places(), _Places(), _Places()  # with penalties, what is taken off, what is added
    for i, row in enumerate(rows):
        params = row.params
        if not params.changes_logits:
            continue
        if params.penalizes:
            penalized = row.penalized
            seen.add(i * vocab, penalized.seen, np.full(penalized.seen.shape, params.repetition_penalty))
            used.add(i * vocab, penalized.used, penalized.penalties)
        if params.logit_bias:
            token_ids, biases = zip(*params.logit_bias, strict=True)
            biased.add(i * vocab, np.array(token_ids, np.int64), np.array(biases, np.float64))
    if seen:
        index, penalty = seen.on(logits)
        scores = flat[index]
        flat[index] = torch.where(scores < 0, scores * penalty, scores / penalty)
    if used:
        index, penalty = used.on(logits)
        flat[index] -= penalty
    if biased:
        index, bias = biased.on(logits)
        flat[index] += bias


class _Places:
    """Places in flat logits, with a number for each."""

    def __init__(self) -> None:
        self._places: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.float64]] = []

    def add(self, start: int, token_ids: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Of the row that begins at `start`."""
        if token_ids.size:
            self._places.append(token_ids + start)
            self._values.append(values)

    def __bool__(self) -> bool:
        return bool(self._values)

    def on(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The places and the numbers, where and as `logits` are."""
        places = torch.from_numpy(np.concatenate(self._places))
        values = torch.from_numpy(np.concatenate(self._values)).to(logits.dtype)
        return to_device(places, logits.device), to_device(values, logits.device)


def constrain(logits: torch.Tensor, rows: Seq[LogitsRow]) -> None:
    """Leave of logits (rows, vocab) only those of tokens that may come next: none of a failed constraint's row."""
    masks: dict[int, NDArray[np.bool_]] = {}
    for i, row in enumerate(rows):
        if row.forbidden is not None:
            forbidden = row.forbidden()
            if forbidden is None:
                logits[i].fill_(float("-inf"))
            else:
                masks[i] = forbidden
    if masks:
        for i, mask in zip(masks, _together(list(masks.values()), logits.device), strict=True):
            logits[i].masked_fill_(mask, float("-inf"))


def _together(arrays: Seq[NDArray[np.bool_]], device: torch.device) -> Seq[torch.Tensor]:
    """The arrays, all of one shape, on the device: by one copy where that is another memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return to_device(torch.from_numpy(np.stack(arrays)), device).unbind()


_MIN_CANDIDATES = 256  # the first attempt at a top-p set; the whole vocabulary follows for a row that wants more
MIN_TEMPERATURE = 1e-6
"""Below it a division would overflow; the likeliest token wins long before."""
_INT32 = 1 << 32


class Sampled(NamedTuple):
    """One row's token. None if its constraint has failed, or if its logits are NaN or infinite, which adapters of
    very large weights can cause."""

    token_id: int | None
    logprobs: Logprobs | None


def sample(logits: torch.Tensor, rows: Seq[LogitsRow]) -> list[Sampled]:
    """The next token of each row of logits (rows, vocab), fp32 and contiguous, which are overwritten."""
    assert logits.shape[0] == len(rows)
    wants_logprobs = [i for i, row in enumerate(rows) if row.params.logprobs]
    logprobs = _chosen(logits, wants_logprobs).log_softmax(-1) if wants_logprobs else None
    penalize(logits, rows)
    constrain(logits, rows)
    random = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if len(random) == len(rows):
        tokens = _draw(logits, rows)
    else:
        tokens = logits.argmax(-1)
        if random:
            drawn = _draw(_chosen(logits, random), [rows[i] for i in random])
            tokens[ints_beside(logits, random)] = drawn
    # NaN and infinity are the first that argmax finds.
    is_number = logits.gather(1, tokens[:, None])[:, 0].isfinite()
    tokens = tokens.where(is_number, -1)
    found: dict[int, Logprobs] = {}
    if logprobs is None:
        token_ids = tokens.tolist()
    else:
        token_ids, found = _with_logprobs(tokens, logprobs, wants_logprobs, rows)
    return [
        Sampled(None, None) if token_id < 0 else Sampled(token_id, found.get(i))
        for i, token_id in enumerate(token_ids)
    ]


def gumbel(rows: Seq[LogitsRow], token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for token_ids (rows, n) or (1, n): (rows, n) fp32, decided by row and token alone.

    A 32-bit mix of the token id and two words of the row's key (multipliers of "lowbias32", Wellons 2018). The
    23 highest bits make a uniform strictly between 0 and 1.
    """
    words = [struct.unpack("<ii", noise_key(row)) for row in rows]
    keys = to_device(torch.tensor(words, dtype=torch.int32), token_ids.device)  # (rows, 2)
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


def noise_key(row: LogitsRow) -> bytes:
    """The two words of 32 bits that a row's noise is hashed with."""
    data = struct.pack("<Qqq", row.params.seed, row.index, row.position)
    return hashlib.blake2b(data, digest_size=8).digest()


def _draw(logits: torch.Tensor, rows: Seq[LogitsRow]) -> torch.Tensor:
    """Gumbel-max over what the rows' filters leave of logits (rows, vocab): token ids (rows,)."""
    temperature = floats_beside(logits, [max(row.params.temperature, MIN_TEMPERATURE) for row in rows])
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for members, scores, token_ids in _candidates(logits / temperature[:, None], rows):
        chosen = [rows[i] for i in members]
        best = (_min_p(scores, chosen) + gumbel(chosen, token_ids)).argmax(-1, keepdim=True)
        tokens[ints_beside(logits, members)] = token_ids.expand(len(members), -1).gather(1, best)[:, 0]
    return tokens


def _candidates(
    logits: torch.Tensor, rows: Seq[LogitsRow]
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """What top-k and top-p leave of logits (rows, vocab), for rows that sort out as many tokens together.

    Yields the rows' indices, their scores (rows, n), -inf where filtered out, and token ids (rows or 1, n).
    """
    vocab = logits.shape[1]
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(_num_candidates(row.params, vocab), []).append(i)
    if unfiltered := groups.pop(0, None):
        yield unfiltered, _chosen(logits, unfiltered), torch.arange(vocab, device=logits.device)[None]
    whole = groups.pop(vocab, [])
    for num, members in groups.items():
        scores, token_ids, is_short = _filtered(_chosen(logits, members), [rows[i].params for i in members], num)
        if is_short is not None:  # of the group without top-k alone: the host waits once
            flags = is_short.tolist()
            whole += [i for i, short in zip(members, flags, strict=True) if short]
            enough = [j for j, short in enumerate(flags) if not short]
            members = [members[j] for j in enough]
            scores, token_ids = _chosen(scores, enough), _chosen(token_ids, enough)
        if members:
            yield members, scores, token_ids
    if whole:
        whole.sort()
        scores, token_ids, _ = _filtered(_chosen(logits, whole), [rows[i].params for i in whole], vocab)
        yield whole, scores, token_ids


def _num_candidates(params: SamplingParams, vocab: int) -> int:
    """How many of the likeliest tokens are sorted out first; 0 where no filter wants it.

    The row's alone to say: with another number, equals come in another order and sums are rounded otherwise.
    """
    if not (params.top_k or params.top_p < 1):
        return 0
    return min(max(_MIN_CANDIDATES, 1 << (params.top_k - 1).bit_length()), vocab)


def _filtered(
    logits: torch.Tensor, params: Seq[SamplingParams], num: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The `num` likeliest tokens of each row, best first, as scores (-inf where filtered out) and token ids, each
    (rows, num); and which rows' top-p wants more than these, (rows,), or None where none can.
    """
    vocab = logits.shape[1]
    top_ks = [min(one.top_k or vocab, vocab) for one in params]
    top_k = ints_beside(logits, top_ks)[:, None]
    top_p = floats_beside(logits, [one.top_p for one in params])[:, None]
    scores, token_ids = logits.topk(num, dim=-1)
    scores = scores.masked_fill(torch.arange(num, device=logits.device) >= top_k, float("-inf"))
    # The mass that top-p divides: what top-k left, or the whole vocabulary's. By softmax, which sums up each row
    # in one order; torch's sums share a row among threads where it is alone.
    probabilities = scores.softmax(-1)
    if num < max(top_ks):
        probabilities = torch.where(top_k <= num, probabilities, logits.softmax(-1).gather(1, token_ids))
    mass = probabilities.cumsum(-1)
    is_short = ((mass[:, -1:] < top_p) & (top_k > num))[:, 0] if num < max(top_ks) else None
    before = torch.cat((torch.zeros_like(mass[:, :1]), mass[:, :-1]), -1)
    return scores.masked_fill((before >= top_p) & (top_p < 1), float("-inf")), token_ids, is_short


def _min_p(scores: torch.Tensor, rows: Seq[LogitsRow]) -> torch.Tensor:
    """Drop what is less likely than min_p times the likeliest token."""
    if not any(row.params.min_p for row in rows):
        return scores
    # A row without min-p keeps everything.
    least = [math.log(row.params.min_p) if row.params.min_p else float("-inf") for row in rows]
    log_min_p = floats_beside(scores, least)[:, None]
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) + log_min_p, float("-inf"))


def _with_logprobs(
    tokens: torch.Tensor, logprobs: torch.Tensor, members: list[int], rows: Seq[LogitsRow]
) -> tuple[list[int], dict[int, Logprobs]]:
    """The tokens (rows,) of all rows; and what `members` of them want of log-probabilities (members, vocab)."""
    groups: dict[int, list[int]] = {}  # by how many they want
    for place, i in enumerate(members):
        groups.setdefault(min(rows[i].params.logprobs, logprobs.shape[1]), []).append(place)
    own = _chosen(tokens, members).clamp(min=0)
    ints, floats = [tokens], [logprobs.gather(1, own[:, None])[:, 0]]
    for num, places in groups.items():
        best = _chosen(logprobs, places).topk(num)
        ints.append(best.indices.flatten())
        floats.append(best.values.flatten())
    next_ints, next_floats = iter(torch.cat(ints).tolist()), iter(torch.cat(floats).tolist())
    token_ids, chosen = list(islice(next_ints, len(rows))), list(islice(next_floats, len(members)))
    found: dict[int, Logprobs] = {}
    for num, places in groups.items():
        for place in places:
            top = zip(islice(next_ints, num), islice(next_floats, num), strict=True)
            found[members[place]] = Logprobs(chosen[place], tuple(top))
    return token_ids, found


def _chosen(tensor: torch.Tensor, members: list[int]) -> torch.Tensor:
    """These rows of the tensor, which are in order; itself where they are all."""
    return tensor if len(members) == tensor.shape[0] else tensor[ints_beside(tensor, members)]


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
