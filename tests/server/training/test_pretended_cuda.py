"""Training over a pretended card: no mixed devices, the CPU's bytes, and few waits and kernels a micro-batch."""

from collections.abc import Mapping
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path

import pytest
import torch

from server.model.chat import PromptEncoder
from server.model.weights import BaseModel
from server.training.checkpoint import Checkpoints
from server.training.encoding import RowEncoder
from server.training.init import initial_weights
from server.training.job_data import JobData
from server.training.outcome import Outcome
from server.training.report import DataFacts
from server.training.rows import CompletionRow
from server.training.run import Run
from server.training.spec import Init, JobSpec, LoraSpec, Method, TrainingSpec
from server.training.trainables import TrainableModel, TrainableRows, trainable_rows
from server.training.trainer import Trainer
from tests.pretended.card import Card
from tests.pretended.cuda import on_card, pretended_cuda
from tests.server.training.rows_kit import make_examples

SPEC = JobSpec(
    "codes",
    lora=LoraSpec(rank=8, alpha=16.0),
    training=TrainingSpec(epochs=2, learning_rate=1e-2, batch_size=4, max_length=48, checkpoint_steps=2),
)
DROPOUT = LoraSpec(rank=8, dropout=0.2)
KINDS: Mapping[str, JobSpec] = {
    "lora": SPEC,
    "dropout": replace(SPEC, lora=DROPOUT),
    "pissa": replace(SPEC, lora=LoraSpec(rank=8, init="pissa")),
    "full": replace(SPEC, method="full", training=replace(SPEC.training, learning_rate=1e-3)),
}


class Left(Exception):
    """Stands for whatever ends an attempt."""


class Listener:
    """Lets a run go on for so many micro-batches."""

    def __init__(self, left: int | None = None) -> None:
        self.left = left

    def between(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Left

    def progress(self, progress: Mapping[str, object], metrics: Mapping[str, object]) -> None: ...

    def metrics(self, message: str, data: Mapping[str, object]) -> None: ...

    def checkpointed(self, step: int) -> None: ...


@pytest.fixture(scope="module")
def data(tiny_base: BaseModel) -> JobData:
    rows = [CompletionRow(str(s.value), f" {s.phrase}") for s in list(HTTPStatus)[:10]]
    eos = tiny_base.config.eos_token_ids
    encoder = RowEncoder(PromptEncoder(tiny_base.tokenizer), eos[0], eos)
    examples = encoder.encode_all(rows, 48).examples
    facts = DataFacts("d", len(rows), examples.num_tokens, examples.num_targets, 0, "d", len(rows))
    return JobData(examples, examples, encoder.references(rows), facts, tiny_base.digest)


def run(base: BaseModel, data: JobData, spec: JobSpec, directory: Path, left: int | None = None) -> Outcome:
    return Run(spec, data, base, Checkpoints(directory, 1 if left is None else 2), Listener(left)).run()


def tensors(outcome: Outcome) -> list[torch.Tensor]:
    """Of the adapter, or of all weights; on the CPU."""
    if outcome.weights is not None:
        return [tensor for _, module in sorted(outcome.weights.modules.items()) for tensor in (module.a, module.b)]
    assert outcome.tuned_base is not None
    return [tensor.detach().to("cpu", copy=True) for _, tensor in outcome.tuned_base.weights.tensors()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_ends_in_the_cpus_bytes(kind: str, tiny_base: BaseModel, data: JobData, tmp_path: Path) -> None:
    """Evaluations with completions by the engine included; so few tokens are laid out alike on both."""
    spec = KINDS[kind]
    expected = run(tiny_base, data, spec, tmp_path / "cpu")
    with pretended_cuda():
        found = run(on_card(tiny_base), data, spec, tmp_path / "card")
        found_tensors = tensors(found)
    assert all(map(torch.equal, found_tensors, tensors(expected)))
    for ours, theirs in ((found.base, expected.base), (found.tuned, expected.tuned)):
        assert ours is not None
        assert theirs is not None
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert (ours.accuracy, ours.exact_match) == (theirs.accuracy, theirs.exact_match)


@pytest.mark.parametrize("kind", ["dropout", "full"])
def test_it_goes_on_from_a_checkpoint(kind: str, tiny_base: BaseModel, data: JobData, tmp_path: Path) -> None:
    spec = replace(KINDS[kind], training=replace(KINDS[kind].training, epochs=6))
    with pretended_cuda():
        base = on_card(tiny_base)
        whole = tensors(run(base, data, spec, tmp_path / "whole"))
        with pytest.raises(Left):
            run(base, data, spec, tmp_path / "parts", left=25)
        assert Checkpoints(tmp_path / "parts", 3).newest() is not None
        parts = tensors(run(base, data, spec, tmp_path / "parts"))
    assert all(map(torch.equal, whole, parts))


def test_going_on_elsewhere_is_flagged(
    tiny_base: BaseModel, data: JobData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From the CPU to a card, and from there to another kind of card."""
    spec = replace(SPEC, training=replace(SPEC.training, epochs=12))
    with pytest.raises(Left):
        run(tiny_base, data, spec, tmp_path, left=25)
    with pretended_cuda(Card(name="NVIDIA L4")), pytest.raises(Left):
        run(on_card(tiny_base), data, spec, tmp_path, left=6)
    with pretended_cuda(Card(name="NVIDIA H100")):
        outcome = run(on_card(tiny_base), data, spec, tmp_path)
    assert outcome.counters.computed_by == ["torch", "torch on NVIDIA L4", "torch on NVIDIA H100"]
    assert "goes on with torch on NVIDIA H100 what torch on NVIDIA L4 began" in caplog.text


def trainable_of(base: BaseModel, method: Method, init: Init, dropout: float) -> TrainableRows | TrainableModel:
    if method == "full":
        return TrainableModel(base, max_length=512)
    start, taken_off = initial_weights(LoraSpec(init=init), base, 0)
    return trainable_rows(base, start, taken_off, max_length=512, dropout=dropout)


@pytest.mark.parametrize(
    ("method", "init", "dropout", "num_kernels"),
    [
        ("lora", "gaussian", 0.0, 800),
        ("lora", "gaussian", 0.1, 846),
        ("lora", "pissa", 0.0, 906),
        ("full", "gaussian", 0.0, 716),
    ],
)
def test_what_a_step_of_a_micro_batch_costs(
    tiny_base: BaseModel, method: Method, init: Init, dropout: float, num_kernels: int
) -> None:
    """Eight rows of 500 tokens: one micro-batch, which waits for its loss, and one norm of gradients."""
    with pretended_cuda() as card:
        trainable = trainable_of(on_card(tiny_base), method, init, dropout)
        trainer = Trainer(trainable, make_examples([500] * 8), TrainingSpec(batch_size=8, max_length=512))
        trainer.run_step()
        card.main.clear()
        trainer.run_step()
    assert card.main.num_waits == 2, card.main.waits
    assert card.main.num_kernels <= num_kernels, card.main.kernels
    groups = 4 * tiny_base.config.num_layers
    masks = {torch.bool: groups} if dropout else {}
    assert dict(card.main.uploads) == {torch.int64: 4, **masks}, "tokens, texts, places and targets; masks"
