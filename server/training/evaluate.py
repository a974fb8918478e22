"""Loss and accuracy of a model on held-out rows, without dropout.

Counted tokens are those that training would train on. The model predicts each of them from the true tokens before
it. Exact match needs generated completions, so `server.jobs.scoring` measures it with the engine.
"""

import math
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from adapters.errors import SmoloraError
from server.training.encoding import Example
from server.training.passes import MicroBatch, Pass
from server.training.trainer import pack

MAX_TOKENS = 2048
"""The most tokens of a micro-batch. A longer row has its own micro-batch."""
MAX_LOSS = 700.0
"""Nats. The perplexity of a higher loss isn't a finite number."""


class LossNotFinite(SmoloraError):
    """The held-out loss of the base or of a version isn't finite, so no loss can be compared with it."""


@dataclass(frozen=True)
class Evaluation:
    """Measurements on held-out rows.

    `rows` has the summed loss and the number of counted tokens of each distinct row. Equal rows share one entry,
    since a repeated row says nothing new. The windows of a split row also share one, since they are alike.
    `matches` says for each reference (a row's prompt and answer) whether the model gave exactly this answer; None
    if that wasn't measured. `option_scores` has for each of `JobData.asked` the log-probabilities of the options;
    a decision that couldn't be scored has none.
    """

    loss: float  # nats per counted token
    accuracy: float  # share of counted tokens that the model finds the likeliest
    num_rows: int
    num_tokens: int  # counted
    rows: tuple[tuple[float, int], ...] = ()
    matches: tuple[bool, ...] | None = None
    option_scores: tuple[tuple[float, ...], ...] | None = None

    @property
    def exact_match(self) -> float | None:
        """The share of references that the model answered exactly, or None if there are no `matches`."""
        return sum(self.matches) / len(self.matches) if self.matches else None

    @property
    def is_finite(self) -> bool:
        """Whether the loss is finite, so that it can be compared with other losses."""
        return math.isfinite(self.loss)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, MAX_LOSS))


@dataclass(frozen=True)
class Scores:
    """Measurements of one set of weights on a job's held-out rows, and its exact matches on training rows.

    `answers` has the answer to each of the job's samples, or None for a sample that can't be answered. It is empty
    if no samples were asked.
    """

    held_out: Evaluation | None = None
    recalled: tuple[bool, ...] | None = None  # one for each of `JobData.trained_references`
    answers: tuple[str | None, ...] = ()


def _go_on() -> None:
    pass


@dataclass(frozen=True)
class TokenScores:
    """The counted tokens of one example: their losses in nats, and how many the model finds the likeliest."""

    losses: Sequence[float]
    num_right: int


def evaluate(
    passes: Pass,
    examples: Sequence[Example],
    *,
    keys: Sequence[int] | None = None,
    max_tokens: int = MAX_TOKENS,
    yield_or_leave: Callable[[], None] = _go_on,
    computing: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> Evaluation:
    """Measure loss and accuracy over the target tokens of `examples`. Raise ValueError if there are none.

    `keys` are the examples' `Examples.row_keys`, if some rows may be split into several examples. The other
    arguments are those of `token_scores`.
    """
    scores = token_scores(
        passes, examples, max_tokens=max_tokens, yield_or_leave=yield_or_leave, computing=computing
    )
    num_tokens = sum(len(one.losses) for one in scores)
    if not num_tokens:
        raise ValueError("nothing to evaluate: no example has a token that is trained on")
    rows: dict[int, tuple[float, int]] = {}
    for key, one in zip(map(hash, examples) if keys is None else keys, scores, strict=True):
        if one.losses:
            loss, count = rows.get(key, (0.0, 0))
            rows[key] = (loss + math.fsum(one.losses), count + len(one.losses))
    accuracy = sum(one.num_right for one in scores) / num_tokens
    return Evaluation(mean_loss(scores), accuracy, len(examples), num_tokens, tuple(rows.values()))


def mean_loss(scores: Sequence[TokenScores]) -> float:
    """Return the loss in nats per counted token. The sum is exact, so the order of examples doesn't matter."""
    return math.fsum(loss for one in scores for loss in one.losses) / sum(len(one.losses) for one in scores)


def token_scores(
    passes: Pass,
    examples: Sequence[Example],
    *,
    max_tokens: int = MAX_TOKENS,
    yield_or_leave: Callable[[], None] = _go_on,
    computing: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> list[TokenScores]:
    """Return the scores of each example's target tokens, in the order of `examples`.

    `yield_or_leave` is called before each micro-batch, and may raise. Each micro-batch runs within the context
    manager `computing(number of tokens)`. `max_tokens` changes the result only by rounding in torch's passes, and
    not at all in native code.
    """
    found: dict[int, TokenScores] = {}
    for indices in pack([len(example.token_ids) for example in examples], max_tokens):
        yield_or_leave()
        batch = MicroBatch.of(chosen := [examples[index] for index in indices])
        with computing(len(batch.token_ids)):
            measured = passes.measure(batch)
        start = 0
        for index, example in zip(indices, chosen, strict=True):
            end = start + sum(example.is_target)
            found[index] = TokenScores(array("d", measured.losses[start:end]), sum(measured.are_right[start:end]))
            start = end
    return [found[index] for index in range(len(examples))]
