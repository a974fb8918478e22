"""Paged attention compared with a loop over sequences and heads in double precision."""

import random
from collections.abc import Iterable

import pytest
import torch

from server.model.ops.attention import attend_decode, attend_sequence, causal_bias, plan_decode
from tests.kits.rounding import attention_bound, is_exact

BLOCK = 4


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return attention for one query of each head, q (heads, dim), over k, v (positions, kv_heads, dim)."""
    heads, dim = q.shape
    group = heads // k.shape[1]
    out = torch.empty(heads, dim, dtype=torch.float64)
    for head in range(heads):
        keys, values = k[:, head // group].double(), v[:, head // group].double()
        out[head] = (keys @ q[head].double() / dim**0.5).softmax(0) @ values
    return out


def decode_case(
    heads: int, kv_heads: int, dim: int, lengths: list[int], seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, caches and a padded block table in a random order; block 0 is zero, all other blocks are
    full."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = [-(-length // BLOCK) for length in lengths]
    order = random.Random(seed).sample(range(1, sum(num_blocks) + 1), sum(num_blocks))
    table = torch.zeros(len(lengths), max(num_blocks), dtype=torch.int64)
    for i, count in enumerate(num_blocks):
        table[i, :count] = torch.tensor([order.pop() for _ in range(count)])
    shape = (sum(num_blocks) + 1, BLOCK, kv_heads, dim)
    k, v = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    k[0], v[0] = 0, 0
    return torch.randn(len(lengths), heads, dim, generator=generator), k, v, table


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    lengths: list[int],
    *,
    gather_values: bool = False,
) -> torch.Tensor:
    plan = plan_decode(
        table,
        torch.tensor(lengths),
        block_size=BLOCK,
        num_heads=q.shape[1],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[2],
        dtype=q.dtype,
        gather_values=gather_values,
    )
    return attend_decode(plan, q, k, v)


def own(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    return cache[table].flatten(0, 1)[:length]


@pytest.mark.parametrize("gather_values", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 8), (3, 1, 10), (4, 4, 6), (1, 1, 2)])
def test_decode(heads: int, kv_heads: int, dim: int, gather_values: bool) -> None:
    lengths = [1, 4, 5, 17, 8]
    q, k, v, table = decode_case(heads, kv_heads, dim, lengths)
    found = decode(q, k, v, table, lengths, gather_values=gather_values)
    for i, length in enumerate(lengths):
        expected = naive(q[i], own(k, table[i], length), own(v, table[i], length))
        assert torch.allclose(found[i].double(), expected, atol=1e-5)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_both_ways_to_sum_values_agree(dtype: torch.dtype, atol: float) -> None:
    """In bf16 they round the same sums of products: they differ by at most one step of numbers around 1."""
    lengths = [1, 4, 37, 64]
    q, k, v, table = decode_case(6, 2, 8, lengths)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    as_they_lie = decode(q, k, v, table, lengths, gather_values=False).float()
    gathered = decode(q, k, v, table, lengths, gather_values=True).float()
    assert (gathered - as_they_lie).abs().max() <= atol * as_they_lie.abs().max()


@pytest.mark.parametrize("gather_values", [False, True])
@pytest.mark.parametrize("stale", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_leftovers_in_blocks_have_no_effect(stale: float, gather_values: bool) -> None:
    """Positions of a block beyond a sequence's length contain what its last owner wrote, including NaN."""
    lengths = [1, 6, 9]
    q, k, v, table = decode_case(4, 2, 8, lengths)
    clean = decode(q, k, v, table, lengths, gather_values=gather_values)
    for i, length in enumerate(lengths):
        count = -(-length // BLOCK)
        last, used = table[i, count - 1], length - (count - 1) * BLOCK
        k[last, used:], v[last, used:] = stale, stale
    assert torch.equal(decode(q, k, v, table, lengths, gather_values=gather_values), clean)


@pytest.mark.parametrize(("start", "new"), [(0, 1), (0, 5), (7, 1), (7, 5)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 8), (3, 1, 10), (4, 4, 6)])
def test_sequence(heads: int, kv_heads: int, dim: int, start: int, new: int) -> None:
    generator = torch.Generator().manual_seed(start + new)
    q = torch.randn(new, heads, dim, generator=generator)
    k, v = (torch.randn(start + new, kv_heads, dim, generator=generator) for _ in range(2))
    found = attend_sequence(q, k, v, causal_bias(start, new, q.dtype, q.device))
    for i in range(new):
        expected = naive(q[i], k[: start + i + 1], v[: start + i + 1])
        assert torch.allclose(found[i].double(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize("what", ["keys", "values"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_key_or_value_that_overflows_has_no_effect_on_tokens_before_it(
    bad: float, what: str, start: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(start)
    new, place = 9, 4  # the fifth new token's
    q = torch.randn(new, 6, 8, generator=generator).to(dtype)
    k, v = (torch.randn(start + new, 2, 8, generator=generator).to(dtype) for _ in range(2))
    bias = causal_bias(start, new, dtype, q.device)
    clean = attend_sequence(q, k.clone(), v.clone(), bias)
    (k if what == "keys" else v)[start + place, 1, 3] = bad
    found = attend_sequence(q, k, v, bias)
    assert torch.equal(found[:place], clean[:place])
    assert found[place:].isnan().all()


def test_causal_bias() -> None:
    inf = float("-inf")
    bias = causal_bias(1, 3, torch.float32, torch.device("cpu"))
    assert bias is not None
    assert bias.tolist() == [[0, 0, inf, inf], [0, 0, 0, inf], [0, 0, 0, 0]]
    assert causal_bias(9, 1, torch.float32, torch.device("cpu")) is None


SHAPES_IN_BF16 = [(6, 2, 16), (9, 3, 64), (6, 2, 8), (4, 4, 32)]


Query = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def check_in_bf16(queries: Iterable[Query]) -> None:
    """Check that the result for queries q over k, v, (found, q, k, v), is as close to the exact one as rounding
    allows.

    And not as close to wrong results: with scores too large by 3 % (by a tenth if their own factor is rounded), or
    without the last position.
    """
    is_near, is_off_scale, is_off_by_one = [], [], []
    for found, q, k, v in queries:
        heads, dim = q.shape
        group = heads // k.shape[1]
        bound = torch.stack([attention_bound(row, k[:, h // group], v[:, h // group]) for h, row in enumerate(q)])
        wrong_scale = 1.03 if is_exact(dim**-0.5) else 1.1
        is_near.append((found.double() - naive(q, k, v)).abs() <= bound)
        is_off_scale.append((found.double() - naive(wrong_scale * q.double(), k, v)).abs() > bound)
        is_off_by_one.append((found.double() - naive(q, k[:-1], v[:-1])).abs() > bound)
    assert torch.stack(is_near).all()
    assert torch.stack(is_off_scale).any()
    assert torch.stack(is_off_by_one).any()


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES_IN_BF16)
def test_decode_in_bf16(heads: int, kv_heads: int, dim: int) -> None:
    lengths = [3, 13, 40]
    q, k, v, table = (
        t.bfloat16() if t.is_floating_point() else t for t in decode_case(heads, kv_heads, dim, lengths)
    )
    q *= 2  # so that scores differ
    found = decode(q, k, v, table, lengths)
    assert found.dtype is torch.bfloat16
    check_in_bf16(
        (found[i], q[i], own(k, table[i], length), own(v, table[i], length)) for i, length in enumerate(lengths)
    )


@pytest.mark.parametrize(("start", "new"), [(12, 1), (0, 9), (30, 7)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES_IN_BF16)
def test_sequence_in_bf16(heads: int, kv_heads: int, dim: int, start: int, new: int) -> None:
    generator = torch.Generator().manual_seed(start + new)
    q = (2 * torch.randn(new, heads, dim, generator=generator)).bfloat16()
    k, v = (torch.randn(start + new, kv_heads, dim, generator=generator).bfloat16() for _ in range(2))
    found = attend_sequence(q, k, v, causal_bias(start, new, q.dtype, q.device))
    assert found.dtype is torch.bfloat16
    check_in_bf16((found[i], q[i], k[: start + i + 1], v[: start + i + 1]) for i in range(new))
