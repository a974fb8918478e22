"""The packed product compared with the plain one."""

import pytest
import torch

from server.model.ops.linear import Linear, can_pack
from tests.kits.native import needs_packed_products
from tests.kits.rounding import sum_bound


@pytest.fixture
def packs() -> None:
    needs_packed_products()


def test_fp32_is_never_packed() -> None:
    assert not can_pack(torch.zeros(2, 2))
    assert Linear(torch.zeros(2, 2), pack=True)._packed is None


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 32, 33, 200])
def test_any_number_of_tokens(tokens: int, pack: bool) -> None:
    if pack:
        needs_packed_products()
    weight, x = torch.randn(48, 40).bfloat16(), torch.randn(tokens, 40).bfloat16()
    with torch.inference_mode():
        y = Linear(weight, pack=pack)(x)
    assert y.dtype is torch.bfloat16
    terms = x.double()[:, None] * weight.double()  # (tokens, 48, 40)
    bound = sum_bound(terms)
    assert ((y.double() - terms.sum(-1)).abs() <= bound).all()
    assert ((y.double() - 1.03 * terms.sum(-1)).abs() > bound).any()
    assert ((y.double() - terms[..., 1:].sum(-1)).abs() > bound).any()


@pytest.mark.usefixtures("packs")
def test_gradients_go_through_the_plain_weight() -> None:
    weight, x = torch.randn(8, 4).bfloat16(), torch.randn(2, 4).bfloat16().requires_grad_()
    grad = torch.randn(2, 8).bfloat16()
    Linear(weight, pack=True)(x).backward(grad)
    assert x.grad is not None
    terms = grad.double()[:, None] * weight.double().t()  # (2, 4, 8)
    bound = sum_bound(terms)
    assert ((x.grad.double() - terms.sum(-1)).abs() <= bound).all()
    assert ((x.grad.double() - 1.03 * terms.sum(-1)).abs() > bound).any()


@pytest.mark.usefixtures("packs")
def test_packing_leaves_the_weight_as_it_is() -> None:
    weight = torch.randn(64, 32).bfloat16()
    before = weight.clone()
    with torch.inference_mode():
        Linear(weight, pack=True)(torch.randn(5, 32).bfloat16())
    assert torch.equal(weight, before)
