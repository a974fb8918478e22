"""Merge jobs on a real server with a real worker, on a tiny base: run, served, killed and repeated, cancelled."""

from typing import Any

import pytest

from adapters.merge import merge
from adapters.merge_recipe import Recipe
from adapters.peft.files import PeftAdapter, write
from adapters.store.store import AdapterStore
from server.model.base.weights import BaseModel
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import CHILD, get, processes, succeeded, wait_until
from tests.server.jobs.merge_kit import sample

PROMPTS = ["HTTP 404:", "The request", "a"]


@pytest.fixture(scope="module")
def adapters(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PeftAdapter]:
    """Return two adapters of equal rank, whose factors can be merged, and one of another rank."""
    shape = tiny_base.config.shape
    return {
        "left": sample(shape, 1),
        "right": sample(shape, 2, alpha=4.0, names=("q_proj", "up_proj")),
        "wide": sample(shape, 3, rank=12),
    }


@pytest.fixture(scope="module")
def server(
    tiny_trainer: ServerProcess, adapters: dict[str, PeftAdapter], tmp_path_factory: pytest.TempPathFactory
) -> ServerProcess:
    for name, adapter in adapters.items():
        directory = tmp_path_factory.mktemp(name)
        write(directory, adapter)
        tiny_trainer.upload(name, directory)
    return tiny_trainer


def submit(server: ServerProcess, name: str, **body: object) -> str:
    response = server.client.post(f"/compositions/{name}", json=body)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def texts(server: ServerProcess, adapter: str) -> list[str]:
    return server.texts(PROMPTS, adapter=adapter, max_tokens=12, ignore_eos=True)


def test_svd_of_sufficient_rank_answers_like_the_exact_sum(server: ServerProcess) -> None:
    job = succeeded(
        server, submit(server, "sum", expression="left*0.7+right*-0.5+wide*0.2", method="svd", rank=20)
    )
    assert (job["adapter"]["name"], job["adapter"]["version"]) == ("sum", 1)
    assert job["metrics"]["distance"] < 1e-5
    exact = texts(server, "left*0.7+right*-0.5+wide*0.2")
    assert texts(server, "sum") == exact
    assert exact not in (texts(server, "base"), texts(server, "left*0.7+right*-0.5"))


def test_published_merge_equals_the_librarys(server: ServerProcess, adapters: dict[str, PeftAdapter]) -> None:
    recipe = Recipe("dare_ties", 0.4, seed=11)
    body = {"expression": "left+right*0.5", "method": "dare_ties", "density": 0.4, "seed": 11}
    job = succeeded(server, submit(server, "pruned", **body))
    expected = merge([(adapters["left"].weights, 1.0), (adapters["right"].weights, 0.5)], recipe)
    assert job["adapter"]["digest"] == expected.digest
    version = get(server, "/adapters/pruned/1")
    assert version["parent"] == "left@1+right@1*0.5"
    assert version["job_id"] == job["id"]
    assert get(server, f"/train/{job['id']}/report")["lineage"]["expression"] == version["parent"]
    assert server.client.get("/adapters/pruned/1/download").status_code == 200


def test_killed_merge_ends_like_an_undisturbed_one(server: ServerProcess) -> None:
    """The job's process is killed as soon as it runs: the next attempt publishes, once, the same bytes as an
    undisturbed job."""
    body: dict[str, Any] = {"expression": "left*0.5+wide", "method": "ties", "density": 0.3, "rank": 6}
    wait_until(lambda: not processes(server, CHILD))  # processes of earlier jobs have ended
    job_id = submit(server, "killed", **body)
    wait_until(lambda: bool(processes(server, CHILD)))
    for process in processes(server, CHILD):
        process.kill()
    job = succeeded(server, job_id)
    assert job["attempt"] == 2
    calm = succeeded(server, submit(server, "killed", **body))
    digests = [version["digest"] for version in get(server, "/adapters/killed")["versions"]]
    assert digests == [job["adapter"]["digest"], calm["adapter"]["digest"]]
    assert digests[0] == digests[1]
    AdapterStore(server.home / "adapters").verify(digests[0])


def test_cancelled_merge_publishes_nothing(server: ServerProcess) -> None:
    job_id = submit(server, "cancelled", expression="left+right", method="magnitude_prune")
    response = server.client.post(f"/train/{job_id}/cancel")
    assert response.json()["status"] == "cancelled"
    wait_until(lambda: not processes(server, CHILD))
    assert server.client.get("/adapters/cancelled").status_code == 404
    assert server.client.delete("/adapters/right").status_code == 204
