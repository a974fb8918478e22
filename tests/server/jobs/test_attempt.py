"""What an attempt goes on from, and what ends it for good, with a reason: another one would end the same way."""

import itertools
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from adapters.catalog.writes import LatestMoved
from adapters.errors import Conflict, TryAgain
from adapters.expression import Term
from adapters.library import Library
from adapters.lora import LoraConfig, LoraModule, LoraWeights
from adapters.peft.files import PeftAdapter
from server.jobs import train_job
from server.jobs.jobs import FINE_TUNING, Status
from server.jobs.leases import Claim, LeaseLost
from server.model.base.weights import BaseModel
from server.storage.home import Home
from server.training.encoding import Examples
from server.training.evaluate import LossNotFinite, Scores
from server.training.files import FileStore, results_id
from server.training.job_data import JobData
from server.training.run import Run
from server.training.spec import JobSpec, LoraSpec, Method, PublishIf, TrainingSpec
from server.training.trainer import TrainingDiverged, shuffled
from tests.kits.oracles.hugging_face import load_reference, merged
from tests.server.jobs.attempt_kit import Interruption, Shop, job_data, one_answer, with_learnable_end
from tests.server.jobs.merge_kit import sample
from tests.server.training.data.rows_kit import distance, reference_loss

SPEC = JobSpec(
    "codes",
    lora=LoraSpec(rank=2),
    training=TrainingSpec(max_steps=2, learning_rate=1e-3, batch_size=4, max_length=48),
)
OVERFLOWING = replace(SPEC.training, max_steps=1, learning_rate=1e38, warmup_ratio=0.0)
"""The first step's loss is a number; what it makes of the weights isn't."""


def test_it_goes_on_from_an_adapter(shop: Shop, tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    """The first step's loss is transformers' under that adapter, whose shape is published, with its name."""
    parent = sample(tiny_base.config.shape, 1, rank=3, alpha=5.0, names=("q_proj", "down_proj"))
    assert shop.publish("up", parent).version == 1
    data = job_data(tiny_base)
    training = replace(SPEC.training, batch_size=len(data.train))
    digest = parent.weights.digest
    shop.submit(replace(SPEC, training=training, start_from="up@1", start_from_digest=digest), data)
    shop.attempt()

    reference = load_reference(tiny_base_dir)
    alone = float(reference_loss(reference, data.train))
    with merged(reference, [(parent.weights, 1.0)]):
        expected = float(reference_loss(reference, data.train))
    assert abs(expected - alone) > 0.1
    first = next(event for event in shop.jobs.events("job") if event.type == "metrics")
    assert first.data["train_loss"] == pytest.approx(expected, abs=1e-4)

    version = shop.catalog.version("codes", 1)
    assert (version.rank, version.alpha, version.parent) == (3, 5.0, "up@1")
    assert set(version.target_modules) == {"q_proj", "down_proj"}
    assert version.config["kinds"] == {"completion": len(data.train)}
    assert version.digest != digest
    tuned = shop.store.load(version.digest)
    assert distance(tuned, parent.weights) < 0.2, "two small steps away"
    report = shop.jobs.report("job")
    assert report is not None
    assert report["lineage"] == {"start_from": "up@1", "digest": digest}


@pytest.mark.parametrize("is_deleted", [False, True])
def test_the_parents_shape_is_its_own(shop: Shop, tiny_base: BaseModel, is_deleted: bool) -> None:
    """The bytes were another's first, who said the same in other words; a deleted parent's shape is the job's."""
    names = ("q_proj", "down_proj")
    parent = sample(tiny_base.config.shape, 1, rank=3, alpha=5.0, names=names)
    config = LoraConfig(
        200, 400.0, names, rank_pattern=dict.fromkeys(names, 3), alpha_pattern=dict.fromkeys(names, 5.0)
    )
    shop.publish("guess", PeftAdapter(config, parent.weights, "evil/base"))
    shop.publish("up", parent)
    lora = LoraSpec(rank=3, alpha=5.0, target_modules=names)
    spec = replace(SPEC, lora=lora, start_from="up@1", start_from_digest=parent.weights.digest)
    shop.submit(spec, job_data(tiny_base))
    if is_deleted:
        shop.catalog.delete("up")
    shop.attempt()
    version = shop.catalog.version("codes", 1)
    assert (version.rank, version.alpha) == (3, 5.0)
    made = shop.store.read(version.digest, tiny_base.config.shape)
    assert (made.config, made.base_model) == (parent.config, tiny_base.name)


@pytest.mark.parametrize("how", ["leave", "kill"])
def test_left_while_it_finds_where_to_start(shop: Shop, tiny_base: BaseModel, how: Interruption) -> None:
    """By pissa that takes minutes on a large base. There is no checkpoint yet: the next attempt begins anew."""
    spec = replace(SPEC, lora=LoraSpec(rank=2, init="pissa"))
    data = job_data(tiny_base)
    shop.submit(replace(spec, name="whole"), data, "whole")
    shop.attempt()
    shop.submit(replace(spec, name="parts"), data, "parts")
    listener = shop.attempt(end_at=5, how=how)
    assert listener.num_moments == 6
    assert shop.jobs.get("parts").status is Status.QUEUED
    assert not shop.files.checkpoints("parts").exists()
    shop.attempt()
    assert shop.result("parts") == shop.result("whole")


def test_long_writes_are_announced(shop: Shop, tiny_base: BaseModel) -> None:
    """Checkpoints, and the model, at their sizes or a little above."""
    training = replace(SPEC.training, checkpoint_steps=1)
    shop.submit(replace(SPEC, method="full", training=training), job_data(tiny_base))
    num_weights = sum(tensor.numel() for _, tensor in tiny_base.weights.tensors())
    model = sum(tensor.nbytes for _, tensor in tiny_base.weights.tensors())
    listener = shop.attempt()
    reading, first, second, last = (16 * num_weights for _ in range(4))
    assert listener.transferred == [reading, first, second, last, model]


def test_long_passes_are_announced(shop: Shop, tiny_base: BaseModel) -> None:
    """Every token that is trained on or measured, a micro-batch at a time: of the base, each evaluation, what came
    of it, and the name's latest version."""
    shop.publish("codes", sample(tiny_base.config.shape, POOR))
    data = job_data(tiny_base, num_references=0)
    training = replace(SPEC.training, batch_size=3, max_steps=2, eval_steps=1, packing=False)
    shop.submit(replace(SPEC, training=training, publish_if="improves_latest"), data)
    listener = shop.attempt()
    assert data.validation is not None
    held_out = sum(len(example.token_ids) for example in data.validation)
    order = shuffled(len(data.train), training.seed, 0)
    first, second = ([len(data.train[row].token_ids) for row in rows] for rows in (order[:3], order[3:6]))
    assert listener.computed == [held_out, *first, held_out, *second, held_out, held_out, held_out]


def broken(base: BaseModel) -> BaseModel:
    """Every hidden state of it is NaN."""
    weights = replace(base.weights, final_norm=torch.full_like(base.weights.final_norm, torch.nan))
    return replace(base, weights=weights)


def test_a_base_whose_loss_is_no_number(shop: Shop, tiny_base: BaseModel) -> None:
    shop.submit(SPEC, job_data(tiny_base))
    shop.base = broken(tiny_base)
    with pytest.raises(LossNotFinite, match=r"base's loss on the held-out rows is not a number.*SMOLORA_DTYPE"):
        shop.attempt()


@pytest.mark.parametrize("eval_steps", [None, 1])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_evaluation_whose_loss_is_no_number(
    shop: Shop, tiny_base: BaseModel, eval_steps: int | None, method: Method
) -> None:
    """The final one, or one on the way."""
    training = replace(OVERFLOWING, eval_steps=eval_steps)
    shop.submit(replace(SPEC, method=method, training=training), job_data(tiny_base))
    with pytest.raises(TrainingDiverged, match=r"held-out loss is not a number after step 1: lower training\.lea"):
        shop.attempt()
    assert [event.type for event in shop.jobs.events("job")].count("metrics") == (eval_steps is None)


def overflowing(base: BaseModel) -> PeftAdapter:
    """An adapter under which no number is finite."""
    adapter = sample(base.config.shape, 1)
    modules = {k: LoraModule(m.a, m.b * 1e38, m.scaling) for k, m in adapter.weights.modules.items()}
    return PeftAdapter(adapter.config, LoraWeights(modules), "tiny-llama")


def test_a_latest_version_whose_loss_is_no_number(shop: Shop, tiny_base: BaseModel) -> None:
    """The gate isn't passed, but the finished job doesn't fail."""
    shop.publish("codes", overflowing(tiny_base))
    shop.submit(replace(SPEC, publish_if="improves_latest"), job_data(tiny_base))
    shop.attempt()
    report: Any = shop.jobs.report("job")
    assert shop.jobs.get("job").adapter is None
    assert re.match(r"can't be decided: codes@1 wasn't measured: .* not a number", report["gate"]["reason"])


def after_measuring_latest(monkeypatch: pytest.MonkeyPatch, do: Callable[[int], object]) -> None:
    """Call `do` with 1, 2, … whenever the name's latest version was measured, before that ends the job."""
    numbers = itertools.count(1)
    measure = Run.measure

    def measure_and_do(run: Run, weights: LoraWeights, *more: Any) -> Scores:
        found = measure(run, weights, *more)
        if weights.modules:  # not the base
            do(next(numbers))
        return found

    monkeypatch.setattr(Run, "measure", measure_and_do)


def learnt(base: BaseModel, num_held_out: int | None = None) -> JobData:
    """Rows that are held out, too: enough for a verdict by loss, unless `num_held_out` says otherwise."""
    data = one_answer(base, num_held_out=num_held_out or 0)
    return data if num_held_out != 0 else replace(data, validation=None, references=())


LEARNS = replace(SPEC, lora=LoraSpec(rank=8), training=replace(SPEC.training, max_steps=80, learning_rate=1e-2))
LEARNS_NOTHING = replace(LEARNS, training=replace(SPEC.training, max_steps=1, learning_rate=1e-30))


@pytest.mark.parametrize("num_held_out", [None, 3, 0])
def test_a_worse_version_is_published_without_moving_latest(
    shop: Shop, tiny_base: BaseModel, num_held_out: int | None
) -> None:
    """By loss on held-out rows, or, if there are few or none, by what is remembered of the trained ones."""
    shop.base = with_learnable_end(tiny_base)
    data = learnt(shop.base, num_held_out)
    shop.submit(LEARNS, data, "good")
    shop.attempt()
    good = shop.catalog.version("codes", 1)
    report: Any = shop.jobs.report("good")
    assert (report["comparisons"]["latest"], report["moves_latest"]) == (None, True)
    assert report["comparisons"]["base"]["verdict"] == "better"
    assert report["recall"]["num_right"]["tuned"] > 12 > report["recall"]["num_right"]["base"]
    assert good.metrics["recall"] == report["recall"]["num_right"]["tuned"] / 24
    assert (good.verdict, good.metrics["base_recall"]) == (None, 0.0)

    shop.submit(LEARNS_NOTHING, data, "bad")
    shop.attempt()
    adapter = shop.catalog.get("codes")
    assert (adapter.latest, [version.verdict for version in adapter.versions]) == (1, [None, "worse"])
    report = shop.jobs.report("bad")
    comparison = report["comparisons"]["latest"]
    assert (comparison["version"], comparison["verdict"], report["moves_latest"]) == ("codes@1", "worse", False)
    assert comparison["metric"] == ("loss" if num_held_out is None else "exact_match")
    assert report["recall"]["num_right"]["latest"] == good.metrics["recall"] * 24
    if num_held_out != 0:
        assert report["evaluation"]["latest"]["loss"] == good.metrics["eval_loss"]
    job = shop.jobs.get("bad")
    assert job.adapter is not None
    assert job.adapter["moves_latest"] is False
    message = shop.jobs.events("bad")[-1].message
    assert message.startswith("latest stays at 1: the new version is worse than codes@1: ")

    shop.submit(replace(LEARNS_NOTHING, alias="latest"), data, "forced")
    shop.attempt()
    assert shop.catalog.get("codes").latest == 3
    shop.submit(replace(LEARNS, training=replace(LEARNS.training, seed=1)), data, "again")
    shop.attempt()
    adapter = shop.catalog.get("codes")
    assert (adapter.latest, adapter.versions[-1].verdict) == (4, "better")


def test_losses_on_other_rows_are_not_compared(shop: Shop, tiny_base: BaseModel) -> None:
    """The new rows are harder: its loss is above latest's on other rows, and it is better on its own."""
    shop.base = with_learnable_end(tiny_base)
    shop.submit(LEARNS, learnt(shop.base), "first")
    shop.attempt()
    data = job_data(shop.base, num_rows=50, num_held_out=0)
    training = replace(LEARNS.training, max_steps=40, learning_rate=3e-3)
    shop.submit(replace(LEARNS, training=training), replace(data, validation=data.train), "second")
    shop.attempt()
    first, second = shop.catalog.get("codes").versions
    assert second.metrics["eval_loss"] > first.metrics["eval_loss"]
    assert (second.verdict, shop.catalog.get("codes").latest) == ("better", 2)


@pytest.mark.parametrize("is_latest", [True, False])
def test_the_parent_is_measured(shop: Shop, tiny_base: BaseModel, is_latest: bool) -> None:
    """On the job's rows, and once if it is the latest version, too."""
    shop.base = with_learnable_end(tiny_base)
    data = learnt(shop.base)
    shop.submit(LEARNS if is_latest else replace(LEARNS, name="other"), data, "first")
    shop.attempt()
    parent = shop.catalog.version("codes" if is_latest else "other", 1)
    spec = replace(LEARNS_NOTHING, start_from=f"{parent.name}@1", start_from_digest=parent.digest)
    shop.submit(spec, data, "second")
    listener = shop.attempt()
    report: Any = shop.jobs.report("second")
    assert report["comparisons"]["parent"]["version"] == f"{parent.name}@1"
    assert report["comparisons"]["parent"]["verdict"] == "can't tell", "it has learnt nothing since"
    assert report["evaluation"]["parent"]["loss"] == parent.metrics["eval_loss"]
    assert report["recall"]["num_right"]["parent"] == parent.metrics["recall"] * 24
    assert report["moves_latest"] is True
    assert (report["comparisons"]["latest"] is not None) is is_latest
    assert data.validation is not None
    assert listener.computed.count(sum(len(example.token_ids) for example in data.validation)) == 3


@pytest.mark.parametrize(("gate", "is_published"), [("improves_latest", False), ("not_worse", True)])
def test_gates_by_verdict(shop: Shop, tiny_base: BaseModel, gate: PublishIf, is_published: bool) -> None:
    """From a version on which it doesn't improve, and than which it is no worse."""
    shop.base = with_learnable_end(tiny_base)
    data = learnt(shop.base)
    shop.submit(LEARNS, data, "first")
    shop.attempt()
    parent = shop.catalog.version("codes", 1)
    spec = replace(LEARNS_NOTHING, start_from="codes@1", start_from_digest=parent.digest, publish_if=gate)
    shop.submit(spec, data, "second")
    shop.attempt()
    report: Any = shop.jobs.report("second")
    assert (shop.jobs.get("second").adapter is not None) is report["gate"]["passes"] is is_published
    assert report["gate"]["reason"].startswith("neither clearly better nor worse than codes@1: loss ")
    assert report["moves_latest"] is (True if is_published else None)


@pytest.mark.parametrize("num_held_out", [None, 0])
def test_a_latest_version_that_cannot_be_measured_is_replaced(
    shop: Shop, tiny_base: BaseModel, num_held_out: int | None
) -> None:
    """Without a gate: its numbers overflow, so that nothing can be compared with it."""
    shop.publish("codes", overflowing(tiny_base))
    shop.submit(SPEC, learnt(tiny_base, num_held_out=num_held_out))
    shop.attempt()
    assert shop.catalog.get("codes").latest == 2
    report: Any = shop.jobs.report("job")
    assert (report["comparisons"]["latest"], report["moves_latest"]) == (None, True)
    assert report["unmeasured"]["latest"].startswith("codes@1 wasn't measured: ")
    assert shop.jobs.events("job")[-1].message == report["unmeasured"]["latest"]


@pytest.mark.parametrize("gate", ["always", "improves_latest", "not_worse"])
@pytest.mark.parametrize("fault", ["lost", "damaged", "large", "no memory", "unfitting"])
def test_an_unusable_latest_version_fails_no_finished_job(
    shop: Shop, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch, gate: PublishIf, fault: str
) -> None:
    """It is replaced, or the gate that needs it isn't passed. An event and the report say why."""
    shop.publish("codes", sample(tiny_base.config.shape, 1))
    (path,) = (shop.home / "adapters").rglob("adapter_model.safetensors")
    data = job_data(tiny_base)
    measure = Run.measure

    def measure_or_fail(run: Run, weights: LoraWeights, *more: Any) -> Scores:
        if weights.modules and fault == "no memory":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return measure(run, weights, *more)

    def refuse(library: Library, terms: object, field: str = "adapter") -> NoReturn:
        raise Conflict("codes@1 was made for another base")

    monkeypatch.setattr(Run, "measure", measure_or_fail)
    if fault == "lost":
        path.unlink()
    elif fault == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    elif fault == "large":
        monkeypatch.setattr(train_job, "MAX_MEASURED_RANK", 1)
    elif fault == "unfitting":
        monkeypatch.setattr(Library, "pin", refuse)
    shop.submit(replace(SPEC, publish_if=gate), data)
    shop.attempt()
    job = shop.jobs.get("job")
    report: Any = shop.jobs.report("job")
    assert job.status is Status.SUCCEEDED
    assert (job.adapter is not None) is report["gate"]["passes"] is (gate == "always")
    reason = report["unmeasured"]["latest"]
    assert re.match(r"codes(@1)? wasn't measured: ", reason)
    assert reason in [event.message for event in shop.jobs.events("job")]
    assert gate == "always" or report["gate"]["reason"] == f"can't be decided: {reason}"


def test_a_parent_that_cannot_be_measured(
    shop: Shop, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = shop.publish("other", sample(tiny_base.config.shape, 1))
    spec = replace(SPEC, start_from="other@1", start_from_digest=parent.digest)
    shop.submit(spec, job_data(tiny_base))
    measure = Run.measure

    def fail(run: Run, weights: LoraWeights, *more: Any) -> Scores:
        if weights.modules:
            raise MemoryError
        return measure(run, weights, *more)

    monkeypatch.setattr(Run, "measure", fail)
    shop.attempt()
    report: Any = shop.jobs.report("job")
    assert shop.jobs.get("job").adapter is not None
    assert report["unmeasured"]["parent"].startswith("other@1, its parent, wasn't measured: ")


def test_windows_of_one_text_are_one_held_out_row(shop: Shop, tiny_base: BaseModel) -> None:
    """They are too few for a verdict by loss, however many they are."""
    data = learnt(tiny_base)
    windows = Examples()
    for example in data.train:
        windows.append(example, 0)
    shop.submit(SPEC, replace(data, validation=windows))
    shop.attempt()
    report: Any = shop.jobs.report("job")
    assert report["evaluation"]["num_rows"] == 24
    assert report["comparisons"]["base"]["metric"] == "exact_match"


POOR = 7
"""The seed of a sample that is worse than what `LEARNS` makes."""


def test_a_better_version_that_is_published_before_the_job_ends(
    shop: Shop, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found better than the latest version is held to the new one as well, which is better still."""
    data = learnt(tiny_base)
    shop.submit(replace(LEARNS, name="other"), data, "other")
    shop.attempt()
    good = shop.store.read(shop.catalog.version("other", 1).digest, tiny_base.config.shape)
    shop.publish("codes", sample(tiny_base.config.shape, POOR))
    training = replace(LEARNS.training, max_steps=5)
    shop.submit(replace(LEARNS, training=training, publish_if="improves_latest"), data)
    after_measuring_latest(monkeypatch, lambda number: number == 1 and shop.publish("codes", good))
    shop.attempt()
    job = shop.jobs.get("job")
    report: Any = shop.jobs.report("job")
    assert (job.status, job.adapter) == (Status.SUCCEEDED, None)
    assert [version.version for version in shop.catalog.get("codes").versions] == [1, 2]
    evaluation, gate = report["evaluation"], report["gate"]
    assert evaluation["latest"]["loss"] < evaluation["tuned"]["loss"]
    assert not gate["passes"]
    assert gate["reason"].startswith("worse than codes@2: loss ")
    assert report["comparisons"]["latest"]["version"] == "codes@2"


@pytest.mark.parametrize("publish_if", ["always", "improves_latest"])
def test_a_latest_version_that_is_followed_by_a_poor_one(
    shop: Shop, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch, publish_if: PublishIf
) -> None:
    """It is published all the same, once."""
    poor = sample(tiny_base.config.shape, POOR)
    shop.publish("codes", poor)
    shop.submit(replace(LEARNS, publish_if=publish_if), learnt(tiny_base))
    after_measuring_latest(monkeypatch, lambda number: number == 1 and shop.publish("codes", poor))
    shop.attempt()
    adapter = shop.jobs.get("job").adapter
    assert adapter is not None
    assert adapter["version"] == 3
    shop.store.verify(str(adapter["digest"]))
    report: Any = shop.jobs.report("job")
    assert report["comparisons"]["latest"]["version"] == "codes@2"


def test_a_latest_version_that_never_stays_the_same(
    shop: Shop, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt ends as one that is welcome again, with nothing published of it."""
    poor = sample(tiny_base.config.shape, POOR)
    shop.publish("codes", poor)
    shop.submit(SPEC, job_data(tiny_base))
    after_measuring_latest(monkeypatch, lambda number: shop.publish("codes", poor))
    with pytest.raises(LatestMoved):
        shop.attempt()
    assert shop.jobs.get("job").status is Status.RUNNING
    versions = shop.catalog.get("codes").versions
    assert {version.digest for version in versions} == {poor.weights.digest}
    assert len(versions) == 1 + train_job.MAX_DECISIONS
    assert issubclass(LatestMoved, TryAgain)


@pytest.mark.parametrize("event", ["nothing", "cancelled", "another attempt"])
def test_results_of_a_job_that_this_attempt_does_not_end(
    shop: Shop, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    """They go with a job that was cancelled; another attempt at it finds its own there, and may end it well."""

    def happen(number: int) -> None:
        if event == "cancelled":
            shop.jobs.cancel("job")
        elif event == "another attempt":
            shop.leases.crashed(Claim("job", 1, "worker"), "its worker died", max_delay=0.0)
            assert shop.leases.claim("other") is not None

    shop.publish("codes", sample(tiny_base.config.shape, POOR))
    shop.submit(replace(SPEC, publish_if="improves_latest"), job_data(tiny_base), kept={FINE_TUNING: {}})
    after_measuring_latest(monkeypatch, happen)
    with nullcontext() if event == "nothing" else pytest.raises(LeaseLost):
        shop.attempt()
    files = FileStore(Home(shop.home).files("default"))
    assert files.has(results_id("job")) == (event != "cancelled")


@pytest.mark.parametrize("expression", ["left*0.5+right*0.5", "left"])
@pytest.mark.parametrize("publish_if", ["always", "improves_latest"])
def test_a_name_that_became_a_compositions(
    shop: Shop, tiny_base: BaseModel, publish_if: PublishIf, expression: str
) -> None:
    """It is noticed before the first step, not after the last one."""
    for seed, name in enumerate(("left", "right")):
        shop.publish(name, sample(tiny_base.config.shape, seed))
    shop.submit(replace(SPEC, publish_if=publish_if), job_data(tiny_base))
    shop.catalog.compose("codes", [Term(part.partition("*")[0], weight=0.5) for part in expression.split("+")])
    with pytest.raises(Conflict, match="'codes' is the name of a composition: choose another one"):
        shop.attempt()
    assert not [event for event in shop.jobs.events("job") if event.type == "metrics"]


def test_a_name_that_becomes_a_compositions_during_the_job(shop: Shop, tiny_base: BaseModel) -> None:
    shop.publish("left", sample(tiny_base.config.shape, 1))
    shop.submit(replace(SPEC, publish_if="improves_latest"), job_data(tiny_base))
    terms = [Term("left", weight=0.5), Term("left", weight=0.25)]
    with pytest.raises(Conflict, match="'codes' is the name of a composition"):
        shop.attempt(on_metrics=lambda: shop.catalog.compose("codes", terms))


def test_full_fine_tuning_needs_no_name(shop: Shop, tiny_base: BaseModel) -> None:
    shop.publish("left", sample(tiny_base.config.shape, 1))
    shop.submit(replace(SPEC, method="full"), job_data(tiny_base))
    shop.catalog.compose("codes", [Term("left", weight=0.5)])
    shop.attempt()
    assert shop.jobs.get("job").status == "succeeded"


def test_a_model_that_an_attempt_was_killed_over_goes(shop: Shop, tiny_base: BaseModel) -> None:
    """Or it would stay for as long as the job's model does, with as many bytes."""
    shop.submit(replace(SPEC, method="full"), job_data(tiny_base))
    half = shop.files.directory("job") / ".unfinished-model-abc"
    half.mkdir()
    shop.attempt()
    assert shop.files.model("job").is_dir()
    assert not half.exists()
