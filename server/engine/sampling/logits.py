"""What changes a step's logits before tokens are chosen from them: penalties, biases and constraints.

In this order, as Hugging Face's generation applies them: repetition penalty (Keskar et al. 2019,
arXiv:1909.05858), presence and frequency penalty and logit bias (as OpenAI's API defines them), the mask of a
constraint. Each is done for all rows at once, so that a device gets its numbers in one copy.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from server.engine.request import SamplingParams
from server.model.device import floats_beside, to_device


class Restriction(Protocol):
    """What of a `Constraint` decides one token."""

    def forbidden(self) -> NDArray[np.bool_] | None:
        """(vocab,) True for tokens that may not come; None where it has failed."""
        ...


@dataclass(frozen=True, eq=False)
class LogitsRow:
    """What decides one row's token, besides its logits."""

    params: SamplingParams
    index: int  # of the choice
    position: int  # of the new token in its sequence
    token_ids: Seq[int]  # the prompt and the output so far: what the repetition penalty looks at
    num_prompt_tokens: int = 0  # the other penalties look at what comes after them
    constraint: Restriction | None = None

    @property
    def seen(self) -> Collection[int]:
        """The tokens that the repetition penalty is for."""
        return set(self.token_ids) if self.params.repetition_penalty != 1 else ()

    @property
    def penalties(self) -> Mapping[int, float]:
        """What presence and frequency penalty take off the logits of tokens."""
        presence, frequency = self.params.presence_penalty, self.params.frequency_penalty
        if not (presence or frequency):
            return {}
        counts = Counter(self.token_ids[self.num_prompt_tokens :])
        return {token_id: presence + frequency * count for token_id, count in counts.items()}


def penalize(logits: torch.Tensor, rows: Seq[LogitsRow]) -> None:
    """Apply the rows' penalties and biases to logits (rows, vocab), each kind of all rows at once."""
    flat, vocab = logits.view(-1), logits.shape[1]
    seen, used, biased = _Places(), _Places(), _Places()  # with penalties, what is taken off, what is added
    for i, row in enumerate(rows):
        params = row.params
        if not params.changes_logits:
            continue
        if tokens := row.seen:
            seen.add(i * vocab, tokens, [params.repetition_penalty] * len(tokens))
        if penalties := row.penalties:
            used.add(i * vocab, penalties, penalties.values())
        if params.logit_bias:
            biased.add(i * vocab, *zip(*params.logit_bias, strict=True))
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
        self._values: list[float] = []

    def add(self, start: int, token_ids: Collection[int], values: Collection[float]) -> None:
        """Of the row that begins at `start`."""
        self._places.append(np.fromiter(token_ids, np.int64, len(token_ids)) + start)
        self._values += values

    def __bool__(self) -> bool:
        return bool(self._values)

    def on(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The places and the numbers, where and as `logits` are."""
        places = torch.from_numpy(np.concatenate(self._places))
        return to_device(places, logits.device), floats_beside(logits, self._values)


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
