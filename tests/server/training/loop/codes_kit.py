"""Short trainings on the tiny base: jobs of each kind over a few rows, and their results."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path

import torch

from server.jobs.scoring import complete, decision_scores
from server.model.base.weights import BaseModel
from server.model.text.chat import PromptEncoder
from server.training.checkpoint import Checkpoints
from server.training.encoding import RowEncoder
from server.training.job_data import DataFacts, JobData
from server.training.rows import CompletionRow
from server.training.run import Outcome, Run
from server.training.spec import JobSpec, LoraSpec, TrainingSpec

SPEC = JobSpec(
    "codes",
    lora=LoraSpec(rank=8, alpha=16.0),
    training=TrainingSpec(epochs=2, learning_rate=1e-2, batch_size=4, max_length=48, checkpoint_steps=2),
)
KINDS: Mapping[str, JobSpec] = {
    "lora": SPEC,
    "dropout": replace(SPEC, lora=LoraSpec(rank=8, dropout=0.2)),
    "pissa": replace(SPEC, lora=LoraSpec(rank=8, init="pissa")),
    "full": replace(SPEC, method="full", training=replace(SPEC.training, learning_rate=1e-3)),
}


def longer(spec: JobSpec, epochs: int) -> JobSpec:
    return replace(spec, training=replace(spec.training, epochs=epochs))


class Left(Exception):
    """Stands for any reason that ends an attempt."""


class Listener:
    """Lets a run continue for a number of micro-batches and steps."""

    def __init__(self, left: int | None = None) -> None:
        self.left = left

    def yield_or_leave(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Left

    def transferring(self, num_bytes: int) -> AbstractContextManager[None]:
        return nullcontext()

    def computing(self, num_tokens: int) -> AbstractContextManager[None]:
        return nullcontext()

    def progress(self, progress: Mapping[str, object], metrics: Mapping[str, object]) -> None: ...

    def metrics(self, message: str, data: Mapping[str, object]) -> None: ...

    def flush(self) -> None: ...

    def checkpointed(self, step: int) -> None: ...


def data_of(base: BaseModel) -> JobData:
    """Return ten codes and their phrases, also as held-out rows."""
    rows = [CompletionRow(str(s.value), f" {s.phrase}") for s in list(HTTPStatus)[:10]]
    eos = base.config.eos_token_ids
    encoder = RowEncoder(PromptEncoder(base.tokenizer), eos[0], eos)
    examples = encoder.encode_all(rows, 48).examples
    facts = DataFacts("d", len(rows), examples.num_tokens, examples.num_targets, 0, "d", len(rows))
    return JobData(examples, examples, encoder.references(rows), facts, base.digest)


def run(base: BaseModel, spec: JobSpec, directory: Path, left: int | None = None) -> Outcome:
    """Run an attempt, resuming what an earlier one left in the directory. Raise Left if it is ended early."""
    checkpoints = Checkpoints(directory, 1 if left is None else 2)
    return Run(spec, data_of(base), base, checkpoints, Listener(left), complete, decision_scores).run()


def tensors(outcome: Outcome) -> list[torch.Tensor]:
    """Return the tensors of the adapter, or of all weights, on the CPU."""
    if outcome.weights is not None:
        return [tensor for _, module in sorted(outcome.weights.modules.items()) for tensor in (module.a, module.b)]
    assert outcome.tuned_base is not None
    return [tensor.detach().to("cpu", copy=True) for _, tensor in outcome.tuned_base.weights.tensors()]
