"""Downloads: a zip of known length, streamed from the files with little memory."""

import asyncio
import io
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from adapters.store.store import AdapterStore
from server.api.zips import LARGEST, StoredZip
from server.jobs.files import JobFiles
from server.jobs.leases import Leases
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.fakes import http_scope, until
from tests.server.api.train_kit import StandIn, submit

pytestmark = pytest.mark.anyio

MIB = 1 << 20
PATTERN = bytes(range(256)) * 4096  # 1 MiB


class Reader:
    """A client of a download, over bare ASGI, that reads a piece when told to."""

    def __init__(self, app: FastAPI, path: str) -> None:
        self.start: Message | None = None
        self.num_bytes = 0
        self.content = b""
        self.keeps = True
        self.go_on = asyncio.Event()
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        scope = http_scope("GET", path, [])
        self.task = asyncio.ensure_future(app(scope, self._inbox.get, self._send))

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            return
        body = message.get("body", b"")
        self.num_bytes += len(body)
        if self.keeps:
            self.content += body
        await self.go_on.wait()

    @property
    def length(self) -> int:
        assert self.start is not None
        return int(dict(self.start["headers"])[b"content-length"])

    def hang_up(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})


def zip_of(*contents: bytes) -> StoredZip:
    return StoredZip({f"{number}.bin": io.BytesIO(content) for number, content in enumerate(contents)})


@pytest.mark.parametrize("contents", [(), (b"",), (b"a", b""), (PATTERN * 3 + b"x", b"y" * 70_000)])
def test_a_zip_as_python_reads_it(contents: tuple[bytes, ...]) -> None:
    archive = zip_of(*contents)
    made = b"".join(archive.chunks())
    assert len(made) == archive.length
    with zipfile.ZipFile(io.BytesIO(made)) as found:
        assert found.testzip() is None
        assert [found.read(name) for name in found.namelist()] == list(contents)
        for info in found.infolist():
            assert (info.compress_type, info.external_attr >> 16) == (zipfile.ZIP_STORED, 0o644)
            assert info.date_time == (1980, 1, 1, 0, 0, 0), "equal files make equal zips"
            assert info.flag_bits & 0x8 == 0, "sizes are in front of what they are of: any reader can stream it"
    assert b"".join(zip_of(*contents).chunks()) == made


def test_a_zip_as_another_program_reads_it(tmp_path: Path) -> None:
    """Java and old readers don't support sizes after stored data. `jar` and `unzip` aren't always installed; this
    reader is."""
    path = tmp_path / "a.zip"
    path.write_bytes(b"".join(zip_of(PATTERN, b"more").chunks()))
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(path), str(out)], check=True)
    assert [(out / name).read_bytes() for name in ("0.bin", "1.bin")] == [PATTERN, b"more"]


class Sparse(io.BytesIO):
    """A file with a size but without contents."""

    def __init__(self, size: int) -> None:
        self._size = size

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._size if whence == 2 else offset


@pytest.mark.parametrize(
    ("size", "more"),
    [
        (LARGEST - 36, 0),  # the list begins at 4,294,967,294
        (LARGEST - 35, 56 + 20),  # here it needs the zip64 end record
        (LARGEST - 1, 56 + 20),
        (LARGEST, 56 + 20 + 20 + 20),  # the file's size exceeds both of its fields too
        (LARGEST + 1, 56 + 20 + 20 + 20),
    ],
)
def test_the_length_of_more_than_four_gigabytes(size: int, more: int) -> None:
    """By APPNOTE.TXT: 30 bytes and the name before a file, 46 and the name in the list, 22 at the end."""
    assert StoredZip({"a.bin": Sparse(size)}).length == (30 + 5) + size + (46 + 5) + 22 + more


@pytest.mark.parametrize("largest", [1, 40, 100, 1000, MIB, 2 * MIB])
def test_the_zip64_format_as_python_reads_it(largest: int) -> None:
    contents = (PATTERN, b"small", PATTERN + b"x")
    files = {f"{number}.bin": io.BytesIO(content) for number, content in enumerate(contents)}
    archive = StoredZip(files, largest)
    made = b"".join(archive.chunks())
    assert len(made) == archive.length
    with zipfile.ZipFile(io.BytesIO(made)) as found:
        assert found.testzip() is None
        assert tuple(found.read(name) for name in found.namelist()) == contents


async def big_adapter(client: httpx.AsyncClient) -> tuple[str, int]:
    """Publish an adapter of some 20 MB; return its download path, and the size of its files."""
    config, weights = peft_files(rank=40_000)
    posted = await client.post("/adapters/big", files=as_parts(config, weights))
    assert posted.status_code == 201, posted.text
    return "/adapters/big/1/download", len(weights)


async def big_model(client: httpx.AsyncClient, leases: Leases, home: Path) -> tuple[str, int]:
    job_id = await submit(client, method="full")
    worker = StandIn(leases)
    model = JobFiles(home).model(job_id)
    model.mkdir()
    (model / "model.safetensors").write_bytes(PATTERN * 24)
    (model / "config.json").write_bytes(b"{}")
    worker.succeed()
    return f"/train/{job_id}/download", 24 * MIB


@pytest.mark.parametrize("kind", ["adapter", "model"])
async def test_a_download_takes_little_memory(
    app: FastAPI, client: httpx.AsyncClient, leases: Leases, tmp_path: Path, kind: str
) -> None:
    path, size = await (big_adapter(client) if kind == "adapter" else big_model(client, leases, tmp_path))
    assert size > 20 * MIB
    tracemalloc.start()
    try:
        reader = Reader(app, path)
        reader.keeps = False
        reader.go_on.set()
        await asyncio.wait_for(reader.task, 60)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reader.num_bytes == reader.length > size
    assert peak < 6 * MIB


@pytest.mark.parametrize("leaves", [False, True])
async def test_its_bytes_outlive_a_delete(
    app: FastAPI, client: httpx.AsyncClient, store: AdapterStore, leaves: bool
) -> None:
    path, _ = await big_adapter(client)
    whole = (await client.get(path)).content
    before = _open_files()
    reader = Reader(app, path)
    await until(lambda: reader.num_bytes > 0)
    assert reader.num_bytes < len(whole) / 4
    assert (await client.delete("/adapters/big")).status_code == 204
    assert (await client.get(path)).status_code == 404
    if leaves:
        reader.hang_up()
    else:
        reader.go_on.set()
    await asyncio.wait_for(reader.task, 60)
    assert leaves or reader.content == whole
    assert store.digests() == [], "nothing keeps it any longer"
    assert _open_files() == before


def _open_files() -> list[str]:
    """Return the stored files that this process has open."""
    links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    found = []
    for link in links:
        try:
            target = str(link.readlink())
        except FileNotFoundError:  # the handle that listed them
            continue
        if "safetensors" in target or "adapter_config" in target:
            found.append(target)
    return sorted(found)


async def test_equal_adapters_make_equal_zips(client: httpx.AsyncClient) -> None:
    for name in ("a", "b"):
        await client.post(f"/adapters/{name}", files=as_parts(*peft_files()))
    first, second = [(await client.get(f"/adapters/{name}/1/download")).content for name in ("a", "b")]
    assert first == second


@pytest.mark.parametrize("lost", ["adapter_config.json", "adapter_model.safetensors"])
async def test_bytes_that_vanished_are_an_error_and_not_half_a_zip(
    client: httpx.AsyncClient, tmp_path: Path, lost: str
) -> None:
    digest = (await client.post("/adapters/a", files=as_parts(*peft_files()))).json()["digest"]
    before = _open_files()
    (tmp_path / "adapters" / digest[:2] / digest / lost).unlink()
    response = await client.get("/adapters/a/1/download")
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert _open_files() == before


async def test_bytes_that_the_disk_changed_are_an_error(client: httpx.AsyncClient, tmp_path: Path) -> None:
    digest = (await client.post("/adapters/a", files=as_parts(*peft_files()))).json()["digest"]
    before = _open_files()
    weights = tmp_path / "adapters" / digest[:2] / digest / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    response = await client.get("/adapters/a/1/download")
    assert response.status_code == 500
    assert response.json()["detail"] == f"the stored adapter {digest[:12]} no longer matches its digest"
    assert _open_files() == before


def test_a_file_that_shrinks_cuts_the_answer_off() -> None:
    file = io.BytesIO(PATTERN * 2)
    archive = StoredZip({"a": file})
    sent: list[bytes] = []

    def send() -> None:
        for piece in archive.chunks():
            sent.append(piece)
            if len(b"".join(sent)) > 1000:
                file.truncate(MIB)

    with pytest.raises(OSError, match="shorter"):
        send()
    assert MIB <= len(b"".join(sent)) < archive.length
