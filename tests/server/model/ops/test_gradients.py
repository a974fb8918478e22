"""Backward passes of training compared with autograd through the formulas, and bitwise equal forward passes."""

from collections.abc import Callable

import pytest
import torch

from server.model.ops import norms

TOKENS, WIDTH, EPS = 7, 24, 1e-3
Operation = Callable[..., torch.Tensor]


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return norms.rms_norm(x, weight, EPS)


def plain_swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x[:, : WIDTH // 2], x[:, WIDTH // 2 :]
    return gate / (1 + (-gate).exp()) * up


def plain_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), -1) * sin


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Operation, Operation, list[torch.Tensor]]]:
    """Return by name: ours, the formula, and the inputs, of which all except the tables may need a gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    table = norms.rotary_table(TOKENS, 8, 100.0).to(dtype).unsqueeze(2)
    return {
        "norm": (norm, plain_norm, [draw(TOKENS, WIDTH), draw(WIDTH)]),
        "swiglu": (norms.swiglu, plain_swiglu, [draw(TOKENS, WIDTH)]),
        "rotary": (norms.rotary, plain_rotary, [draw(TOKENS, 3, 8), *table]),
    }


NAMES = sorted(inputs())


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    ours, formula, given = inputs()[name]
    if name != "rotary":
        given = [x.requires_grad_() for x in given]
    given[0].requires_grad_()
    wanted = [x for x in given if x.requires_grad]
    found = ours(*given)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in given]
    expected = formula(*exact)
    d_out = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    d_found = torch.autograd.grad(found, wanted, d_out)
    d_expected = torch.autograd.grad(expected, [x for x in exact if x.requires_grad], d_out.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    for one, other in zip(d_found, d_expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_computes_the_same_as_serving(name: str, dtype: torch.dtype) -> None:
    """Bitwise; and in 16 bits the gradients are as close to the exact ones as 16 bits allow."""
    ours, formula, given = inputs(dtype)[name]
    served = ours(*given)
    exact = [x.double() for x in given]
    for x in (given[0], exact[0]):
        x.requires_grad_()
    trained = ours(*given)
    assert torch.equal(trained, served)
    (found,) = torch.autograd.grad(trained.sum(), given[:1])
    (expected,) = torch.autograd.grad(formula(*exact).sum(), exact[:1])
    tolerance = 1e-5 if dtype is torch.float32 else 4e-2
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    assert found.dtype is dtype


def test_only_the_input_is_kept() -> None:
    """A norm keeps as much for its backward pass as its input's size, whatever it computes in between."""
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x, weight = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True), torch.ones(WIDTH).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        norms.swiglu(norm(x, weight))
    assert sum(tensor.nbytes for tensor in kept) == 2 * x.nbytes + weight.nbytes
