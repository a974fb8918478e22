"""The packed product against the plain one."""

import pytest
import torch

from server.model.ops.linear import Linear, can_pack
from tests.native_kit import needs_packed_products


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
    exact = x.double() @ weight.double().t()
    assert (y.double() - exact).abs().max() <= 2**-7 * exact.abs().max()  # one rounding to bf16


@pytest.mark.usefixtures("packs")
def test_gradients_go_through_the_plain_weight() -> None:
    weight, x = torch.randn(8, 4).bfloat16(), torch.randn(2, 4).bfloat16().requires_grad_()
    Linear(weight, pack=True)(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.sum(0).expand(2, 4), atol=0.1)


@pytest.mark.usefixtures("packs")
def test_packing_leaves_the_weight_as_it_is() -> None:
    weight = torch.randn(64, 32).bfloat16()
    before = weight.clone()
    with torch.inference_mode():
        Linear(weight, pack=True)(torch.randn(5, 32).bfloat16())
    assert torch.equal(weight, before)
