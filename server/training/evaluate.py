"""How good a model is on rows that it was not trained on, dropout off: loss and accuracy.

Each row is read once, and the model asked what it makes of every counted token, given the true ones before it.
Which rows, and what becomes of the numbers, is the caller's. Exact match, which needs completions, is measured by
`server.jobs.exact_match`, with the engine.
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
"""Of a micro-batch; a longer row is one of its own."""
MAX_LOSS = 700.0
"""Nats, beyond which a perplexity would not be a finite number."""


class LossNotFinite(SmoloraError):
    """What trained weights are to be compared with has a held-out loss that is no number."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured. `exact_match` is a share of the completions asked for; None where none was."""

    loss: float  # nats per counted token
    accuracy: float  # of the likeliest token, given the true ones before it
    num_rows: int
    num_tokens: int  # counted
    exact_match: float | None = None

    @property
    def is_finite(self) -> bool:
        """Whether the loss is a number that others can be compared with."""
        return math.isfinite(self.loss)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, MAX_LOSS))


def _go_on() -> None:
    pass


def evaluate(
    passes: Pass,
    examples: Sequence[Example],
    *,
    max_tokens: int = MAX_TOKENS,
    yield_or_leave: Callable[[], None] = _go_on,
    computing: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> Evaluation:
    """Loss and accuracy over the tokens of `examples` that are trained on, of which there must be some.

    `yield_or_leave` is called before each micro-batch, and may raise; the micro-batch then is in a block of
    `computing`, which is told its tokens. `max_tokens` changes the result by rounding
    alone, in native code not at all: losses are added up as if without rounding."""
    losses, num_right = array("d"), 0
    for indices in pack([len(example.token_ids) for example in examples], max_tokens):
        yield_or_leave()
        batch = MicroBatch.of([examples[index] for index in indices])
        with computing(len(batch.token_ids)):
            found = passes.measure(batch)
        losses.extend(found.losses)
        num_right += found.num_right
    if not losses:
        raise ValueError("nothing to evaluate: no example has a token that is trained on")
    return Evaluation(math.fsum(losses) / len(losses), num_right / len(losses), len(examples), len(losses))
