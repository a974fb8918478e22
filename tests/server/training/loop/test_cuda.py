"""Training on a GPU: it learns as on the CPU, ends in the same bytes when it was stopped, and seldom waits."""

from pathlib import Path

import pytest
import torch

from server.model.base.weights import BaseModel, load_base
from server.model.device import choose_device, is_out_of_memory, limit_memory
from server.training.packed import PackedAttention
from server.training.report import Environment, peak_memory_bytes
from server.training.spec import LoraSpec, TrainingSpec
from server.training.trainables import trainable_rows
from server.training.trained_rows import initial_weights
from server.training.trainer import Trainer
from server.training.varlen import attention_for, varlen_of_torch
from tests.kits.gpu import NEEDS_GPU, waits
from tests.server.training.data.rows_kit import make_examples
from tests.server.training.loop.codes_kit import KINDS, Left, longer, run, tensors

pytestmark = NEEDS_GPU


@pytest.fixture(scope="module")
def tiny(tiny_base: BaseModel) -> BaseModel:
    """The tiny base in fp32, on the GPU."""
    device, dtype = choose_device("cuda", "fp32")
    return load_base(tiny_base.directory, dtype, device)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_gpu_is_like_one_on_the_cpu(
    kind: str, tiny: BaseModel, tiny_base: BaseModel, tmp_path: Path
) -> None:
    expected = run(tiny_base, KINDS[kind], tmp_path / "cpu")
    found = run(tiny, KINDS[kind], tmp_path / "gpu")
    for (step, ours), (_, theirs) in zip(found.counters.train_curve, expected.counters.train_curve, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3), step
    assert found.base.held_out is not None
    assert expected.base.held_out is not None
    assert found.base.held_out.loss == pytest.approx(expected.base.held_out.loss, rel=1e-4)
    assert found.counters.computed_by == [f"torch on {torch.cuda.get_device_name()}"]


@pytest.mark.parametrize("kind", ["dropout", "pissa", "full"])
def test_a_resumed_run_ends_in_the_same_bytes(kind: str, tiny: BaseModel, tmp_path: Path) -> None:
    spec = longer(KINDS[kind], 6)
    whole = tensors(run(tiny, spec, tmp_path / "whole"))
    with pytest.raises(Left):
        run(tiny, spec, tmp_path / "parts", left=25)
    parts = tensors(run(tiny, spec, tmp_path / "parts"))
    assert all(map(torch.equal, whole, parts))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_synchronizes_as_rarely_as_on_the_fake_card(tiny: BaseModel, dropout: float) -> None:
    start, taken_off = initial_weights(LoraSpec(), tiny, 0)
    trainable = trainable_rows(tiny, start, taken_off, max_length=512, dropout=dropout)
    trainer = Trainer(trainable, make_examples([500] * 8), TrainingSpec(batch_size=8, max_length=512))
    trainer.run_step()
    found = waits(trainer.run_step)
    assert 1 <= len(found) <= 3, found


def test_the_memory_share_is_respected(tiny: BaseModel) -> None:
    """Running out of memory is recognized among other errors."""
    device = torch.device("cuda", torch.cuda.current_device())
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.empty_cache()
    limit_memory(device, torch.cuda.memory_reserved(device) / total + 0.01)
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.empty(int(0.02 * total), dtype=torch.uint8, device=device)
    finally:
        limit_memory(device, 1.0)
    assert is_out_of_memory(caught.value)


def test_the_card_names_the_gpu(tiny: BaseModel) -> None:
    environment = Environment.of(tiny)
    assert environment.gpu is not None
    assert torch.cuda.get_device_name() in environment.gpu
    assert environment.versions["cuda"] == torch.version.cuda
    assert peak_memory_bytes(tiny.device) >= tiny.weights.num_bytes


@pytest.mark.real
@pytest.mark.skipif(varlen_of_torch() is None, reason="needs torch 2.12")
def test_flash_attention_is_right_on_this_gpu(base_dir: Path) -> None:
    """And gives the same bytes each time; else training would use `PackedAttention`."""
    device, dtype = choose_device("cuda", "auto")
    base = load_base(base_dir, dtype, device)
    assert attention_for(base.config, torch.bfloat16, device) is not PackedAttention
