"""Ten optimizer steps beside PEFT and torch's AdamW: the same A and B, the same batches, fp32, no dropout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adapters.lora import LoraWeights
from server.model.base.weights import BaseModel
from server.model.text.chat import PromptEncoder
from server.training.encoding import Example, RowEncoder
from server.training.rows import CompletionRow
from server.training.spec import TrainingSpec
from server.training.trainables import TrainableRows
from server.training.trainer import BETAS, EPSILON, Trainer
from tests.server.training.data.rows_kit import (
    distance,
    flat,
    gradients_of,
    make_examples,
    peft_model,
    randomize,
    reference_loss,
    rows_of,
    weights_of,
)

NUM_STEPS = 10
SPEC = TrainingSpec(
    max_steps=NUM_STEPS, learning_rate=1e-3, batch_size=4, max_length=64, warmup_ratio=0.0, weight_decay=0.01
)
OPTIONS: Mapping[str, Mapping[str, object]] = {
    "all": {"r": 8, "lora_alpha": 16},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "three modules": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]},
}


class Watched(TrainableRows):
    """An adapter in training that notes the rows and the gradients of each step."""

    def __init__(self, base: BaseModel, start: LoraWeights, imposed: Sequence[torch.Tensor] = ()) -> None:
        """`imposed`: what is taken for the gradients of each step, in the place of what is found."""
        super().__init__(base, rows_of(start, base), max_length=SPEC.max_length, dropout=0.0)
        self.batches: list[list[int]] = []
        self._imposed = imposed
        self._step = 0

    def begin_micro_batch(self, seed: int, step: int, rows: Sequence[int], lengths: Sequence[int]) -> None:
        super().begin_micro_batch(seed, step, rows, lengths)
        self._step = step
        if step == len(self.batches):
            self.batches.append([])
        self.batches[step].extend(rows)

    def collect_gradients(self) -> None:
        super().collect_gradients()
        if self._imposed:
            self.gradients.copy_(self._imposed[self._step])


@dataclass(frozen=True, eq=False)
class Steps:
    """What ten steps did. Gradients, after clipping, are in the order of `TrainedRows.masters`."""

    losses: list[float]
    gradients: list[torch.Tensor]
    weights: LoraWeights


def our_steps(trainable: Watched, examples: Sequence[Example], spec: TrainingSpec = SPEC) -> Steps:
    trainer = Trainer(trainable, examples, spec)
    losses, gradients = [], []
    for _ in range(NUM_STEPS):
        losses.append(trainer.run_step().loss)
        gradients.append(trainable.gradients.clone())
    return Steps(losses, gradients, trainable.rows.weights())


def peft_steps(
    tuned: PeftModel, base: BaseModel, examples: Sequence[Example], batches: Sequence[Sequence[int]]
) -> Steps:
    """PEFT's layers, torch's optimizer, clipping and schedule, over the same rows."""
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=SPEC.learning_rate, betas=BETAS, eps=EPSILON, weight_decay=SPEC.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=NUM_STEPS)
    losses, gradients = [], []
    for rows in batches:
        optimizer.zero_grad()
        loss = reference_loss(tuned, [examples[row] for row in rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, SPEC.max_grad_norm)
        losses.append(loss.item())
        gradients.append(flat(gradients_of(tuned), base))
        optimizer.step()
        schedule.step()
    return Steps(losses, gradients, weights_of(tuned))


def check_ten_steps(
    tuned: PeftModel, base: BaseModel, examples: Sequence[Example], spec: TrainingSpec = SPEC
) -> Steps:
    """PEFT's ten steps, beside which ours are as they should be."""
    trainable = Watched(base, weights_of(tuned))
    ours = our_steps(trainable, examples, spec)
    assert len(trainable.batches) == NUM_STEPS
    assert {len(rows) for rows in trainable.batches} == {SPEC.batch_size}
    theirs = peft_steps(tuned, base, examples, trainable.batches)

    assert (ours.gradients[0] - theirs.gradients[0]).abs().max() <= 1e-5
    assert theirs.gradients[0].abs().max() > 1e-3
    assert theirs.losses[-1] < theirs.losses[0] - 0.01, "so much was learnt that a difference could show"
    for our_loss, their_loss in zip(ours.losses, theirs.losses, strict=True):
        assert our_loss == pytest.approx(their_loss, abs=1e-4)
    assert distance(ours.weights, theirs.weights) <= 1e-2

    return theirs


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "row by row"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ten_steps_are_pefts(
    tiny_base: BaseModel, tiny_base_dir: Path, options: Mapping[str, object], packing: bool
) -> None:
    examples = make_examples([9, 17, 5, 30, 12, 26, 8, 21, 14, 33, 6, 19])
    check_ten_steps(peft_model(tiny_base_dir, **options), tiny_base, examples, replace(SPEC, packing=packing))


def test_ten_steps_from_an_adapter_are_pefts(tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    """As a job has it that starts from one: B isn't 0."""
    tuned = randomize(peft_model(tiny_base_dir, **OPTIONS["three modules"]), std=0.05)
    check_ten_steps(tuned, tiny_base, make_examples([9, 17, 5, 30, 12, 26, 8, 21, 14, 33, 6, 19]))


def test_the_optimizer_is_torchs(tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    """Given PEFT's gradients in each of ten steps, the weights are those of torch's AdamW."""
    examples, options = make_examples([9, 17, 5, 30, 12, 26, 8, 21]), OPTIONS["all"]
    tuned = peft_model(tiny_base_dir, **options)
    start = weights_of(tuned)
    theirs = check_ten_steps(tuned, tiny_base, examples)
    unclipped = replace(SPEC, max_grad_norm=1e9)  # they are clipped already
    ours = our_steps(Watched(tiny_base, start, imposed=theirs.gradients), examples, unclipped)
    expected = flat(theirs.weights, tiny_base)
    assert (expected - flat(start, tiny_base)).abs().max() > 1e-3
    assert (flat(ours.weights, tiny_base) - expected).abs().max() <= 1e-6


def texts(num: int = 12) -> list[tuple[str, str]]:
    """(prompt, completion) of short rows."""
    return [(f"HTTP {status.value}:", f" {status.phrase}") for status in list(HTTPStatus)[:num]]


def http_examples(base: BaseModel, num: int = 12) -> list[Example]:
    eos = base.config.eos_token_ids
    encoder = RowEncoder(PromptEncoder(base.tokenizer), eos[0], eos)
    return [encoder.encode(CompletionRow(*text), 64) for text in texts(num)]


@pytest.mark.real
@pytest.mark.thorough  # the first step's gradients are compared below, ten steps on a tiny base above
def test_ten_steps_are_pefts_on_the_real_base(real_base: BaseModel, hf_base_dir: Path) -> None:
    tuned = peft_model(hf_base_dir, **OPTIONS["all"])
    check_ten_steps(tuned, real_base, http_examples(real_base))


@pytest.mark.real
def test_first_gradients_are_pefts_on_the_real_base(real_base: BaseModel, hf_base_dir: Path) -> None:
    """From A and B that are both at work: B = 0 leaves A without a gradient."""
    tuned = randomize(peft_model(hf_base_dir, **OPTIONS["all"]), std=0.02)
    examples = http_examples(real_base, 6)
    loss = reference_loss(tuned, examples)
    loss.backward()
    expected = flat(gradients_of(tuned), real_base)
    trainable = Watched(real_base, weights_of(tuned))
    trainer = Trainer(trainable, examples, replace(SPEC, batch_size=len(examples), max_grad_norm=1e9))
    assert trainer.run_step().loss == pytest.approx(loss.item(), abs=1e-5)
    assert (trainable.gradients - expected).abs().max() <= 1e-5
    assert expected.abs().max() > 1e-2
