"""Training over a fake card: no mixed devices, the CPU's bytes, and few waits and kernels a micro-batch."""

from pathlib import Path

import pytest
import torch

from server.model.base.weights import BaseModel
from server.model.smollm import NoAdapters
from server.training.checkpoint import Checkpoints
from server.training.evaluate import evaluate
from server.training.spec import Init, LoraSpec, Method, TrainingSpec
from server.training.trainables import TrainableModel, TrainableRows, trainable_rows
from server.training.trained_rows import initial_weights
from server.training.trainer import Trainer
from tests.kits.fake_gpu.card import Card
from tests.kits.fake_gpu.cuda import fake_cuda, on_card
from tests.server.training.data.rows_kit import make_examples, model_of, pass_of
from tests.server.training.loop.codes_kit import KINDS, SPEC, Left, longer, run, tensors


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_ends_in_the_cpus_bytes(kind: str, tiny_base: BaseModel, tmp_path: Path) -> None:
    """Evaluations with completions by the engine included; so few tokens are laid out alike on both."""
    spec = KINDS[kind]
    expected = run(tiny_base, spec, tmp_path / "cpu")
    with fake_cuda():
        found = run(on_card(tiny_base), spec, tmp_path / "card")
        found_tensors = tensors(found)
    assert all(map(torch.equal, found_tensors, tensors(expected)))
    pairs = [(found.base, expected.base), (found.tuned, expected.tuned)]
    for ours, theirs in ((ours.held_out, theirs.held_out) for ours, theirs in pairs):
        assert ours is not None
        assert theirs is not None
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert (ours.accuracy, ours.exact_match) == (theirs.accuracy, theirs.exact_match)


@pytest.mark.parametrize("kind", ["dropout", "full"])
def test_a_run_resumes_from_a_checkpoint(kind: str, tiny_base: BaseModel, tmp_path: Path) -> None:
    spec = longer(KINDS[kind], 6)
    with fake_cuda():
        base = on_card(tiny_base)
        whole = tensors(run(base, spec, tmp_path / "whole"))
        with pytest.raises(Left):
            run(base, spec, tmp_path / "parts", left=25)
        assert Checkpoints(tmp_path / "parts", 3).newest() is not None
        parts = tensors(run(base, spec, tmp_path / "parts"))
    assert all(map(torch.equal, whole, parts))


def test_resuming_on_another_device_is_logged(
    tiny_base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From the CPU to a card, and from there to another kind of card."""
    spec = longer(SPEC, 12)
    with pytest.raises(Left):
        run(tiny_base, spec, tmp_path, left=25)
    with fake_cuda(Card(name="NVIDIA L4")), pytest.raises(Left):
        run(on_card(tiny_base), spec, tmp_path, left=6)
    with fake_cuda(Card(name="NVIDIA H100")):
        outcome = run(on_card(tiny_base), spec, tmp_path)
    assert outcome.counters.computed_by == ["torch", "torch on NVIDIA L4", "torch on NVIDIA H100"]
    assert "continuing with torch on NVIDIA H100 after torch on NVIDIA L4" in caplog.text


def trainable_of(base: BaseModel, method: Method, init: Init, dropout: float) -> TrainableRows | TrainableModel:
    if method == "full":
        return TrainableModel(base, max_length=512)
    start, taken_off = initial_weights(LoraSpec(init=init), base, 0)
    return trainable_rows(base, start, taken_off, max_length=512, dropout=dropout)


@pytest.mark.parametrize(
    ("method", "init", "dropout", "num_kernels"),
    [
        ("lora", "gaussian", 0.0, 800),
        ("lora", "gaussian", 0.1, 878),
        ("lora", "pissa", 0.0, 906),
        ("full", "gaussian", 0.0, 716),
    ],
)
def test_the_cost_of_a_step_of_a_micro_batch(
    tiny_base: BaseModel, method: Method, init: Init, dropout: float, num_kernels: int
) -> None:
    """Eight rows of 500 tokens: one micro-batch, which waits for its loss, and one norm of gradients."""
    with fake_cuda() as card:
        trainable = trainable_of(on_card(tiny_base), method, init, dropout)
        trainer = Trainer(trainable, make_examples([500] * 8), TrainingSpec(batch_size=8, max_length=512))
        trainer.run_step()
        card.main.clear()
        trainer.run_step()
    assert card.main.num_waits == 2, card.main.waits
    assert card.main.num_kernels <= num_kernels, card.main.kernels
    keys = {torch.int32: 1} if dropout else {}
    assert dict(card.main.uploads) == {torch.int64: 4, **keys}, "tokens, texts, places and targets; dropout's keys"


def test_an_evaluation_waits_twice_a_micro_batch(tiny_base: BaseModel) -> None:
    """For its losses and for what was right, however many tokens' logits exist at one time."""
    examples = make_examples([500] * 8)
    expected = evaluate(pass_of(model_of(tiny_base, 512), NoAdapters()), examples)
    with fake_cuda() as card:
        base = on_card(tiny_base)
        passes = pass_of(model_of(base, 512), NoAdapters())
        card.main.clear()
        found = evaluate(passes, examples)
    assert expected.num_tokens > 4 * 256
    assert card.main.num_waits == 2 * 2, card.main.waits
    assert (found.accuracy, found.num_tokens) == (expected.accuracy, expected.num_tokens)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
