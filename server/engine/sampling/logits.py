"""What changes a step's logits before tokens are chosen from them: penalties, biases and constraints.

In this order, as Hugging Face's generation applies them: repetition penalty (Keskar et al. 2019,
arXiv:1909.05858), presence and frequency penalty and logit bias (as OpenAI's API defines them), the mask of a
constraint. Each is done for all rows at once, so that a device gets its numbers in one copy.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from server.engine.request import SamplingParams
from server.engine.sampling.token_counts import TokenCounts
from server.model.device import to_device


class Restriction(Protocol):
    """What of a `Constraint` decides one token."""

    def forbidden(self) -> NDArray[np.bool_] | None:
        """(vocab,) True for tokens that may not come; None where it has failed."""
        ...


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
    constraint: Restriction | None = None

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
        if row.constraint is not None:
            forbidden = row.constraint.forbidden()
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
