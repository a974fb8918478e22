"""DELETE /train/{id} removes an ended job's files; its record, events, card and versions stay."""

import json
from pathlib import Path

import httpx
import pytest

from adapters.store.store import AdapterStore
from server.jobs.files import JobFiles
from server.jobs.leases import Leases
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.train_kit import ROWS, StandIn, submit, train_body

pytestmark = pytest.mark.anyio


@pytest.fixture
def job_files(tmp_path: Path) -> JobFiles:
    return JobFiles(tmp_path)


def leave_files(job_files: JobFiles, job_id: str) -> None:
    """Write the files that a worker leaves besides the rows."""
    job_files.log(job_id).write_text("it went well\n")
    (job_files.checkpoints(job_id) / "1-10").mkdir(parents=True)
    (job_files.checkpoints(job_id) / "1-10" / "state.json").write_text("{}")
    job_files.model(job_id).mkdir()
    (job_files.model(job_id) / "model.safetensors").write_bytes(bytes(1000))


async def test_deleted_jobs_keep_their_records(
    client: httpx.AsyncClient, leases: Leases, job_files: JobFiles, store: AdapterStore
) -> None:
    uploaded = (await client.post("/adapters/up", files=as_parts(*peft_files()))).json()
    job_id = await submit(client)
    StandIn(leases).succeed({"name": "codes", "steps": 9}, uploaded["digest"])
    leave_files(job_files, job_id)
    before = {path: (await client.get(path)).json() for path in paths(job_id)}
    assert before[f"/train/{job_id}"]["files_removed_at"] is None
    response = await client.delete(f"/train/{job_id}")
    assert (response.status_code, response.content) == (204, b"")
    assert not job_files.directory(job_id).exists()
    after = {path: (await client.get(path)).json() for path in paths(job_id)}
    removed_at = after[f"/train/{job_id}"].pop("files_removed_at")
    assert removed_at > before[f"/train/{job_id}"]["finished_at"]
    assert after["/train"]["jobs"][0].pop("files_removed_at") == removed_at
    for document in (before[f"/train/{job_id}"], before["/train"]["jobs"][0]):
        del document["files_removed_at"]
    assert after == before
    store.verify(uploaded["digest"])

    again = await client.delete(f"/train/{job_id}")  # nothing is left to remove
    assert again.status_code == 204
    assert (await client.get(f"/train/{job_id}")).json()["files_removed_at"] == removed_at
    for verb in ("cancel", "pause", "resume"):
        assert (await client.post(f"/train/{job_id}/{verb}")).status_code == 409


async def test_rows_go_when_the_job_is_cancelled(client: httpx.AsyncClient, job_files: JobFiles) -> None:
    """Otherwise submitting and cancelling repeatedly would fill the disk, without counting towards a quota."""
    job_id = await submit(client)
    assert any(job_files.directory(job_id).iterdir())
    assert (await client.post(f"/train/{job_id}/cancel")).status_code == 200
    assert not any(job_files.directory(job_id).iterdir())
    assert (await client.get(f"/train/{job_id}")).json()["files_removed_at"] is None
    assert (await client.delete(f"/train/{job_id}")).status_code == 204


def paths(job_id: str) -> list[str]:
    job = f"/train/{job_id}"
    return ["/train", job, f"{job}/events", f"{job}/report", "/adapters"]


@pytest.mark.parametrize("status", ["queued", "running", "paused"])
async def test_a_job_that_has_not_ended_keeps_its_files(
    client: httpx.AsyncClient, leases: Leases, job_files: JobFiles, status: str
) -> None:
    job_id = await submit(client)
    if status == "running":
        StandIn(leases)
    elif status == "paused":
        await client.post(f"/train/{job_id}/pause")
    response = await client.delete(f"/train/{job_id}")
    assert response.status_code == 409
    assert f"the job is {status}: cancel it first" in response.json()["detail"]
    assert (job_files.directory(job_id) / "data.json").exists()
    assert (await client.get(f"/train/{job_id}")).json()["files_removed_at"] is None


async def test_a_full_model_can_be_had_until_then(
    client: httpx.AsyncClient, leases: Leases, job_files: JobFiles
) -> None:
    job_id = await submit(client, method="full")
    StandIn(leases).succeed()
    leave_files(job_files, job_id)
    assert (await client.get(f"/train/{job_id}/download")).status_code == 200
    await client.delete(f"/train/{job_id}")
    response = await client.get(f"/train/{job_id}/download")
    assert response.status_code == 404
    assert "removed" in response.json()["detail"]


async def test_failed_and_cancelled_ones_too(
    client: httpx.AsyncClient, leases: Leases, job_files: JobFiles
) -> None:
    failed = await submit(client)
    StandIn(leases).fail("no")
    cancelled = await submit(client)
    await client.post(f"/train/{cancelled}/cancel")
    for job_id, status in ((failed, "failed"), (cancelled, "cancelled")):
        assert (await client.delete(f"/train/{job_id}")).status_code == 204
        assert not job_files.directory(job_id).exists()
        assert (await client.get(f"/train/{job_id}")).json()["status"] == status


async def test_no_such_job(client: httpx.AsyncClient) -> None:
    response = await client.delete("/train/job-0")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


async def test_data_sets_stay_and_keys_still_name_the_job(
    client: httpx.AsyncClient, leases: Leases, tmp_path: Path
) -> None:
    content = b'{"text": "a"}\n{"text": "b"}\n'
    dataset = (await client.post("/datasets", files={"file": ("a.jsonl", content)})).json()
    headers = {"Idempotency-Key": "once"}
    body = train_body(data=None, dataset=dataset["id"], validation=0)
    job_id = (await client.post("/train", json=body, headers=headers)).json()["id"]
    StandIn(leases).succeed()
    await client.delete(f"/train/{job_id}")
    assert (await client.get(f"/datasets/{dataset['id']}")).json() == {
        name: value for name, value in dataset.items() if name != "warnings"
    }
    assert (await client.post("/train", json=body, headers=headers)).json()["id"] == job_id
    assert (await client.post("/train", json=body)).json()["id"] != job_id
    assert (await client.delete(f"/datasets/{dataset['id']}")).status_code == 409  # the second one needs it


async def test_jobs_of_v1_stay_readable(client: httpx.AsyncClient, leases: Leases, job_files: JobFiles) -> None:
    content = "\n".join(map(json.dumps, ROWS)).encode()
    parts: dict[str, tuple[str | None, str | bytes]] = {
        "file": ("a.jsonl", content),
        "purpose": (None, "fine-tune"),
    }
    file_id = (await client.post("/v1/files", files=parts)).json()["id"]
    created = await client.post("/v1/fine_tuning/jobs", json={"model": "base", "training_file": file_id})
    job_id = created.json()["id"]
    StandIn(leases).succeed({"name": "codes", "steps": 9})
    jobs = "/v1/fine_tuning/jobs"
    about = [jobs, f"{jobs}/{job_id}", f"{jobs}/{job_id}/events", f"{jobs}/{job_id}/checkpoints"]
    before = [(await client.get(path)).json() for path in about]
    assert (await client.delete(f"/train/{job_id}")).status_code == 204
    assert not job_files.directory(job_id).exists()
    assert [(await client.get(path)).json() for path in about] == before
    assert (await client.get(f"/v1/files/{file_id}/content")).content == content
