"""Stored JSON comes back as the dataclass it was, or not at all."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import pytest

from server.training.run import Counters
from server.training.spec import JobSpec, LoraSpec, TrainingSpec, read_document


@dataclass(frozen=True)
class Inner:
    curve: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Outer:
    inner: Inner
    at: datetime
    note: str | None = None


OUTER = Outer(Inner(((1, 0.5), (2, 0.25))), datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC))
SPEC = JobSpec(
    "codes",
    method="full",
    lora=LoraSpec(4, 8.0, 0.1, ("q_proj", "down_proj"), "olora", use_rslora=True),
    training=TrainingSpec(max_steps=7, learning_rate=3e-4, eval_steps=2, packing=False, overlong="refuse"),
    start_from="codes@2",
    start_from_digest="ab" * 32,
    publish_if="improves_latest",
    alias="prod",
    description="ä",
)


def test_lists_and_texts_become_tuples_and_dates() -> None:
    document = json.loads(json.dumps(asdict(OUTER), default=datetime.isoformat))
    assert read_document(Outer, document) == OUTER
    assert read_document(list[Outer], [document]) == [OUTER]


@pytest.mark.parametrize("spec", [SPEC, JobSpec("codes")])
def test_a_jobs_specification(spec: JobSpec) -> None:
    assert JobSpec.from_document(json.loads(json.dumps(spec.to_document()))) == spec


def test_a_specification_from_before_epochs_were_chosen() -> None:
    """A job that was queued before an upgrade does what it did."""
    document = json.loads(json.dumps(JobSpec("codes").to_document()))
    del document["training"]["auto_epochs"]
    training = JobSpec.from_document(document).training
    assert (training.epochs, training.overlong, training.auto_epochs) == (3, "truncate", False)


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "epochs", "steps"),
    [
        (1, 8, 20, 20),
        (25, 8, 20, 80),
        (40, 8, 20, 100),
        (41, 8, 17, 102),
        (100, 8, 8, 104),
        (272, 8, 3, 102),
        (8000, 8, 3, 3000),
        (8000, 4096, 20, 40),
    ],
)
def test_epochs_come_to_about_a_hundred_steps(num_rows: int, batch_size: int, epochs: int, steps: int) -> None:
    """Three epochs of 25 rows were 12 steps, after which the answers were wrong."""
    chosen = TrainingSpec(batch_size=batch_size).with_epochs(num_rows)
    assert (chosen.epochs, chosen.total_steps(num_rows)) == (epochs, steps)
    assert chosen.auto_epochs


def test_a_specification_without_the_deviation_of_a() -> None:
    """It was 1/rank, and alpha was 32 at every rank."""
    document = JobSpec("codes", lora=LoraSpec(8)).to_document()
    lora = document["lora"]
    assert isinstance(lora, dict)
    del lora["init_std"]
    assert JobSpec.from_document(document) == JobSpec("codes", lora=LoraSpec(8, 32.0, init_std=1 / 8))
    assert JobSpec.from_document({"name": "codes"}) == JobSpec("codes")


@pytest.mark.parametrize(
    "change",
    [
        {"name": None},
        {"name": 1},
        {"method": "none"},
        {"training": {"epochs": "many"}},
        {"lora": {"target_modules": "q_proj"}},
        {"lora": []},
    ],
)
def test_values_of_another_type_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        JobSpec.from_document({**SPEC.to_document(), **change})


def test_missing_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="at"):
        read_document(Outer, {"inner": {"curve": []}})


def test_counters_of_an_older_checkpoint() -> None:
    """From before a step could be unreported."""
    document = asdict(Counters(num_tokens=3, eval_curve=[(2, 1.5)]))
    del document["unreported"]
    assert read_document(Counters, document) == Counters(num_tokens=3, eval_curve=[(2, 1.5)])
