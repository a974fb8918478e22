"""Submissions during deletes, repeats, or on a full disk: a whole job or nothing."""

import asyncio
import errno
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI

from adapters.errors import CorruptAdapter, InDoubt, NotFound
from adapters.library import Library
from server.jobs.jobs import Job, Jobs
from server.jobs.specs import Spec
from server.training.datasets import Dataset, DatasetStore
from server.training.job_data import DATA_NAME, JobData
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.train_kit import train_body
from tests.server.conftest import MAX_POSITIONS, client_of

pytestmark = pytest.mark.anyio


class MeddlingJobs(Jobs):
    """Jobs that let others act just before and just after a job is queued."""

    def __init__(self, database: sa.Engine) -> None:
        super().__init__(database)
        self.meddle: Callable[[], object] = lambda: None
        self.meddle_after: Callable[[], object] = lambda: None

    def submit(
        self,
        spec: Spec,
        *,
        job_id: str,
        data: Mapping[str, object],
        used: Iterable[str] = (),
        idempotency_key: str | None = None,
        body_digest: str = "",
        warnings: Iterable[str] = (),
        num_bytes: int = 0,
    ) -> Job:
        self.meddle()
        job = super().submit(
            spec,
            job_id=job_id,
            data=data,
            used=used,
            idempotency_key=idempotency_key,
            body_digest=body_digest,
            warnings=warnings,
            num_bytes=num_bytes,
        )
        self.meddle_after()
        return job


@pytest.fixture
def jobs(database: sa.Engine) -> MeddlingJobs:
    return MeddlingJobs(database)


def no_room() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


async def test_a_parent_that_is_deleted_meanwhile(
    client: httpx.AsyncClient, jobs: MeddlingJobs, library: Library
) -> None:
    """Its name is deleted, as nothing protected it yet; the job keeps its bytes until it ends."""
    digest = (await client.post("/adapters/up", files=as_parts(*peft_files()))).json()["digest"]
    jobs.meddle = lambda: library.delete("up")
    response = await client.post("/train", json=train_body(start_from="up"))
    assert response.status_code == 202
    with pytest.raises(NotFound):
        library.get("up")
    assert library.read(digest).config.rank == 2
    assert jobs.in_use(digest)


async def test_nothing_holds_the_parent_without_a_job(client: httpx.AsyncClient, library: Library) -> None:
    digest = (await client.post("/adapters/up", files=as_parts(*peft_files()))).json()["digest"]
    dry = await client.post("/train?dry_run=true", json=train_body(start_from="up"))
    refused = await client.post("/train", json=train_body(start_from="up", data=[{"text": ""}]))
    assert (dry.status_code, refused.status_code) == (200, 422)
    library.delete("up")
    with pytest.raises(CorruptAdapter):
        library.read(digest)


async def test_a_disk_that_fills_up(client: httpx.AsyncClient, jobs: MeddlingJobs, tmp_path: Path) -> None:
    jobs.meddle = no_room
    response = await client.post("/train", json=train_body())
    assert response.status_code == 503
    assert "disk is full" in response.json()["detail"]
    assert int(response.headers["retry-after"]) > 1
    assert not list(tmp_path.glob("jobs/*"))
    assert (await client.get("/train")).json()["jobs"] == []


async def test_whatever_else_goes_wrong(client: httpx.AsyncClient, jobs: MeddlingJobs, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("nobody foresaw it")

    jobs.meddle = fail
    assert (await client.post("/train", json=train_body())).status_code == 500
    assert not list(tmp_path.glob("jobs/*"))


async def test_a_commit_of_which_nobody_knows(
    client: httpx.AsyncClient, jobs: MeddlingJobs, tmp_path: Path
) -> None:
    """For example if PostgreSQL is unavailable for long during the commit. A queued job has its rows."""

    def go_away() -> None:
        raise InDoubt

    jobs.meddle_after = go_away
    response = await client.post("/train", json=train_body())
    assert response.status_code == 503
    assert "look whether it was done" in response.json()["detail"]
    (job,) = (await client.get("/train")).json()["jobs"]
    assert (tmp_path / "jobs" / job["id"] / DATA_NAME).exists()


class FullStore(DatasetStore):
    """A store on a full disk."""

    def put(self, *_: object, **__: object) -> Dataset:
        raise OSError(errno.ENOSPC, "No space left on device")


class TestDatasets:
    @pytest.fixture
    def datasets(self, tmp_path: Path) -> DatasetStore:
        return FullStore(tmp_path / "datasets")

    async def test_an_upload_to_a_full_disk(self, client: httpx.AsyncClient) -> None:
        response = await client.post("/datasets", files={"file": ("a.jsonl", b'{"text": "a"}')})
        assert response.status_code == 503
        assert "disk is full" in response.json()["detail"]


async def test_one_key_at_the_same_time(app: FastAPI, tmp_path: Path) -> None:
    async with client_of(app) as client:
        requests = [
            client.post("/train", json=train_body(), headers={"Idempotency-Key": "once"}) for _ in range(4)
        ]
        responses = await asyncio.gather(*requests)
        assert [response.status_code for response in responses] == [202] * 4
        ids = {response.json()["id"] for response in responses}
        assert len(ids) == 1
        assert [path.name for path in tmp_path.glob("jobs/*")] == list(ids)
        assert len((await client.get("/train")).json()["jobs"]) == 1


async def test_long_conversations_are_truncated_to_the_base(client: httpx.AsyncClient, tmp_path: Path) -> None:
    """A held-out one, of which the first answer is measured. The last one was cut off, so it isn't asked for."""
    turns = [("user", "404"), ("assistant", "Not Found"), ("user", "200 " * 20_000), ("assistant", "OK")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    response = await client.post("/train", json=train_body(validation=[row]))
    data = JobData.load(tmp_path / "jobs" / response.json()["id"])
    assert data.references == []
    assert data.validation is not None
    assert len(data.validation[0].token_ids) <= MAX_POSITIONS
