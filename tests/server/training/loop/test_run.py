"""A whole run on the tiny base: it learns, goes on from checkpoints to the same bytes, and keeps the best."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path

import pytest
import torch

from adapters.lora import LoraWeights
from server.jobs.exact_match import exact_match
from server.model.base.weights import BaseModel, digest_of
from server.model.text.chat import PromptEncoder
from server.training.checkpoint import Checkpoints
from server.training.encoding import RowEncoder
from server.training.job_data import DataFacts, JobData
from server.training.rows import CompletionRow
from server.training.run import Outcome, Run
from server.training.spec import JobSpec, LoraSpec, Method, TrainingSpec
from server.training.trainer import TrainingDiverged
from tests.kits.oracles.hugging_face import load_reference, merged
from tests.server.jobs.attempt_kit import job_data
from tests.server.training.data.rows_kit import measured

SPEC = JobSpec(
    "codes",
    lora=LoraSpec(rank=8, alpha=16.0),
    training=TrainingSpec(epochs=10, learning_rate=1e-2, batch_size=4, max_length=48, checkpoint_steps=3),
)


class Disturbed(Exception):
    """Stands for whatever ends an attempt."""


class Listener:
    """Notes what a run says, and may end it before a micro-batch."""

    def __init__(self, end_before: int | None = None) -> None:
        self.steps: list[int] = []
        self.checkpoints: list[int] = []
        self._left = end_before

    def yield_or_leave(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise Disturbed

    def transferring(self, num_bytes: int) -> AbstractContextManager[None]:
        return nullcontext()

    def computing(self, num_tokens: int) -> AbstractContextManager[None]:
        return nullcontext()

    def progress(self, progress: Mapping[str, object], metrics: Mapping[str, object]) -> None:
        assert progress["total_steps"]

    def metrics(self, message: str, data: Mapping[str, object]) -> None:
        step = data["step"]
        assert isinstance(step, int)
        self.steps.append(step)

    def checkpointed(self, step: int) -> None:
        self.checkpoints.append(step)


@pytest.fixture(scope="module")
def data(tiny_base: BaseModel) -> JobData:
    rows = [CompletionRow(str(s.value), f" {s.phrase}") for s in list(HTTPStatus)[:12]]
    eos = tiny_base.config.eos_token_ids
    encoder = RowEncoder(PromptEncoder(tiny_base.tokenizer), eos[0], eos)
    examples = encoder.encode_all(rows, 48).examples
    facts = DataFacts("d", len(rows), examples.num_tokens, examples.num_targets, 0, "d", len(rows))
    return JobData(examples, examples, encoder.references(rows), facts, tiny_base.digest)


def run(
    base: BaseModel, data: JobData, directory: Path, spec: JobSpec = SPEC, token: int = 1, end: int | None = None
) -> tuple[Outcome, Listener]:
    listener = Listener(end)
    return Run(spec, data, base, Checkpoints(directory, token), listener, exact_match).run(), listener


def tensors(weights: LoraWeights | None) -> list[torch.Tensor]:
    assert weights is not None
    return [
        tensor for key in sorted(weights.modules) for tensor in (weights.modules[key].a, weights.modules[key].b)
    ]


def test_a_run_learns_and_leaves_the_base_unchanged(tiny_base: BaseModel, data: JobData, tmp_path: Path) -> None:
    before = digest_of(tiny_base.config, tiny_base.weights)
    outcome, listener = run(tiny_base, data, tmp_path)
    assert outcome.base is not None
    assert outcome.tuned is not None
    assert outcome.tuned.loss < 0.5 * outcome.base.loss
    assert outcome.tuned.accuracy > outcome.base.accuracy
    assert listener.steps == list(range(1, 31))
    assert digest_of(tiny_base.config, tiny_base.weights) == before


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_run_interrupted_anywhere_ends_in_the_same_bytes(
    tiny_base: BaseModel, data: JobData, tmp_path: Path, method: Method, dropout: float
) -> None:
    spec = replace(SPEC, method=method, lora=replace(SPEC.lora, dropout=dropout))
    whole, _ = run(tiny_base, data, tmp_path / "whole", spec)
    token = 0
    for end in (3, 16, 5, 4):
        token += 1
        with pytest.raises(Disturbed):
            run(tiny_base, data, tmp_path / "parts", spec, token, end)
    last, listener = run(tiny_base, data, tmp_path / "parts", spec, token + 1)
    assert listener.steps[0] > 1, "it went on from a checkpoint"
    if method == "full":
        assert whole.tuned_base is not None
        assert last.tuned_base is not None
        pairs = zip(whole.tuned_base.weights.tensors(), last.tuned_base.weights.tensors(), strict=True)
        assert all(torch.equal(first, second) for (_, first), (_, second) in pairs)
    else:
        assert all(map(torch.equal, tensors(whole.weights), tensors(last.weights)))
    assert whole.tuned == last.tuned


def test_the_best_evaluations_weights_are_kept(tiny_base: BaseModel, data: JobData, tmp_path: Path) -> None:
    training = replace(SPEC.training, eval_steps=2, learning_rate=1e-2, early_stopping_patience=2)
    outcome, _ = run(tiny_base, data, tmp_path, replace(SPEC, training=training))
    curve = dict(outcome.counters.eval_curve)
    assert outcome.tuned is not None
    assert outcome.step == min(curve, key=lambda step: curve[step])
    assert outcome.tuned.loss == pytest.approx(min(curve.values()), rel=1e-5)
    assert outcome.num_steps == max(curve), "what was taken, whichever step's weights are kept"


def test_a_run_stops_when_patience_ends(tiny_base: BaseModel, tmp_path: Path) -> None:
    """At the same losses as a run without patience has, and with the weights of one that ends at the best step."""
    data = job_data(tiny_base, num_rows=12, num_held_out=4)  # others than those that it learns by heart
    training = replace(SPEC.training, eval_steps=2, learning_rate=2e-3, schedule="constant", warmup_ratio=0.0)
    patient, _ = run(tiny_base, data, tmp_path / "patient", replace(SPEC, training=training))
    curve, patience = patient.counters.eval_curve, 2
    best, stop = curve[0], 0
    for number, point in enumerate(curve):
        best = min(best, point, key=lambda of: of[1])
        if number - curve.index(best) == patience:
            stop = number
            break
    assert 0 < curve.index(best) < stop < len(curve) - 1, "it gained at first, and there was more to come"

    hasty = replace(training, early_stopping_patience=patience)
    outcome, listener = run(tiny_base, data, tmp_path / "hasty", replace(SPEC, training=hasty))
    assert outcome.counters.eval_curve == curve[: stop + 1]
    assert (outcome.step, outcome.num_steps) == (best[0], curve[stop][0])
    assert listener.steps == list(range(1, curve[stop][0] + 1))
    short = replace(training, max_steps=best[0], eval_steps=None)
    expected, _ = run(tiny_base, data, tmp_path / "short", replace(SPEC, training=short))
    assert all(map(torch.equal, tensors(outcome.weights), tensors(expected.weights)))


@pytest.mark.parametrize("eval_steps", [None, 4])
def test_the_last_evaluation_is_transformers(
    tiny_base: BaseModel, tiny_base_dir: Path, data: JobData, tmp_path: Path, eval_steps: int | None
) -> None:
    """Of the base and of the adapter that is left, each row by itself; also where the last step isn't due."""
    training = replace(SPEC.training, max_steps=6, eval_steps=eval_steps)
    outcome, _ = run(tiny_base, data, tmp_path, replace(SPEC, training=training))
    assert [step for step, _ in outcome.counters.eval_curve] == ([4, 6] if eval_steps else [])
    assert outcome.weights is not None
    assert data.validation is not None
    reference = load_reference(tiny_base_dir)
    before = measured(reference, data.validation)
    with merged(reference, [(outcome.weights, 1.0)]):
        after = measured(reference, data.validation)
    for found, (loss, accuracy, num_tokens) in ((outcome.base, before), (outcome.tuned, after)):
        assert found is not None
        assert found.loss == pytest.approx(loss, abs=1e-4)
        assert found.accuracy == pytest.approx(accuracy, abs=1e-6)
        assert (found.num_tokens, found.num_rows) == (num_tokens, len(data.validation))
    assert after[0] < before[0] - 1
    if eval_steps:
        assert dict(outcome.counters.eval_curve)[outcome.step] == pytest.approx(after[0], abs=1e-4)


def test_a_loss_that_is_not_finite_fails_with_a_hint(tiny_base: BaseModel, data: JobData, tmp_path: Path) -> None:
    training = replace(SPEC.training, learning_rate=1e20, warmup_ratio=0.0)
    with pytest.raises(TrainingDiverged, match="learning_rate"):
        run(tiny_base, data, tmp_path, replace(SPEC, training=training))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_that_are_not_finite_fail_the_run(
    tiny_base: BaseModel, data: JobData, tmp_path: Path, method: Method
) -> None:
    """The last step's loss is that of the weights before it: where no rows are held out, no other one follows."""
    training = replace(SPEC.training, max_steps=1, learning_rate=1e300, warmup_ratio=0.0)
    alone = replace(data, validation=None, references=())
    with pytest.raises(TrainingDiverged, match=r"weights are not finite after step 1: .*learning_rate"):
        run(tiny_base, alone, tmp_path, replace(SPEC, method=method, training=training))
