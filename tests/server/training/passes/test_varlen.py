"""FlashAttention for packed texts: torch's function is replaced, since it runs on GPUs alone."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from server.model.base.weights import BaseModel
from server.training import varlen
from server.training.packed import PackedAttention
from server.training.passes import (
    MAX_GPU_TOKENS,
    MIN_GPU_TOKENS,
    MicroBatch,
    TorchPass,
    activation_bytes,
    max_tokens,
)
from server.training.trained_rows import TrainedRows
from server.training.varlen import VarlenAttention, attention_for, varlen_of_torch
from tests.kits.engines import random_adapter
from tests.kits.fake_gpu.card import Card
from tests.kits.fake_gpu.cuda import fake_cuda
from tests.server.training.data.rows_kit import make_examples, model_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16
Fault = Callable[[torch.Tensor], torch.Tensor]


class Flash:
    """torch's function as its documentation describes it, text by text, with a fault if one is given."""

    def __init__(self, fault: Fault = lambda scores: scores, *, is_causal: bool = True) -> None:
        self._fault = fault
        self._is_causal = is_causal
        self.were_deterministic: list[bool] = []

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> torch.Tensor:
        assert window_size == (-1, 0)
        assert enable_gqa
        ends, outs = cu_seq_q.tolist(), []
        assert max_q == max_k == max(stop - start for start, stop in pairwise(ends))
        if torch.is_grad_enabled():
            query.register_hook(self._note_gradient)
        for start, stop in pairwise(ends):
            q, k, v = (x[start:stop].float() for x in (query, key, value))
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
            if self._is_causal:
                scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), float("-inf"))
            outs.append(torch.einsum("hij,jhd->ihd", self._fault(scores).softmax(-1), v))
        return torch.cat(outs).to(query.dtype)

    def _note_gradient(self, _: torch.Tensor) -> None:
        self.were_deterministic.append(torch.are_deterministic_algorithms_enabled())


@pytest.mark.parametrize("lengths", [[1], [9], [3, 4], [5, 1, 8, 2], [130, 1, 300]], ids=str)
def test_attention_and_gradients_are_those_of_packed_attention(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(sum(lengths), num, 8, generator=generator) for num in (6, 2, 2, 6))
    flash = Flash()
    ours, theirs = VarlenAttention(lengths, CPU, flash), PackedAttention(lengths, CPU)
    assert torch.equal(ours.positions, theirs.positions)
    results = []
    for attention in (ours, theirs):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention.attend(0, *inputs)
        results.append([out, *torch.autograd.grad(out, inputs, d_out)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert flash.were_deterministic == [True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_switch_that_only_warns_is_restored() -> None:
    """Gradients need deterministic operations even if the process only warns of others."""
    flash = Flash()
    inputs = [torch.randn(3, 2, 8).requires_grad_() for _ in range(3)]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        VarlenAttention([3], CPU, flash).attend(0, *inputs).sum().backward()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert flash.were_deterministic == [True]


def another_each_time(scores: torch.Tensor) -> torch.Tensor:
    return scores * (1 + 1e-3 * torch.rand(()))


def fail(scores: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("No available kernel. Aborting execution.\nmore")


@pytest.mark.parametrize(
    ("flash", "is_used", "says"),
    [
        (Flash(), True, ""),
        (Flash(is_causal=False), False, "its errors are"),
        (Flash(another_each_time), False, "or differ each time"),
        (Flash(fail), False, "RuntimeError: No available kernel. Aborting execution."),
    ],
    ids=["right", "not causal", "another each time", "no kernel"],
)
def test_a_card_whose_results_are_wrong_has_packed_attention(
    flash: Flash,
    is_used: bool,
    says: str,
    tiny_base: BaseModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(varlen, "varlen_of_torch", lambda: flash)
    with fake_cuda():
        found = attention_for(tiny_base.config, BF16, CUDA)
        attention = found([3, 4], CUDA)
    assert isinstance(attention, VarlenAttention if is_used else PackedAttention)
    assert says in caplog.text
    assert bool(caplog.text) is not is_used


def test_other_devices_dtypes_and_versions_have_packed_attention(
    tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_base.config
    assert attention_for(config, BF16, CPU) is PackedAttention
    assert attention_for(config, torch.float32, CUDA) is PackedAttention
    monkeypatch.setattr(varlen, "varlen_of_torch", lambda: None)
    assert attention_for(config, BF16, CUDA) is PackedAttention


@pytest.mark.skipif(varlen_of_torch() is None, reason="needs torch 2.12")
def test_torch_has_the_arguments() -> None:
    found = varlen_of_torch()
    assert found is not None
    assert {"window_size", "enable_gqa"} <= set(inspect.signature(found).parameters)


def test_a_micro_batch_on_a_gpu_takes_half_of_the_memory_at_most(tiny_base: BaseModel) -> None:
    wide = replace(
        tiny_base.config, hidden_size=576, intermediate_size=1536, num_heads=9, num_layers=30, head_dim=64
    )
    assert max_tokens(wide, BF16, CPU) == 512
    found = []
    for gib, fraction in ((8, 0.5), (24, 0.5), (80, 0.5), (80, 1.0)):
        with fake_cuda(Card(total_bytes=gib << 30, memory_fraction=fraction)):
            found.append(max_tokens(wide, BF16, CUDA))
    assert found[0] == MIN_GPU_TOKENS
    assert MIN_GPU_TOKENS < found[1] < MAX_GPU_TOKENS
    assert found[2:] == [MAX_GPU_TOKENS] * 2


def test_activations_take_what_is_counted(tiny_base: BaseModel) -> None:
    """Of the tensors that autograd keeps, without the weights: not more, and at least half."""
    kept: dict[int, int] = {}
    ours = {id(tensor) for _, tensor in tiny_base.weights.tensors()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.shape and tensor.shape[0] == num_tokens and id(tensor) not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model, examples = model_of(tiny_base), make_examples([100, 28])
    num_tokens = 128
    rows = TrainedRows(
        random_adapter(tiny_base.config.shape, 0, rank=1), tiny_base.config.shape, torch.float32, CPU
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        TorchPass(model, rows, rows.collect_gradients).forward(MicroBatch.of(examples))
    counted = activation_bytes(tiny_base.config, torch.float32) * num_tokens
    assert counted / 2 <= sum(kept.values()) <= counted
