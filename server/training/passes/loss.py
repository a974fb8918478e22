"""The loss over the tokens that count, without ever holding all their logits.

Logits of a vocabulary of 49,152 take 200 KB a token in fp32. `cross_entropy_sum` makes them for `CHUNK` tokens at
a time and takes their gradient at once, so that what the backward pass keeps has the size of the hidden states.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from server.model.ops.autograd import apply

CHUNK = 256
"""Tokens whose logits exist at one time."""


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            log_probs = F.linear(hidden[rows], head).float().log_softmax(-1)  # (chunk, vocab)
            chosen = targets[rows, None]
            loss -= log_probs.gather(1, chosen).sum()
            d_logits = log_probs.exp_()
            d_logits.scatter_add_(1, chosen, d_logits.new_full(chosen.shape, -1.0))  # softmax - one-hot
            d_logits = d_logits.to(hidden.dtype)
            d_hidden[rows] = d_logits @ head
            if d_head is not None:
                d_head += d_logits.t() @ hidden[rows]
        ctx.save_for_backward(d_hidden, d_head)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:  # noqa: ANN401
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * d_loss.to(d_hidden.dtype), None if d_head is None else d_head * d_loss, None


def cross_entropy_sum(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy (nats, an fp32 scalar) of targets (tokens,) under softmax(hidden · headᵀ).

    hidden (tokens, hidden size), head (vocab, hidden size). Differentiable once, in hidden and head.
    """
    return apply(_CrossEntropySum, hidden, head, targets)
