"""Full fine-tuning compared with transformers and torch's AdamW: the same batches, fp32, every loss and every
weight.

transformers' Trainer, on which TRL's trainers are based, decides which weights decay.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers import Trainer as TheirTrainer

from server.model.base.export import export_hugging_face
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.training.encoding import Example
from server.training.spec import TrainingSpec
from server.training.trainables import TrainableModel
from server.training.trainer import Trainer
from tests.kits.oracles.hugging_face import load_reference
from tests.kits.tiny import save_tiny_base
from tests.server.training.data.rows_kit import make_examples, reference_loss

NUM_STEPS, NUM_WARMUP, RATE, DECAY, MAX_NORM = 6, 2, 3e-4, 0.5, 1.0
SPEC = TrainingSpec(
    max_steps=NUM_STEPS,
    learning_rate=RATE,
    batch_size=4,
    max_length=64,
    schedule="linear",
    warmup_ratio=NUM_WARMUP / NUM_STEPS,
    weight_decay=DECAY,
    max_grad_norm=MAX_NORM,
)


class Watched(TrainableModel):
    """A whole model in training that records the rows of each step."""

    def __init__(self, base: BaseModel) -> None:
        super().__init__(base, max_length=SPEC.max_length)
        self.batches: list[list[int]] = [[] for _ in range(NUM_STEPS)]

    def begin_micro_batch(self, seed: int, step: int, rows: Sequence[int], lengths: Sequence[int]) -> None:
        self.batches[step].extend(rows)


def reference_steps(
    model: PreTrainedModel, examples: Sequence[Example], batches: Sequence[Sequence[int]]
) -> tuple[list[float], list[float]]:
    """Return each step's loss and gradient norm; the model is trained in place."""
    parameters = list(model.requires_grad_().parameters())  # a tied head occurs once
    decayed = TheirTrainer.get_decay_parameter_names(cast("Any", None), model)  # which asks the model alone
    groups = [
        {"params": [parameter], "weight_decay": DECAY if name in decayed else 0.0}
        for name, parameter in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-8)
    losses, norms = [], []
    for step, rows in enumerate(batches):
        warm, left = (step + 1) / NUM_WARMUP, (NUM_STEPS - step) / (NUM_STEPS - NUM_WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(warm, left, 1.0)
        optimizer.zero_grad()
        loss = reference_loss(model, [examples[row] for row in rows])
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)))
        losses.append(loss.item())
        optimizer.step()
    return losses, norms


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a base with tied embeddings, or one with a head of its own."""
    return save_tiny_base(tmp_path / "base", options={"tie_word_embeddings": request.param})


def test_six_steps_are_torchs(directory: Path, tmp_path: Path) -> None:
    base = load_base(resolve_base(str(directory), tmp_path))
    examples = make_examples([9, 17, 5, 30, 12, 26, 8, 21, 14, 33, 6, 19])
    trainable = Watched(base)
    trainer = Trainer(trainable, examples, SPEC)
    steps = [trainer.run_step() for _ in range(NUM_STEPS)]
    assert [len(set(rows)) for rows in trainable.batches] == [SPEC.batch_size] * NUM_STEPS

    reference = load_reference(directory)
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    losses, norms = reference_steps(reference, examples, trainable.batches)
    assert [step.loss for step in steps] == pytest.approx(losses, abs=1e-5)
    assert [step.gradient_norm for step in steps] == pytest.approx(norms, rel=1e-4)
    assert min(norms) > MAX_NORM, "they were clipped"
    assert losses[-1] < losses[0] - 0.1, "so much was learnt that a difference could show"

    export_hugging_face(trainable.tuned(base), tmp_path / "tuned")
    ours, theirs = load_file(tmp_path / "tuned" / "model.safetensors"), reference.state_dict()
    assert len(ours) == len(list(reference.parameters()))
    for name, tensor in ours.items():
        moved = (theirs[name] - before[name]).norm()
        assert (tensor - theirs[name]).norm() <= 5e-3 * moved, name
