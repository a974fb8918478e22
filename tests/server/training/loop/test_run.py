"""A whole run on the tiny base: it learns, goes on from checkpoints to the same bytes, and keeps the best."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path

import pytest
import torch

from adapters.lora import LoraWeights
from server.jobs.scoring import complete, decision_scores
from server.model.base.weights import BaseModel, digest_of
from server.model.text.chat import PromptEncoder
from server.training.checkpoint import Checkpoints
from server.training.encoding import RowEncoder
from server.training.evaluate import Scores
from server.training.job_data import DataFacts, JobData
from server.training.rows import CompletionRow
from server.training.run import Outcome, Run
from server.training.spec import JobSpec, LoraSpec, Method, Metric, TrainingSpec
from server.training.trainer import TrainingDiverged
from tests.kits.oracles.hugging_face import load_reference, merged
from tests.server.jobs.attempt_kit import job_data, one_answer, with_learnable_end
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

    def flush(self) -> None: ...

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
    return Run(
        spec, data, base, Checkpoints(directory, token), listener, complete, decision_scores
    ).run(), listener


def tensors(weights: LoraWeights | None) -> list[torch.Tensor]:
    assert weights is not None
    return [
        tensor for key in sorted(weights.modules) for tensor in (weights.modules[key].a, weights.modules[key].b)
    ]


def test_a_run_learns_and_leaves_the_base_unchanged(tiny_base: BaseModel, data: JobData, tmp_path: Path) -> None:
    before = digest_of(tiny_base.config, tiny_base.weights)
    outcome, listener = run(tiny_base, data, tmp_path)
    base, tuned = outcome.base.held_out, outcome.tuned.held_out
    assert base is not None
    assert tuned is not None
    assert tuned.loss < 0.5 * base.loss
    assert tuned.accuracy > base.accuracy
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


HASTY = replace(SPEC.training, eval_steps=2, schedule="constant", warmup_ratio=0.0, learning_rate=2e-2)
"""Learns its rows by heart, so that the loss on others soon rises."""


@pytest.fixture(scope="module")
def split(tiny_base: BaseModel) -> JobData:
    """Twelve rows, and enough others held out to choose a step by."""
    return job_data(tiny_base, num_rows=12, num_held_out=24)


def test_clearly_better_weights_of_an_earlier_step_are_kept(
    tiny_base: BaseModel, split: JobData, tmp_path: Path
) -> None:
    """They are those of a run that ends there, and patience ends the run at the same losses."""
    whole, _ = run(tiny_base, split, tmp_path / "whole", replace(SPEC, training=HASTY))
    curve = whole.counters.eval_curve
    best = whole.step
    assert best in dict(curve)
    assert best < whole.num_steps == 30
    assert whole.tuned.held_out is not None
    assert whole.tuned.held_out.loss == pytest.approx(dict(curve)[best], rel=1e-5)
    assert whole.tuned.held_out.loss < curve[-1][1]
    short = replace(HASTY, max_steps=best, eval_steps=None)
    expected, _ = run(tiny_base, split, tmp_path / "short", replace(SPEC, training=short))
    assert all(map(torch.equal, tensors(whole.weights), tensors(expected.weights)))

    patient = replace(HASTY, early_stopping_patience=2)
    stopped, listener = run(tiny_base, split, tmp_path / "stopped", replace(SPEC, training=patient))
    assert stopped.num_steps < whole.num_steps
    assert stopped.counters.eval_curve == curve[: len(stopped.counters.eval_curve)]
    assert listener.steps == list(range(1, stopped.num_steps + 1))


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
def test_few_held_out_rows_stop_nothing_and_choose_no_step(
    tiny_base: BaseModel, tmp_path: Path, metric: Metric
) -> None:
    """Whatever their loss: the last step's weights are kept, which know the rows by heart."""
    data = job_data(tiny_base, num_rows=12, num_held_out=4)
    training = replace(HASTY, early_stopping_patience=1)
    spec = replace(SPEC, training=training, publish_metric=metric)
    outcome, _ = run(tiny_base, data, tmp_path, spec)
    losses = [loss for _, loss in outcome.counters.eval_curve]
    assert min(losses) < losses[-1] - 0.1, "the loss alone would have chosen an earlier step"
    assert outcome.step == outcome.num_steps == 30


def test_recall_is_measured_of_the_trained_rows(tiny_base: BaseModel, tmp_path: Path) -> None:
    base = with_learnable_end(tiny_base)
    data = one_answer(base, num_rows=12, num_held_out=4)
    spec = replace(SPEC, training=replace(SPEC.training, epochs=8))
    outcome, _ = run(base, data, tmp_path, spec)
    assert outcome.base.recalled == (False,) * 12
    assert outcome.tuned.recalled == (True,) * 12
    assert outcome.tuned.held_out is not None
    assert outcome.tuned.held_out.matches == (False,) * 4
    alone = replace(data, validation=None, references=())
    without, _ = run(base, alone, tmp_path / "alone", spec)
    assert without.tuned == Scores(None, outcome.tuned.recalled), "without held-out rows, too"


def test_the_best_step_may_be_chosen_by_exact_match(tiny_base: BaseModel, tmp_path: Path) -> None:
    """On rows of which it knows more and more, the last step's weights are kept, and evaluations say so."""
    training = replace(SPEC.training, epochs=8, eval_steps=4)
    spec = replace(SPEC, training=training, publish_metric="exact_match")
    base = with_learnable_end(tiny_base)
    outcome, _ = run(base, one_answer(base), tmp_path, spec)
    assert outcome.counters.best is not None
    assert outcome.counters.best.exact_match == 1
    assert outcome.step == outcome.num_steps == 48


def test_a_checkpoint_of_an_older_release(tiny_base: BaseModel, split: JobData, tmp_path: Path) -> None:
    """It has the base's loss without its rows, and a best step that was chosen by loss alone."""
    spec = replace(SPEC, training=HASTY)
    whole, _ = run(tiny_base, split, tmp_path / "whole", spec)
    with pytest.raises(Disturbed):
        run(tiny_base, split, tmp_path / "parts", spec, 1, 30)
    state = max((tmp_path / "parts").glob("*/state.json"))
    document = json.loads(state.read_text())
    held_out = document["base"]["held_out"]
    document["base"] = {name: held_out[name] for name in ("loss", "accuracy", "num_rows", "num_tokens")}
    document |= {"best_loss": document.pop("best")["loss"]}
    del document["keeps_best"]
    state.write_text(json.dumps(document))
    outcome, listener = run(tiny_base, split, tmp_path / "parts", spec, 2)
    assert listener.steps[0] > 1
    assert outcome.base == whole.base


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
    for found, (loss, accuracy, num_tokens) in ((outcome.base.held_out, before), (outcome.tuned.held_out, after)):
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
