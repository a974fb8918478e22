"""Sample tokens from logits, and score given tokens.

Sampling is Gumbel-max (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030): it chooses the token with the highest
logit / temperature + g, where g is standard Gumbel noise. A token's noise is a hash of (seed, choice index,
position, token id) only. So a request draws the same tokens whatever else is in its steps.

Logits change in this order, which is that of Hugging Face's generation: repetition penalty (Keskar et al. 2019,
arXiv:1909.05858), presence and frequency penalty and logit bias (as in OpenAI's API), the mask of a constraint,
temperature, top-k, top-p (Holtzman et al. 2020, arXiv:1904.09751) and min-p (Nguyen et al. 2024,
arXiv:2407.01082). A row has the logits from which one token is drawn. Each change is made for all rows at once, so
that its parameters are copied to a device once.

The host waits for the device at most three times in a step: to learn for which rows top-p needs more tokens than
were sorted, for the chosen and likeliest token ids, and for log-probabilities.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from itertools import islice
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from server.engine.request import Logprobs, SamplingParams
from server.engine.sequence import Chunk, Sequence, TokenCounts
from server.model.device import floats_on, ints_on, to_device

MIN_TEMPERATURE = 1e-6
"""Lower positive temperatures are raised to this one, because dividing logits by them could overflow. The
likeliest token wins at this temperature, too."""
_MIN_CANDIDATES = 256  # tokens sorted for top-p; a row that needs more sorts the whole vocabulary
_INT32 = 1 << 32
_SLICE = 32  # rows of logits that are scored at a time: 6 MB for SmolLM2


class Penalized(NamedTuple):
    """The distinct tokens whose logits are changed by penalties."""

    seen: NDArray[np.int64]  # tokens with a repetition penalty
    used: NDArray[np.int64]  # tokens with a presence or frequency penalty
    penalties: NDArray[np.float64]  # presence plus frequency penalty of each token in `used`

    @classmethod
    def nothing(cls) -> Self:
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


class LogitsRow(NamedTuple):
    """The inputs that, together with a row of logits, determine the row's token."""

    params: SamplingParams
    choice: int  # index of the answer, of those to one request
    position: int  # position of the new token in its sequence
    counts: TokenCounts  # token counts of the prompt and the answer so far
    draft: Seq[int] = ()  # drafted tokens after the answer so far
    forbidden: Callable[[], NDArray[np.bool_] | None] | None = None  # as `Constraint.forbidden`

    @property
    def penalized(self) -> Penalized:
        """The tokens whose logits are changed by penalties. Use it only if `params.penalizes`."""
        params = self.params
        tokens, counts = self.counts.of(self.draft)
        is_used = counts > 0
        used, presence, frequency = tokens[is_used], params.presence_penalty, params.frequency_penalty
        if not (presence or frequency):
            used = used[:0]
        seen = tokens if params.repetition_penalty != 1 else tokens[:0]
        penalties = presence + frequency * counts[is_used][: len(used)].astype(np.float64)
        return Penalized(seen, used, penalties)


class Sampled(NamedTuple):
    """One row's token. `token_id` is None if the row's constraint has failed, or if a logit is NaN or infinite.

    Adapters with very large weights can cause such logits.
    """

    token_id: int | None
    logprobs: Logprobs | None


def sample(logits: torch.Tensor, rows: Seq[LogitsRow]) -> list[Sampled]:
    """Return the next token of each row.

    `logits` (rows, vocab) must be fp32 and contiguous, and are overwritten.
    """
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
            tokens[ints_on(logits, random)] = drawn
    # argmax prefers NaN and infinity to any number.
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


def _draw(logits: torch.Tensor, rows: Seq[LogitsRow]) -> torch.Tensor:
    """Draw token ids (rows,) from logits (rows, vocab) by each row's temperature and filters."""
    temperature = floats_on(logits, [max(row.params.temperature, MIN_TEMPERATURE) for row in rows])
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for members, scores, token_ids in _candidates(logits / temperature[:, None], rows):
        chosen = [rows[i] for i in members]
        best = (_min_p(scores, chosen) + gumbel(chosen, token_ids)).argmax(-1, keepdim=True)
        tokens[ints_on(logits, members)] = token_ids.expand(len(members), -1).gather(1, best)[:, 0]
    return tokens


def gumbel(rows: Seq[LogitsRow], token_ids: torch.Tensor) -> torch.Tensor:
    """Return fp32 standard Gumbel noise (rows, n) for token_ids (rows, n) or (1, n), decided by row and token id.

    A 32-bit hash mixes the token id and the two words of the row's `noise_key`. Its multipliers are those of
    "lowbias32" (Wellons 2018). The hash's 23 highest bits make a uniform number strictly between 0 and 1.
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
    """Shift right logically. torch's own shift is arithmetic: it keeps the sign."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def noise_key(row: LogitsRow) -> bytes:
    """Return the key of a row's noise: two words of 32 bits."""
    data = struct.pack("<Qqq", row.params.seed, row.choice, row.position)
    return hashlib.blake2b(data, digest_size=8).digest()


def _candidates(
    logits: torch.Tensor, rows: Seq[LogitsRow]
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Apply top-k and top-p to logits (rows, vocab), and yield the candidates to draw from, for groups of rows.

    The rows of a group have the same number n of candidates. Each item has the indices of a group's rows, the
    scores (rows, n) of their candidates, and the token ids (rows or 1, n). The scores of filtered tokens are -inf.
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
        if is_short is not None:  # only in the group without top-k, so the host waits once
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
    """Return how many of the likeliest tokens to sort at first, or 0 if no filter needs sorted tokens.

    The number affects the order of ties and the rounding of sums. So it depends only on the row's own parameters:
    other rows don't affect the result.
    """
    if not (params.top_k or params.top_p < 1):
        return 0
    return min(max(_MIN_CANDIDATES, 1 << (params.top_k - 1).bit_length()), vocab)


def _filtered(
    logits: torch.Tensor, params: Seq[SamplingParams], num: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the scores (rows, num) and ids (rows, num) of the `num` likeliest tokens of each row, best first.

    The scores of tokens that top-k or top-p filters are -inf. The third result (rows,) says which rows need more
    tokens for top-p. The third result is None if no row can need more.
    """
    vocab = logits.shape[1]
    top_ks = [min(one.top_k or vocab, vocab) for one in params]
    top_k = ints_on(logits, top_ks)[:, None]
    top_p = floats_on(logits, [one.top_p for one in params])[:, None]
    scores, token_ids = logits.topk(num, dim=-1)
    scores = scores.masked_fill(torch.arange(num, device=logits.device) >= top_k, float("-inf"))
    # Top-p is relative to the probability mass of the tokens that top-k leaves, or of all tokens without top-k.
    # softmax always sums a row in the same order. torch's sum doesn't: it splits a single row among threads.
    probabilities = scores.softmax(-1)
    if num < max(top_ks):
        probabilities = torch.where(top_k <= num, probabilities, logits.softmax(-1).gather(1, token_ids))
    mass = probabilities.cumsum(-1)
    is_short = ((mass[:, -1:] < top_p) & (top_k > num))[:, 0] if num < max(top_ks) else None
    before = torch.cat((torch.zeros_like(mass[:, :1]), mass[:, :-1]), -1)
    return scores.masked_fill((before >= top_p) & (top_p < 1), float("-inf")), token_ids, is_short


def _min_p(scores: torch.Tensor, rows: Seq[LogitsRow]) -> torch.Tensor:
    """Return the scores, with -inf for tokens that are less likely than min_p times the likeliest token."""
    if not any(row.params.min_p for row in rows):
        return scores
    least = [math.log(row.params.min_p) if row.params.min_p else float("-inf") for row in rows]
    log_min_p = floats_on(scores, least)[:, None]
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) + log_min_p, float("-inf"))


def _with_logprobs(
    tokens: torch.Tensor, logprobs: torch.Tensor, members: list[int], rows: Seq[LogitsRow]
) -> tuple[list[int], dict[int, Logprobs]]:
    """Return the token ids of all rows, and a map from each row in `members` to the row's log-probabilities.

    `tokens` is (rows,), and `logprobs` is (members, vocab). Both tensors are on the device, and the results are on
    the host.
    """
    groups: dict[int, list[int]] = {}  # by the number of log-probabilities
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
    """Return the rows `members` of the tensor, or the tensor itself if `members` are all of its rows."""
    return tensor if len(members) == tensor.shape[0] else tensor[ints_on(tensor, members)]


def penalize(logits: torch.Tensor, rows: Seq[LogitsRow]) -> None:
    """Apply the rows' penalties and biases to logits (rows, vocab)."""
    flat, vocab = logits.view(-1), logits.shape[1]
    seen, used, biased = _Places(), _Places(), _Places()
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
    """Indices into the flattened logits, and a number by which to change the logit at each index."""

    def __init__(self) -> None:
        self._places: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.float64]] = []

    def add(self, start: int, token_ids: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Add a row's token ids, and a number for each token. The row's logits begin at index `start`."""
        if token_ids.size:
            self._places.append(token_ids + start)
            self._values.append(values)

    def __bool__(self) -> bool:
        return bool(self._values)

    def on(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the indices and the numbers on the device and in the dtype of `logits`."""
        places = torch.from_numpy(np.concatenate(self._places))
        values = torch.from_numpy(np.concatenate(self._values)).to(logits.dtype)
        return to_device(places, logits.device), to_device(values, logits.device)


def constrain(logits: torch.Tensor, rows: Seq[LogitsRow]) -> None:
    """Set the logits (rows, vocab) of forbidden tokens to -inf, or a whole row if its constraint has failed."""
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
    """Return the arrays, all of one shape, as tensors on the device. They are copied to the device together."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return to_device(torch.from_numpy(np.stack(arrays)), device).unbind()


def score(logits_of: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, chunks: Seq[Chunk]) -> None:
    """Compute the scores (nats) that the chunks' requests ask for, and store them in the sequences.

    The rows of `hidden` (rows, hidden_size) are each chunk's last `num_hidden` tokens, chunk by chunk. A token's
    score is its log-softmax under the logits of the previous position, before temperature and penalties. If the
    request asks for `logprobs`, the likeliest tokens are stored with the score. After a preemption the same scores
    are stored again.
    """
    found: list[tuple[Sequence, int, Seq[int]]] = []  # for each row of logits: a position and the tokens to score
    rows: list[int] = []
    start = 0
    for chunk in chunks:
        sequence = chunk.sequence
        first = chunk.start + chunk.num_tokens - chunk.num_hidden  # position of the chunk's first row
        if (scored_from := sequence.scored_from) is not None:
            for position in range(max(chunk.start + 1, scored_from), chunk.stop + 1):
                if targets := sequence.targets(position):
                    found.append((sequence, position, targets))
                    rows.append(start + position - 1 - first)
        start += chunk.num_hidden
    if not found:
        return
    num_top = max(sequence.request.sampling.logprobs for sequence, _, _ in found)
    scores, top_scores, top_ids = [], [], []
    for num, index in enumerate(torch.split(ints_on(hidden, rows), _SLICE)):
        part = found[num * _SLICE : (num + 1) * _SLICE]
        logits = logits_of(hidden[index])
        total = log_totals(logits)
        places = ints_on(hidden, [row for row, (_, _, targets) in enumerate(part) for _ in targets])
        chosen = ints_on(hidden, [token_id for _, _, targets in part for token_id in targets])
        scores.append(logits[places, chosen] - total[places])
        if num_top:
            best = logits.topk(min(num_top, logits.shape[1]))
            top_scores.append((best.values - total[:, None]).flatten())
            top_ids.append(best.indices)
    ids = torch.cat(top_ids).tolist() if top_ids else [()] * len(found)
    values = iter(torch.cat(scores + top_scores).tolist())
    chosen_scores = [list(islice(values, len(targets))) for _, _, targets in found]
    for (sequence, position, _), of_targets, likeliest in zip(found, chosen_scores, ids, strict=True):
        top = tuple(zip(likeliest, islice(values, len(likeliest)), strict=True))
        wanted = top[: sequence.request.sampling.logprobs]
        sequence.record(position, [Logprobs(score, wanted) for score in of_targets])


def log_totals(logits: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of each row's sum of exponentials (rows,). A row's bits don't depend on other rows."""
    rows = torch.cat((logits, logits)) if len(logits) == 1 else logits  # torch splits the sum of a lone row
    return rows.logsumexp(-1)[: len(logits)]
