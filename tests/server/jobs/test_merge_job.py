"""Merge jobs without a process around them: what they publish, and what they leave where they are cut off."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from huggingface_hub import ModelCard

from adapters.catalog.catalog import Catalog, combine
from adapters.errors import CorruptAdapter, NotFound
from adapters.lora import BaseShape
from adapters.merge import merge
from adapters.merge_recipe import Recipe
from adapters.names import Viewpoint
from adapters.peft.files import WEIGHTS_NAME, PeftAdapter
from adapters.store.store import AdapterStore
from server.access.principal import Quota
from server.access.projects import Projects
from server.jobs.jobs import Jobs, Status
from server.jobs.leases import Claim, LeaseLost, Leases
from server.jobs.merge_job import run_merge
from server.jobs.merge_spec import ORIGIN, MergeSpec, read_origin
from server.jobs.specs import read_spec
from server.model.base.weights import BaseModel
from server.training.model_card import model_card
from server.training.spec import JobSpec
from tests.server.jobs.job_kit import submit
from tests.server.jobs.merge_kit import library_of, merge_now, merge_spec, origin_of, publish, sample, spec_of

TIES = Recipe("ties", 0.5, seed=3)
EXPRESSION = "left*0.7+right@1*-0.25"


class Cut(Exception):
    """Stands for whatever ends an attempt."""


class Listener:
    """Notes how far a merge is, and may end it."""

    def __init__(self, end_after: int | None = None) -> None:
        self.steps: list[object] = []
        self._end_after = end_after

    def yield_or_leave(self) -> None:
        if self._end_after is not None and len(self.steps) >= self._end_after:
            raise Cut

    def transferring(self, num_bytes: int) -> AbstractContextManager[None]:
        return nullcontext()

    def computing(self, num_tokens: int) -> AbstractContextManager[None]:
        return nullcontext()

    def progress(self, progress: Mapping[str, object], metrics: Mapping[str, object]) -> None:
        assert progress["total_steps"] == 21
        self.steps.append(progress["step"])

    def metrics(self, message: str, data: Mapping[str, object]) -> None:
        raise AssertionError("a merge has no steps to measure")

    def flush(self) -> None:
        raise AssertionError("a merge has no checkpoints")

    def checkpointed(self, step: int) -> None:
        raise AssertionError("a merge has no checkpoints")


@pytest.fixture
def catalog(engine: sa.Engine) -> Catalog:
    return Catalog(engine)


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


@pytest.fixture
def parts(catalog: Catalog, store: AdapterStore, tiny_base: BaseModel) -> None:
    for name, adapter in samples(tiny_base).items():
        publish(catalog, store, name, adapter, tiny_base.digest)


def samples(base: BaseModel) -> dict[str, PeftAdapter]:
    shape = base.config.shape
    return {"left": sample(shape, 1), "right": sample(shape, 2, names=("q_proj", "down_proj"))}


def claimed(jobs: Jobs, leases: Leases, spec: MergeSpec, job_id: str = "m1") -> Claim:
    jobs.submit(spec, job_id=job_id, data={"total_steps": 21})
    claim = leases.claim("worker")
    assert claim is not None
    return claim


@pytest.mark.usefixtures("parts")
def test_it_publishes_an_ordinary_version(
    jobs: Jobs, leases: Leases, catalog: Catalog, store: AdapterStore, tiny_base: BaseModel
) -> None:
    spec = merge_spec(catalog, EXPRESSION, TIES)
    listener = Listener()
    merge_now(
        spec, claimed(jobs, leases, spec), leases, library_of(catalog, store, tiny_base), tiny_base, listener
    )

    adapters = [(store.load(digest), weight) for digest, weight in combine(spec.parts)]
    expected = merge(adapters, TIES)
    assert listener.steps == list(range(1, 22))
    job = jobs.get("m1")
    assert (job.kind, job.status, job.spec) == ("merge", Status.SUCCEEDED, spec)
    published = {"name": "merged", "version": 1, "digest": expected.digest, "moves_latest": True}
    assert job.adapter == published
    assert (job.progress["step"], job.progress["total_steps"]) == (21, 21)
    version = catalog.version("merged", 1)
    assert (version.rank, version.alpha, version.job_id, version.base_model) == (4, 4.0, "m1", tiny_base.name)
    assert version.parent == "left@1*0.7+right@1*-0.25"
    assert version.base_digest == tiny_base.digest
    assert version.config["method"] == "ties"
    assert version.metrics["distance"] > 0
    store.verify(expected.digest)
    stored = store.read(expected.digest, tiny_base.config.shape)
    assert stored.weights.digest == expected.digest
    assert stored.base_model == tiny_base.name


@pytest.mark.parametrize(
    ("left", "right", "merged", "is_mixed"),
    [("0b" * 32, "0b" * 32, "0b" * 32, False), ("0b" * 32, "0c" * 32, None, True), (None, None, None, False)],
)
def test_merge_of_another_bases_parts_names_that_base(
    left: str | None,
    right: str | None,
    merged: str | None,
    is_mixed: bool,
    jobs: Jobs,
    leases: Leases,
    catalog: Catalog,
    store: AdapterStore,
    tiny_base: BaseModel,
) -> None:
    """The served base isn't named: neither its name nor its size describes the parts' base."""
    for (name, adapter), digest in zip(samples(tiny_base).items(), (left, right), strict=True):
        publish(catalog, store, name, replace(adapter, base_model="another"), digest)
    spec = merge_spec(catalog, EXPRESSION, TIES)
    merge_now(
        spec, claimed(jobs, leases, spec), leases, library_of(catalog, store, tiny_base), tiny_base, Listener()
    )
    version = catalog.version("merged", 1)
    assert (version.base_model, version.base_digest) == ("another", merged)
    assert bool(version.warnings) == is_mixed
    assert store.read(version.digest, tiny_base.config.shape).base_model == "another"
    report = jobs.report("m1")
    assert report is not None
    assert report["base_model"] == {"name": "another", "digest": merged, "parameters": None}
    text = model_card(json.loads(json.dumps(report)))
    assert ModelCard(text).data["base_model"] == "another"
    assert "A LoRA adapter for another:" in text


def test_merge_of_parts_of_different_bases_names_no_base(
    jobs: Jobs, leases: Leases, catalog: Catalog, store: AdapterStore, tiny_base: BaseModel
) -> None:
    for (name, adapter), digest in zip(samples(tiny_base).items(), ("0b" * 32, "0c" * 32), strict=True):
        publish(catalog, store, name, replace(adapter, base_model=f"{name}-base"), digest)
    spec = merge_spec(catalog, EXPRESSION, TIES)
    merge_now(
        spec, claimed(jobs, leases, spec), leases, library_of(catalog, store, tiny_base), tiny_base, Listener()
    )
    version = catalog.version("merged", 1)
    assert (version.base_model, version.base_digest) == (None, None)
    report = jobs.report("m1")
    assert report is not None
    assert report["base_model"] == {"name": None, "digest": None, "parameters": None}
    text = model_card(json.loads(json.dumps(report)))
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "A LoRA adapter for an unknown base:" in text


def test_layers_are_those_of_the_parts_base(
    jobs: Jobs, leases: Leases, catalog: Catalog, store: AdapterStore, tiny_base: BaseModel
) -> None:
    """A worker may have another base by then, of as many layers as these parts are of."""
    shape = tiny_base.config.shape
    deeper = BaseShape(shape.num_layers + 1, shape.features)
    for name, seed in (("left", 1), ("right", 2)):
        part = sample(shape, seed)
        layers = tuple(range(shape.num_layers))
        part = replace(part, config=replace(part.config, layers_to_transform=layers), base_model="deeper")
        assert publish(catalog, store, name, part, "0b" * 32)
        assert store.read(part.weights.digest, deeper)
    spec = merge_spec(catalog, EXPRESSION, TIES)
    merge_now(
        spec, claimed(jobs, leases, spec), leases, library_of(catalog, store, tiny_base), tiny_base, Listener()
    )
    merged = catalog.version("merged", 1)
    assert store.read(merged.digest, deeper).config.layers_to_transform == layers
    assert store.fits(merged.digest, shape)


def test_merge_inherits_its_parts_warnings(
    jobs: Jobs, leases: Leases, catalog: Catalog, store: AdapterStore, tiny_base: BaseModel
) -> None:
    left, right = samples(tiny_base).values()
    publish(catalog, store, "left", left, tiny_base.digest, ["its config names another base"])
    publish(catalog, store, "right", right, tiny_base.digest)
    spec = merge_spec(catalog, EXPRESSION, TIES)
    merge_now(
        spec, claimed(jobs, leases, spec), leases, library_of(catalog, store, tiny_base), tiny_base, Listener()
    )
    version = catalog.version("merged", 1)
    assert version.warnings == ("left@1: its config names another base",)
    assert (version.base_model, version.base_digest) == (tiny_base.name, tiny_base.digest)


@pytest.mark.usefixtures("parts")
def test_part_withdrawn_before_the_merge(
    jobs: Jobs, leases: Leases, catalog: Catalog, engine: sa.Engine, store: AdapterStore, tiny_base: BaseModel
) -> None:
    """Another project's: the job has its bytes, and knows where they were made."""
    for name in ("left", "right"):
        catalog.set_visibility(name, is_public=True)
    Projects(engine).put("acme", Quota(), who="test")
    viewpoint = Viewpoint("acme")
    seen = Catalog(engine, of=viewpoint)
    spec = merge_spec(seen, "default/left+default/right", TIES)
    origin = origin_of(seen, spec)
    jobs.of(viewpoint).submit(spec, job_id="m1", data={ORIGIN: asdict(origin)})
    catalog.set_visibility("left", is_public=False)
    library = library_of(seen, store, tiny_base)

    found = read_origin(jobs.get("m1").data)
    claim = leases.claim("worker")
    assert claim is not None
    run_merge(spec, claim, leases, library, tiny_base, Listener(), found)
    assert jobs.get("m1").status is Status.SUCCEEDED
    version = seen.version("merged", 1)
    assert (version.base_model, version.base_digest) == (tiny_base.name, tiny_base.digest)


@pytest.mark.usefixtures("parts")
def test_its_card(jobs: Jobs, leases: Leases, catalog: Catalog, store: AdapterStore, tiny_base: BaseModel) -> None:
    spec = merge_spec(catalog, EXPRESSION, Recipe("svd", rank=8))
    merge_now(
        spec, claimed(jobs, leases, spec), leases, library_of(catalog, store, tiny_base), tiny_base, Listener()
    )
    report = jobs.report("m1")
    assert report is not None
    assert report["kind"] == "merge"
    assert report["distance"] == pytest.approx(0, abs=1e-5)  # 4 + 4 is enough
    lineage = report["lineage"]
    assert isinstance(lineage, dict)
    assert lineage["expression"] == "left@1*0.7+right@1*-0.25"
    assert [part["digest"] for part in lineage["parts"]] == [part.digest for part in spec.parts]
    text = model_card(json.loads(json.dumps(report)))
    assert ModelCard(text).data["tags"] == ["smolora", "svd"]
    assert "| right@1 | -0.25 |" in text
    assert "| distance | 0.00% of the exact sum's norm away from it |" in text


@pytest.mark.usefixtures("parts")
def test_parts_that_cancel_have_no_distance(
    jobs: Jobs, leases: Leases, catalog: Catalog, store: AdapterStore, tiny_base: BaseModel
) -> None:
    """Equal weights under other bytes: their sum is 0, and JSON has no infinities."""
    left = sample(tiny_base.config.shape, 1)
    halved = sample(tiny_base.config.shape, 1, alpha=4.0)
    assert left.weights.digest != halved.weights.digest
    publish(catalog, store, "half", halved)
    spec = merge_spec(catalog, "left+half*-2", Recipe("magnitude_prune", 0.5))
    merge_now(
        spec, claimed(jobs, leases, spec), leases, library_of(catalog, store, tiny_base), tiny_base, Listener()
    )
    report = jobs.report("m1")
    assert report is not None
    assert report["distance"] is None
    assert catalog.version("merged", 1).metrics == {}
    assert "the exact sum is 0" in model_card(report)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("after", [0, 7, 20, 21])  # the last: while the distance is measured
def test_interrupted_merge_ends_in_the_same_bytes(
    jobs: Jobs, leases: Leases, catalog: Catalog, store: AdapterStore, tiny_base: BaseModel, after: int
) -> None:
    spec = merge_spec(catalog, EXPRESSION, Recipe("dare_ties", 0.5, seed=after, rank=3))
    claim = claimed(jobs, leases, spec)
    with pytest.raises(Cut):
        merge_now(spec, claim, leases, library_of(catalog, store, tiny_base), tiny_base, Listener(end_after=after))
    with pytest.raises(NotFound):
        catalog.get("merged")
    leases.crashed(claim, "cut off", max_delay=0.0)
    second = leases.claim("worker")
    assert second is not None
    merge_now(spec, second, leases, library_of(catalog, store, tiny_base), tiny_base, Listener())
    expected = merge([(store.load(digest), weight) for digest, weight in combine(spec.parts)], spec.recipe)
    assert [version.digest for version in catalog.get("merged").versions] == [expected.digest]


@pytest.mark.usefixtures("parts")
def test_worker_without_a_lease_publishes_nothing(
    jobs: Jobs, leases: Leases, catalog: Catalog, store: AdapterStore, tiny_base: BaseModel
) -> None:
    spec = merge_spec(catalog, EXPRESSION, TIES)
    claim = claimed(jobs, leases, spec)
    jobs.cancel("m1")
    with pytest.raises(LeaseLost):
        merge_now(spec, claim, leases, library_of(catalog, store, tiny_base), tiny_base, Listener())
    assert jobs.get("m1").status is Status.CANCELLED
    with pytest.raises(NotFound):
        catalog.get("merged")


@pytest.mark.usefixtures("parts")
def test_part_damaged_on_disk(
    jobs: Jobs, leases: Leases, catalog: Catalog, store: AdapterStore, tiny_base: BaseModel, tmp_path: Path
) -> None:
    spec = merge_spec(catalog, EXPRESSION, TIES)
    (path,) = (tmp_path / "adapters").glob(f"*/{spec.parts[0].digest}/{WEIGHTS_NAME}")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptAdapter):
        merge_now(
            spec, claimed(jobs, leases, spec), leases, library_of(catalog, store, tiny_base), tiny_base, Listener()
        )


@pytest.mark.usefixtures("parts")
def test_parts_are_in_use_until_it_has_ended(jobs: Jobs, leases: Leases, catalog: Catalog) -> None:
    spec = merge_spec(catalog, EXPRESSION, TIES)
    claim = claimed(jobs, leases, spec)
    assert all(jobs.in_use(part.digest) for part in spec.parts)
    leases.fail(claim, "no reason")
    assert not any(jobs.in_use(part.digest) for part in spec.parts)


@pytest.mark.parametrize(
    "spec",
    [
        JobSpec("trained", start_from="a@1", start_from_digest="d" * 64),
        spec_of({"a": 0.5, "b": -1.0}, Recipe("svd", rank=4)),
        spec_of({"a": 100.0}, Recipe("dare_ties", 0.125, seed=(1 << 63) - 1)),
    ],
)
def test_specs_are_stored_and_read(spec: JobSpec | MergeSpec, jobs: Jobs) -> None:
    document = json.loads(json.dumps(spec.to_document()))
    assert read_spec(document) == spec
    assert jobs.submit(spec, job_id="j", data={}).spec == spec
    assert jobs.list()[0].kind == ("merge" if isinstance(spec, MergeSpec) else "train")


def test_invalid_merge_specs() -> None:
    document = spec_of({"a": 0.5}, TIES).to_document()
    for changed in ({"method": "average"}, {"density": "all"}, {"parts": None}, {"name": 3}):
        with pytest.raises(ValueError, match=next(iter(changed))):
            read_spec(document | changed)


def test_both_kinds_wait_in_one_queue(jobs: Jobs, leases: Leases) -> None:
    jobs.submit(spec_of({"a": 1.0}, TIES), job_id="m", data={})
    submit(jobs, "t")
    claims = [leases.claim("worker") for _ in range(2)]
    assert [claim and claim.job_id for claim in claims] == ["m", "t"]
