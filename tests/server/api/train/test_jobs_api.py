"""The paths under /train, as specified by API.md; a stand-in trains."""

import io
import zipfile
from pathlib import Path

import httpx
import pytest

from server.jobs.leases import Leases
from server.model.base.source import HubModel
from server.model.base.weights import BaseModel
from server.training.model_card import bare_card, model_card
from server.training.report import build_report
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.train_kit import StandIn, submit
from tests.server.training.reports.report_kit import FOUND, SPEC

pytestmark = pytest.mark.anyio


async def test_the_published_version_is_there(client: httpx.AsyncClient, leases: Leases) -> None:
    job_id = await submit(client)
    version = StandIn(leases).succeed(digest="0" * 64)
    assert version is not None
    job = (await client.get(f"/train/{job_id}")).json()
    assert job["status"] == "succeeded"
    assert job["adapter"] == {"name": "codes", "version": 1, "digest": "0" * 64, "moves_latest": True}
    assert job["metrics"]["base_eval_loss"] == 3.0
    assert job["metrics"]["eval_accuracy"] == 0.9
    assert job["finished_at"] >= job["started_at"] >= job["created_at"]
    listed = (await client.get("/adapters/codes/1")).json()
    assert listed["job_id"] == job_id


async def test_pages_and_statuses(client: httpx.AsyncClient, leases: Leases) -> None:
    ids = [await submit(client) for _ in range(4)]
    StandIn(leases).fail("it is only a test")
    StandIn(leases).step(1)

    async def page(query: str) -> tuple[list[int], int | None]:
        answer = (await client.get(f"/train?{query}")).json()
        following = answer["next"]
        return [ids.index(job["id"]) for job in answer["jobs"]], None if following is None else ids.index(
            following
        )

    assert await page("") == ([3, 2, 1, 0], None)
    assert await page("limit=2") == ([3, 2], 2)
    assert await page(f"limit=2&after={ids[2]}") == ([1, 0], None)
    assert await page("status=queued") == ([3, 2], None)
    assert await page("status=running") == ([1], None)
    assert await page("status=failed") == ([0], None)
    assert await page("status=paused") == ([], None)
    jobs = (await client.get("/train")).json()["jobs"]
    assert [job["position"] for job in jobs] == [2, 1, None, None]
    assert jobs[3]["error"] == "it is only a test"
    assert jobs[2]["progress"] == {
        "step": 1,
        "total_steps": 9,
        "epoch": 0.5,
        "tokens": 100,
        "tokens_per_second": 250.0,
        "eta_seconds": 2.0,
    }


@pytest.mark.parametrize(
    ("query", "field"), [("status=done", "status"), ("limit=0", "limit"), ("limit=1001", "limit")]
)
async def test_bad_pages(client: httpx.AsyncClient, query: str, field: str) -> None:
    response = await client.get(f"/train?{query}")
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == [field]


async def test_pause_resume_cancel(client: httpx.AsyncClient, leases: Leases) -> None:
    first, second = [await submit(client) for _ in range(2)]
    paused = await client.post(f"/train/{first}/pause")
    assert (paused.status_code, paused.json()["status"], paused.json()["position"]) == (200, "paused", None)
    assert (await client.get(f"/train/{second}")).json()["position"] == 1
    resumed = (await client.post(f"/train/{first}/resume")).json()
    assert (resumed["status"], resumed["position"]) == ("queued", 1)
    StandIn(leases)
    running = (await client.post(f"/train/{first}/pause")).json()
    assert (running["status"], running["pausing"]) == ("running", True)
    cancelled = (await client.post(f"/train/{first}/cancel")).json()
    assert (cancelled["status"], cancelled["pausing"]) == ("cancelled", False)
    for move in ("cancel", "stop", "pause", "resume"):
        response = await client.post(f"/train/{first}/{move}")
        assert response.status_code == 409
        assert "cancelled" in response.json()["detail"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("GET", "/events"), ("GET", "/report"), ("GET", "/download")]
    + [("POST", f"/{move}") for move in ("cancel", "stop", "pause", "resume")],
)
async def test_no_such_job(client: httpx.AsyncClient, method: str, path: str) -> None:
    response = await client.request(method, f"/train/nothing{path}")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


async def test_a_report_once_it_has_succeeded(client: httpx.AsyncClient, leases: Leases) -> None:
    done, failed = [await submit(client) for _ in range(2)]
    response = await client.get(f"/train/{done}/report")
    assert (response.status_code, "queued" in response.json()["detail"]) == (409, True)
    worker = StandIn(leases)
    assert (await client.get(f"/train/{done}/report")).status_code == 409
    worker.succeed({"name": "codes", "curves": {"train_loss": [[1, 0.5]]}})
    assert (await client.get(f"/train/{done}/report")).json()["curves"] == {"train_loss": [[1, 0.5]]}
    StandIn(leases).fail("no")
    response = await client.get(f"/train/{failed}/report")
    assert (response.status_code, "failed" in response.json()["detail"]) == (404, True)


async def test_the_model_of_full_fine_tuning(client: httpx.AsyncClient, leases: Leases, tmp_path: Path) -> None:
    job_id = await submit(client, method="full")
    assert (await client.get(f"/train/{job_id}/download")).status_code == 409
    worker = StandIn(leases)
    model = tmp_path / "jobs" / job_id / "model"
    model.mkdir()
    files = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 12_000}
    for name, content in files.items():
        (model / name).write_bytes(content)
    worker.succeed()
    response = await client.get(f"/train/{job_id}/download")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/zip"
    assert response.headers["content-disposition"] == f'attachment; filename="codes-{job_id}.zip"'
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == files


async def test_adapters_have_their_own_download(client: httpx.AsyncClient, leases: Leases) -> None:
    job_id = await submit(client)
    response = await client.get(f"/train/{job_id}/download")
    assert response.status_code == 404
    StandIn(leases).succeed(digest="0" * 64)
    response = await client.get(f"/train/{job_id}/download")
    assert "/adapters/codes/1/download" in response.json()["detail"]


async def test_the_card_lies_in_the_download(
    client: httpx.AsyncClient, leases: Leases, tiny_base: BaseModel
) -> None:
    digest = (await client.post("/adapters/up", files=as_parts(*peft_files()))).json()["digest"]
    await submit(client)
    report = build_report(SPEC, tiny_base, FOUND)
    StandIn(leases).succeed(report, digest=digest)
    for path, card in (
        ("up/1", bare_card("someone/tiny-llama", HubModel("someone/tiny-llama"))),
        ("codes/1", model_card(report)),
    ):
        response = await client.get(f"/adapters/{path}/download")
        with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
            assert archive.testzip() is None
            assert set(archive.namelist()) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
            assert archive.read("README.md").decode() == card
    again = await client.post("/adapters/copy", files={"archive": ("a.zip", response.content)})
    assert again.json()["digest"] == digest
