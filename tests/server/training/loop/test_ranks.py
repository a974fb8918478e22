"""The default rate moves the model about as far at every rank."""

from dataclasses import replace

import pytest
import torch

from server.model.base.weights import BaseModel
from server.model.smollm import NoAdapters
from server.training.packed import PackedAttention
from server.training.spec import LoraSpec, TrainingSpec
from server.training.trainables import TrainableRows
from server.training.trained_rows import initial_weights
from server.training.trainer import Trainer
from tests.server.training.data.rows_kit import make_examples, rows_of

RANKS = (1, 16, 256)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_steps_are_as_long_at_every_rank(num_steps: int, tiny_base: BaseModel) -> None:
    """Distances of logits from the base's, summed over three seeds. With σ = 1/r they differ 84-fold or more."""
    examples = make_examples()
    spec = TrainingSpec(max_steps=num_steps, batch_size=len(examples), schedule="constant", warmup_ratio=0.0)
    moved = {rank: sum(_moved(tiny_base, rank, replace(spec, seed=seed)) for seed in range(3)) for rank in RANKS}
    assert max(moved.values()) < 6 * min(moved.values()), moved


def _moved(base: BaseModel, rank: int, spec: TrainingSpec) -> float:
    start, _ = initial_weights(LoraSpec(rank), base, spec.seed)
    trainable = TrainableRows(base, rows_of(start, base), max_length=64, dropout=0.0)
    trainer = Trainer(trainable, make_examples(), spec)
    while trainer.step < trainer.total_steps:
        trainer.run_step()
    attention, token_ids = PackedAttention([40], base.device), torch.arange(3, 43)
    with torch.no_grad():
        base_logits, logits = (
            trainable.model.logits(trainable.model.forward(token_ids, attention.positions, attention, adapters))
            for adapters in (NoAdapters(), trainable.rows)
        )
    return float((logits - base_logits).square().mean().sqrt())
