"""The chunked cross-entropy compared with torch's over whole logits: value and gradients, also at chunk
borders."""

import pytest
import torch
from torch.nn import functional as F

from server.training.passes import CHUNK, cross_entropy_sum

VOCAB, HIDDEN = 83, 24


def inputs(
    num_tokens: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator) * scale
    head = torch.randn(VOCAB, HIDDEN, generator=generator)
    targets = torch.randint(VOCAB, (num_tokens,), generator=generator)
    return hidden.to(dtype), head.to(dtype), targets


@pytest.mark.parametrize("num_tokens", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 7])
@pytest.mark.parametrize("head_is_trained", [False, True], ids=["frozen head", "trained head"])
def test_value_and_gradients(num_tokens: int, head_is_trained: bool) -> None:
    hidden, head, targets = inputs(num_tokens)
    hidden.requires_grad_()
    head.requires_grad_(head_is_trained)
    trained = [hidden, head] if head_is_trained else [hidden]
    found = cross_entropy_sum(hidden, head, targets)
    expected = F.cross_entropy(F.linear(hidden, head), targets, reduction="sum")
    assert found.shape == ()
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6)
    # The mean's gradient, as in training: the factor must reach both gradients.
    ours = torch.autograd.grad(found / num_tokens, trained)
    theirs = torch.autograd.grad(expected / num_tokens, trained)
    for d_found, d_expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(d_found, d_expected, atol=1e-6, rtol=1e-5)


def test_a_tied_embedding_gets_both_its_gradients() -> None:
    _, table, targets = inputs(CHUNK + 5)
    token_ids = targets.flip(0)

    def gradient(loss: bool) -> torch.Tensor:
        weight = table.clone().requires_grad_()
        hidden = F.embedding(token_ids, weight).tanh()
        total = (
            cross_entropy_sum(hidden, weight, targets)
            if loss
            else F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
        )
        return torch.autograd.grad(total, weight)[0]

    torch.testing.assert_close(gradient(True), gradient(False), atol=1e-4, rtol=1e-5)


def test_far_from_one() -> None:
    """Logits in the hundreds neither overflow nor lose the loss of an unlikely token."""
    hidden, head, targets = inputs(CHUNK + 1, scale=100)
    exact = F.cross_entropy(hidden.double() @ head.double().t(), targets, reduction="sum")
    found = cross_entropy_sum(hidden, head, targets)
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)


def test_16_bit() -> None:
    hidden, head, targets = inputs(CHUNK + 3, torch.bfloat16)
    hidden.requires_grad_()
    head.requires_grad_()
    loss = cross_entropy_sum(hidden, head, targets)
    loss.backward()
    wide = [x.detach().float().requires_grad_() for x in (hidden, head)]
    exact = F.cross_entropy(F.linear(*wide), targets, reduction="sum")
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=5e-3)
    for found, expected in zip((hidden, head), wide, strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        assert found.grad.dtype is torch.bfloat16
        error = (found.grad.float() - expected.grad).norm() / expected.grad.norm()
        assert error < 2e-2


def test_no_tokens() -> None:
    hidden, head, targets = inputs(0)
    hidden.requires_grad_()
    loss = cross_entropy_sum(hidden, head, targets)
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, HIDDEN)
