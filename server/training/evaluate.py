"""Loss and accuracy of a model on held-out rows, without dropout.

Counted tokens are those that training would train on. The model predicts each of them from the true tokens before
it. Exact match needs generated completions, so `server.jobs.exact_match` measures it with the engine.
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
    if that wasn't measured.
    """

    loss: float  # nats per counted token
    accuracy: float  # share of counted tokens that the model finds the likeliest
    num_rows: int
    num_tokens: int  # counted
    rows: tuple[tuple[float, int], ...] = ()
    matches: tuple[bool, ...] | None = None

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
    """Measurements of one set of weights on a job's held-out rows, and its exact matches on training rows."""

    held_out: Evaluation | None = None
    recalled: tuple[bool, ...] | None = None  # one for each of `JobData.trained_references`


def _go_on() -> None:
    pass


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

    `keys` are the examples' `Examples.row_keys`, if some rows may be split into several examples. `yield_or_leave`
    is called before each micro-batch, and may raise. Each micro-batch runs within the context manager
    `computing(number of tokens)`. Losses are summed exactly, so `max_tokens` changes the result only by rounding
    in torch's passes, and not at all in native code.
    """
    losses, num_right = array("d"), 0
    spans: dict[int, tuple[int, int, int]] = {}  # by index: the row's key; where losses begin and end
    for indices in pack([len(example.token_ids) for example in examples], max_tokens):
        yield_or_leave()
        batch = MicroBatch.of(chosen := [examples[index] for index in indices])
        with computing(len(batch.token_ids)):
            found = passes.measure(batch)
        start = len(losses)
        losses.extend(found.losses)
        num_right += sum(found.are_right)
        for index, example in zip(indices, chosen, strict=True):
            end = start + sum(example.is_target)
            spans[index] = (hash(example) if keys is None else keys[index], start, end)
            start = end
    if not losses:
        raise ValueError("nothing to evaluate: no example has a token that is trained on")
    rows: dict[int, tuple[float, int]] = {}
    for index in sorted(spans):
        key, start, end = spans[index]
        if start < end:
            loss, count = rows.get(key, (0.0, 0))
            rows[key] = (loss + math.fsum(losses[start:end]), count + end - start)
    loss, accuracy = math.fsum(losses) / len(losses), num_right / len(losses)
    return Evaluation(loss, accuracy, len(examples), len(losses), tuple(rows.values()))
