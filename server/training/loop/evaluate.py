"""How good a model is on rows that it was not trained on, dropout off: loss and accuracy.

Each row is read once, and the model asked what it makes of every counted token, given the true ones before it.
Which rows, and what becomes of the numbers, is the caller's. Exact match, which needs completions, is measured by
`server.training.worker.exact_match`, with the engine.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adapters.errors import SmoloraError
from server.model.device import to_device
from server.model.smollm import Adapters, SmolLM
from server.training.data.examples import Example
from server.training.loop.packing import pack
from server.training.passes.loss import CHUNK
from server.training.passes.packed_attention import PackedAttention

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
    model: SmolLM,
    adapters: Adapters,
    examples: Sequence[Example],
    *,
    max_tokens: int = MAX_TOKENS,
    yield_or_leave: Callable[[], None] = _go_on,
) -> Evaluation:
    """Loss and accuracy over the tokens of `examples` that are trained on, of which there must be some.

    `yield_or_leave` is called before each micro-batch, and may raise. `max_tokens` changes the result by rounding
    alone."""
    loss, num_right, num_tokens = 0.0, 0, 0
    for indices in pack([len(example.token_ids) for example in examples], max_tokens):
        yield_or_leave()
        batch = [examples[index] for index in indices]
        found = _micro_batch(model, adapters, batch)
        loss, num_right, num_tokens = loss + found[0], num_right + found[1], num_tokens + found[2]
    if not num_tokens:
        raise ValueError("nothing to evaluate: no example has a token that is trained on")
    return Evaluation(loss / num_tokens, num_right / num_tokens, len(examples), num_tokens)


@torch.no_grad()
def _micro_batch(model: SmolLM, adapters: Adapters, batch: Sequence[Example]) -> tuple[float, int, int]:
    """(summed loss, tokens guessed right, tokens counted)."""
    device = model.device
    token_ids = torch.tensor([token for example in batch for token in example.token_ids])
    is_target = torch.tensor([flag for example in batch for flag in example.is_target])
    counted = is_target.nonzero()[:, 0]  # never a row's first token, so the one before it is of the same row
    targets = to_device(token_ids[counted], device)
    attention = PackedAttention([len(example.token_ids) for example in batch], device)
    hidden = model.forward(to_device(token_ids, device), attention.positions, attention, adapters)
    hidden = hidden[to_device(counted - 1, device)]  # (counted, hidden)
    losses, nums_right = [], []
    for rows, chosen in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True):
        logits = model.logits(rows)  # (chunk, vocab), fp32
        losses.append(torch.nn.functional.cross_entropy(logits, chosen, reduction="sum"))
        nums_right.append((logits.argmax(-1) == chosen).sum())
    return sum(torch.stack(losses).tolist()), sum(torch.stack(nums_right).tolist()), len(targets)
