"""A disk that fails (EIO) at any sync of a file or directory: a request answered with an error has no effect."""

import errno
import os
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from adapters.library import Library
from server.jobs.jobs import Jobs
from server.jobs.leases import Leases
from tests.server.api.access.key_kit import OPERATORS, client_with
from tests.server.api.test_full_disk import asks, changed, stored
from tests.server.conftest import MakeServices, new_app

pytestmark = pytest.mark.anyio

WRITES = (
    "POST /adapters/{name}",
    "POST /compositions/{name}",
    "POST /datasets",
    "POST /v1/files",
    "POST /train",
    "POST /evaluate",
    "POST /v1/fine_tuning/jobs",
)


class FailingSync:
    """`os.fsync` whose call number `fails_at`, counted from 0, fails."""

    def __init__(self) -> None:
        self.fails_at: int | None = None
        self.num_calls = 0
        self._fsync = os.fsync

    def __call__(self, handle: int) -> None:
        number, self.num_calls = self.num_calls, self.num_calls + 1
        if number == self.fails_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fsync(handle)


@pytest.fixture
def app(make_services: MakeServices) -> FastAPI:
    return new_app(make_services(api_keys=OPERATORS, min_free_bytes=0))


@pytest.mark.parametrize("name", WRITES)
async def test_any_sync_may_fail(
    app: FastAPI,
    leases: Leases,
    library: Library,
    jobs: Jobs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    sync = FailingSync()
    async with client_with(app, OPERATORS) as client:
        ask = (await asks(client, leases, tmp_path))[name]
        before = await stored(client, tmp_path)
        monkeypatch.setattr(os, "fsync", sync)
        num_failed = 0
        while True:
            sync.num_calls, sync.fails_at = 0, num_failed
            response: httpx.Response = await client.request(name.split()[0], ask.path, **ask.options)
            if response.status_code == ask.status:
                break
            assert response.status_code == 503, response.text
            assert "the server's disk fails to read or write" in response.text
            sync.fails_at = None
            library.recover(jobs.is_known)
            assert changed(before, await stored(client, tmp_path)) == {}, f"sync {num_failed} failed"
            num_failed += 1
    assert num_failed == sync.num_calls > 1
