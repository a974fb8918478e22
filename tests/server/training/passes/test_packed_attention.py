"""Rows packed into one flat batch compared with the same rows one at a time: attention, loss and gradients."""

import random
from pathlib import Path

import pytest
import torch

from server.model.base.weights import BaseModel
from server.model.smollm import NoAdapters
from server.training.packed import TILE, PackedAttention
from tests.kits.engines import random_adapter
from tests.kits.oracles.hugging_face import load_reference
from tests.server.training.data.rows_kit import (
    LENGTHS,
    make_examples,
    model_of,
    packed_loss,
    reference_loss,
    rows_of,
)

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM = 6, 2, 8


def one_at_a_time(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Compute softmax(q kᵀ / √d) v of each text separately."""
    outs = []
    for q_text, k_text, v_text in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        k_text, v_text = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k_text, v_text))
        scores = torch.einsum("ihd,jhd->hij", q_text, k_text) / DIM**0.5
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), float("-inf"))
        outs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v_text))
    return torch.cat(outs)


@pytest.mark.parametrize(
    "lengths",
    [
        *([1], [9], [4, 4, 4], [3, 4], [1, 1, 1], [2, 2, 7], [7, 2, 2], [5, 1, 8, 2], [8, 7, 9, 16, 1, 17]),
        *([*LENGTHS], [TILE] * 3, [2 * TILE], [2 * TILE + 1], [1, 90, 200, 60, 3, 2, 80], [TILE, 3 * TILE, 1]),
    ],
    ids=str,
)
def test_attention_and_its_gradients(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, d_out = (torch.randn(shape, generator=generator) for shape in shapes)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found = PackedAttention(lengths, CPU).attend(0, q, k, v)
    expected = one_at_a_time(q, k, v, lengths)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(out, inputs, d_out) for out in (found, expected))
    for d_found, d_expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(d_found, d_expected, atol=1e-5, rtol=1e-5)


def test_positions_start_at_0_in_each_text() -> None:
    assert PackedAttention([3, 1, 2], CPU).positions.tolist() == [0, 1, 2, 0, 0, 1]


def test_a_text_without_tokens_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        PackedAttention([3, 0], CPU)


def test_loss_and_gradients_of_a_model(tiny_base: BaseModel) -> None:
    """Packed in two orders, unpacked, and by transformers: the same loss, and the same gradients of A and B."""
    model, examples = model_of(tiny_base), make_examples()
    weights = random_adapter(tiny_base.config.shape, 0, rank=4)
    packed = rows_of(weights, tiny_base)
    loss = packed_loss(model, packed, examples)
    loss.backward()
    packed.collect_gradients()

    unpacked = rows_of(weights, tiny_base)
    num_targets = sum(sum(example.is_target) for example in examples)
    alone = 0.0
    for example in examples:
        if num := sum(example.is_target):
            part = packed_loss(model, unpacked, [example]) * num / num_targets
            part.backward()
            unpacked.collect_gradients()
            alone += part.item()
    assert loss.item() == pytest.approx(alone, abs=1e-5)
    torch.testing.assert_close(packed.gradients, unpacked.gradients, atol=1e-5, rtol=1e-5)

    shuffled = random.Random(0).sample(examples, len(examples))
    other = rows_of(weights, tiny_base)
    again = packed_loss(model, other, shuffled)
    again.backward()
    other.collect_gradients()
    assert again.item() == pytest.approx(alone, abs=1e-5)
    torch.testing.assert_close(other.gradients, unpacked.gradients, atol=1e-5, rtol=1e-5)
    assert packed.gradients.abs().max() > 1e-2, "the comparison must have something to compare"


@torch.no_grad()
def test_the_loss_is_transformers(tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    examples = make_examples()
    theirs = reference_loss(load_reference(tiny_base_dir), examples)
    ours = packed_loss(model_of(tiny_base), NoAdapters(), examples)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
