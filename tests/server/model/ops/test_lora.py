"""The low-rank products compared with loops over their definitions."""

import random

import pytest
import torch

from server.model.ops.linear import Pairs, add_dense, expand_sampled, shrink_block, shrink_sampled
from tests.kits.rounding import sum_of_rounded_bound


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_pairs(tokens: int, rows: int, seed: int = 0) -> tuple[Pairs, list[tuple[int, int]]]:
    """Return pairs, unordered within a token; some tokens have none."""
    rng = random.Random(seed)
    chosen = [rng.sample(range(rows), rng.choice((0, 0, 1, 3, rows))) for _ in range(tokens)]
    offsets = torch.tensor([0, *(len(part) for part in chosen)]).cumsum(0)
    pairs = [(token, row) for token, part in enumerate(chosen) for row in part]
    return Pairs(offsets, torch.tensor([row for _, row in pairs]), rows), pairs


def test_add_dense_is_the_definition() -> None:
    y, x, a, b, gates = (
        normal(3, 5),
        normal(3, 7, seed=1),
        normal(4, 7, seed=2),
        normal(4, 5, seed=3),
        normal(3, 4),
    )
    expected = y.clone()
    for token in range(3):
        for row in range(4):
            expected[token] += gates[token, row] * (x[token] @ a[row]) * b[row]
    assert torch.allclose(add_dense(y, x, a, b, gates), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_shrink_sampled_computes_the_pairs_in_their_order(dtype: torch.dtype) -> None:
    """As close to the exact sums as rounding allows, and not as close to sums too large by 3 %, or without a
    term."""
    x, a = normal(9, 16, dtype=dtype), normal(6, 16, seed=1, dtype=dtype)
    chosen, pairs = random_pairs(9, 6)
    terms = torch.stack([x[token].double() * a[row].double() for token, row in pairs])
    found = shrink_sampled(x, a, chosen)
    assert found.dtype is dtype
    bound = sum_of_rounded_bound(terms) if dtype is torch.bfloat16 else torch.tensor(1e-5)
    assert ((found.double() - terms.sum(-1)).abs() <= bound).all()
    assert ((found.double() - 1.03 * terms.sum(-1)).abs() > bound).any()
    assert ((found.double() - terms[:, 1:].sum(-1)).abs() > bound).any()


def test_shrink_sampled_reads_no_other_row() -> None:
    x, a = normal(2, 8, dtype=torch.float32), normal(4, 8, seed=1, dtype=torch.float32)
    a[0] = float("nan")
    chosen = Pairs(torch.tensor([0, 2, 3]), torch.tensor([3, 1, 2]), 4)
    expected = torch.stack([x[0] @ a[3], x[0] @ a[1], x[1] @ a[2]])
    assert torch.allclose(shrink_sampled(x, a, chosen), expected, atol=1e-5)


def test_a_tensor_of_mixed_dtypes_is_computed_in_that_of_a() -> None:
    x, a = normal(4, 8, dtype=torch.bfloat16), normal(3, 8, seed=1, dtype=torch.float32)
    chosen, pairs = random_pairs(4, 3)
    expected = torch.stack([x[token].float() @ a[row] for token, row in pairs])
    assert torch.allclose(shrink_sampled(x, a, chosen), expected, atol=1e-5)
    assert torch.allclose(shrink_block(x, a, 2.5, torch.float32), 2.5 * (x.float() @ a.t()), atol=1e-5)
    assert shrink_block(x, a, 1.0, torch.bfloat16).dtype is torch.bfloat16


def test_expand_sampled_sums_bags_of_scaled_units() -> None:
    hidden, units = normal(7), normal(5, 3, seed=1)
    index, bags = torch.tensor([4, 0, 0, 2, 1, 4, 3]), torch.tensor([0, 0, 3, 3, 7, 7])
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for bag in range(5):
        for i in range(int(bags[bag]), int(bags[bag + 1])):
            expected[bag] += hidden[i] * units[index[i]]
    found = expand_sampled(hidden.float(), units.float(), index, bags)
    assert torch.allclose(found.double(), expected, atol=1e-6)


def test_expand_sampled_accumulates_16_bit_products_in_fp32() -> None:
    """4097 ones: a 16-bit sum would stop at 256."""
    hidden, units = torch.ones(4097, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16)
    index, bags = torch.zeros(4097, dtype=torch.int64), torch.tensor([0, 4097])
    assert expand_sampled(hidden, units, index, bags).tolist() == [[4096.0, 4096.0]]  # 4097 rounds to it


def test_all_forms_are_differentiable() -> None:
    x, a, b = (normal(4, 6, dtype=torch.float32), normal(3, 6, seed=1), normal(3, 5, seed=2, dtype=torch.float32))
    a = a.float()
    gates = torch.zeros(4, 3)
    chosen, pairs = random_pairs(4, 3, seed=3)
    for token, row in pairs:
        gates[token, row] = 1.0
    leaves = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    dense = add_dense(torch.zeros(4, 5), leaves[0], leaves[1], leaves[2], gates)
    expected = torch.autograd.grad(dense.square().sum(), leaves)

    hidden = shrink_sampled(leaves[0], leaves[1], chosen)
    offsets = torch.tensor([sum(token < t for token, _ in pairs) for t in range(5)])
    sampled = expand_sampled(hidden, leaves[2], chosen.rows, offsets)
    assert torch.allclose(sampled, dense, atol=1e-5)
    found = torch.autograd.grad(sampled.square().sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
