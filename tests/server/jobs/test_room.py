"""The bytes of jobs: a real job stores no more than it reserves, and its result needs room when it is stored."""

from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.merge import config_of, merge
from adapters.merge_recipe import Recipe
from adapters.names import Viewpoint
from adapters.peft.files import PeftAdapter
from server.access.principal import Quota
from server.access.projects import Projects
from server.errors import Forbidden
from server.jobs.files import Retention
from server.jobs.room import merge_bytes, training_bytes
from server.jobs.tables import Status, jobs
from server.model.base.weights import BaseModel
from server.training.spec import Init, JobSpec, LoraSpec, Method, TrainingSpec
from tests.server.jobs import evaluate_kit
from tests.server.jobs.attempt_kit import Shop, job_data
from tests.server.jobs.merge_kit import sample

SPEC = JobSpec(
    "codes",
    lora=LoraSpec(rank=4),
    training=TrainingSpec(max_steps=3, batch_size=4, max_length=48, checkpoint_steps=1),
)


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("method", "init", "eval_steps"),
    [("lora", "gaussian", None), ("lora", "gaussian", 1), ("lora", "pissa", None), ("full", "gaussian", 1)],
)
def test_a_job_stores_no_more_than_it_reserves(
    shop: Shop, tiny_base: BaseModel, method: Method, init: Init, eval_steps: int | None
) -> None:
    """The largest checkpoint of the attempts, written before the last one is removed, and the result."""
    training = replace(SPEC.training, eval_steps=eval_steps)
    spec = replace(SPEC, method=method, lora=replace(SPEC.lora, init=init), training=training)
    shop.submit(spec, job_data(tiny_base))
    sizes = [0]
    place = shop.files.checkpoints("job")
    shop.attempt(on_metrics=lambda: sizes.append(size(place) if place.exists() else 0))
    stored = size(shop.files.model("job")) if method == "full" else shop.catalog.version("codes", 1).bytes
    assert max(sizes) > 0
    reserved = training_bytes(spec, tiny_base.config.shape, tiny_base.weights.num_parameters)
    assert 0.5 * reserved < 2 * max(sizes) + stored + (64 << 10) <= reserved + (64 << 10)


def test_a_merge_stores_no_more_than_it_reserves(shop: Shop, tiny_base: BaseModel) -> None:
    shape = tiny_base.config.shape
    parts = [sample(shape, seed, rank=rank) for seed, rank in enumerate((2, 3))]
    for name, part in zip("ab", parts, strict=True):
        shop.publish(name, part)
    ranks = [shop.store.ranks(part.weights.digest, shape) for part in parts]
    for rank in (None, 5):
        recipe = Recipe("svd", 1.0, 0, rank)
        weights = merge([(part.weights, 0.5) for part in parts], recipe)
        stored = shop.store.put(PeftAdapter(config_of(weights, shape.num_layers), weights, tiny_base.name))
        assert 0.8 * stored < merge_bytes(ranks, recipe, shape) - (64 << 10) < stored


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_result_without_room_fails_the_job(shop: Shop, tiny_base: BaseModel, method: Method) -> None:
    """The limit was lowered after the job was submitted. Nothing is left of the result."""
    shop.submit(replace(SPEC, method=method), job_data(tiny_base))
    Projects(shop.engine).put("default", Quota(max_bytes=1000), who="test")
    with pytest.raises(Forbidden, match="the project default may store 1,000 bytes, has 0 and would add"):
        shop.attempt()
    assert shop.catalog.list() == []
    assert not shop.files.model("job").exists()
    assert not list(shop.store.digests())


def test_a_model_counts_until_its_files_are_removed(shop: Shop, tiny_base: BaseModel) -> None:
    shop.submit(replace(SPEC, method="full"), job_data(tiny_base))
    shop.attempt()
    model = size(shop.files.model("job"))
    assert shop.jobs.num_bytes() == pytest.approx(model, rel=0.01)
    Retention(shop.home, shop.jobs).remove("job")
    assert shop.jobs.num_bytes() == 0
    assert shop.jobs.report("job") is not None


def test_an_evaluations_findings_count_until_its_files_are_removed(shop: Shop) -> None:
    dataset = evaluate_kit.dataset(shop, evaluate_kit.COMPLETIONS)
    job = evaluate_kit.submit(shop, adapters=["base"], datasets=[dataset])
    assert shop.jobs.num_bytes() > 64 << 10
    evaluate_kit.attempt(shop)
    assert 0 < shop.jobs.num_bytes() < 64 << 10
    Retention(shop.home, shop.jobs).remove(job.id)
    assert shop.jobs.num_bytes() == 0
    report = shop.jobs.report(job.id)
    assert report is not None
    assert (report["flips"], bool(report["results"])) == ([], True)


def test_jobs_of_an_older_release_are_counted(shop: Shop, tiny_base: BaseModel) -> None:
    """Their sizes are unknown until the server measures their files once."""
    shop.submit(replace(SPEC, method="full"), job_data(tiny_base))
    shop.attempt()
    with shop.engine.begin() as connection:
        connection.execute(sa.update(jobs).values(bytes=None))
    assert shop.jobs.num_bytes() == 0
    for _ in range(2):
        Retention(shop.home, shop.jobs).finish()
        assert shop.jobs.num_bytes() == size(shop.files.directory("job"))


def test_bytes_are_those_of_a_project_and_of_a_key(shop: Shop) -> None:
    for project in ("acme", "other"):
        Projects(shop.engine).put(project, Quota(), who="test")
    acme, colleague = Viewpoint("acme", key_id="one"), Viewpoint("acme", key_id="two")
    for number, viewpoint in enumerate((acme, acme, colleague, Viewpoint("other"))):
        shop.jobs.of(viewpoint).submit(SPEC, job_id=f"job-{number}", data={}, num_bytes=10**number)
    assert shop.jobs.of(acme).num_bytes() == 111
    assert shop.jobs.of(acme).num_bytes("one") == 11
    assert shop.jobs.of(acme).num_bytes("one", without="job-0") == 10
    assert shop.jobs.of(acme).cancel("job-1").status is Status.CANCELLED
    assert shop.jobs.of(acme).num_bytes() == 101
