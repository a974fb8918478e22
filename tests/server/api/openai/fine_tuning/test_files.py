"""/v1/files, in the official client's types."""

import httpx
import pytest
from openai.types import FileDeleted, FileObject
from pydantic import TypeAdapter

from server.jobs.leases import Leases
from server.training.files import FileStore
from tests.server.api.train_kit import StandIn

pytestmark = pytest.mark.anyio

CONTENT = b'{"messages": [{"role": "user", "content": "404"}, {"role": "assistant", "content": "Not Found"}]}\n'


async def upload(client: httpx.AsyncClient, content: bytes = CONTENT, name: str = "codes.jsonl") -> FileObject:
    response = await client.post("/v1/files", files={"file": (name, content)}, data={"purpose": "fine-tune"})
    assert response.status_code == 200, response.text
    return TypeAdapter(FileObject).validate_python(response.json())


async def listed(client: httpx.AsyncClient, query: str = "") -> tuple[list[str], bool]:
    page = (await client.get(f"/v1/files?{query}")).json()
    assert page["object"] == "list"
    files = [TypeAdapter(FileObject).validate_python(file) for file in page["data"]]
    ids = [file.id for file in files]
    assert (page["first_id"], page["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))
    return ids, page["has_more"]


async def test_a_files_life(client: httpx.AsyncClient) -> None:
    file = await upload(client)
    assert (file.filename, file.bytes, file.purpose, file.status) == (
        "codes.jsonl",
        len(CONTENT),
        "fine-tune",
        "processed",
    )
    assert (await client.get(f"/v1/files/{file.id}")).json() == file.to_dict()
    content = await client.get(f"/v1/files/{file.id}/content")
    assert (content.content, content.headers["content-length"]) == (CONTENT, str(len(CONTENT)))
    gone = TypeAdapter(FileDeleted).validate_python((await client.delete(f"/v1/files/{file.id}")).json())
    assert (gone.id, gone.deleted, gone.object) == (file.id, True, "file")
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        response = await client.request(method, f"/v1/files/{file.id}{path}")
        assert response.status_code == 404
        assert response.json()["error"]["type"] == "invalid_request_error"


async def test_pages(client: httpx.AsyncClient, files: FileStore) -> None:
    ids = [(await upload(client)).id for _ in range(3)]
    results = files.put_results("job-1", b"step\n").id
    assert await listed(client) == ([results, *ids[::-1]], False)
    assert await listed(client, "limit=2") == ([results, ids[2]], True)
    assert await listed(client, f"limit=2&after={ids[2]}") == ([ids[1], ids[0]], False)
    assert await listed(client, "order=asc&limit=1") == ([ids[0]], True)
    assert await listed(client, f"order=asc&after={ids[1]}") == ([ids[2], results], False)
    assert await listed(client, "purpose=fine-tune-results") == ([results], False)
    assert await listed(client, f"purpose=fine-tune&limit=3&after={results}") == (ids[::-1], False)


@pytest.mark.parametrize(
    ("query", "param"),
    [("after=file-no", "after"), ("limit=0", "limit"), ("order=up", "order"), ("purpose=vision", "purpose")],
)
async def test_bad_pages(client: httpx.AsyncClient, query: str, param: str) -> None:
    response = await client.get(f"/v1/files?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("fields", "content", "param"),
    [
        ({"purpose": "assistants"}, CONTENT, "purpose"),
        ({}, CONTENT, "purpose"),
        ({"purpose": ["fine-tune", "fine-tune"]}, CONTENT, "purpose"),
        ({"purpose": "fine-tune", "expires_after[seconds]": "3600"}, CONTENT, "expires_after[seconds]"),
        ({"purpose": "fine-tune"}, b'{"text": "a"}\n{"messages": 1}\n', "file[2].messages"),
        ({"purpose": "fine-tune"}, b"", "file"),
    ],
)
async def test_bad_uploads(
    client: httpx.AsyncClient, fields: dict[str, str | list[str]], content: bytes, param: str
) -> None:
    response = await client.post("/v1/files", files={"file": ("a.jsonl", content)}, data=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert await listed(client) == ([], False)


async def test_no_file_at_all(client: httpx.AsyncClient) -> None:
    assert (await client.post("/v1/files", json={})).status_code == 400
    sent = await client.post("/v1/files", data={"purpose": "fine-tune"}, files={"other": b"a"})
    assert sent.status_code == 400


async def test_a_job_holds_its_file(client: httpx.AsyncClient, leases: Leases) -> None:
    """A job under /train, which accepts files as well as data sets."""
    file = await upload(client)
    job = await client.post("/train", json={"name": "codes", "dataset": file.id, "validation": 0})
    assert job.status_code == 202, job.text
    assert job.json()["config"]["dataset"] == file.id
    response = await client.delete(f"/v1/files/{file.id}")
    assert (response.status_code, response.headers["x-should-retry"]) == (409, "false")
    StandIn(leases).fail("it is only a test")
    assert (await client.delete(f"/v1/files/{file.id}")).status_code == 200


async def test_the_document_has_the_content_types_that_there_are(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    documented = document["paths"]["/v1/files/{file_id}/content"]["get"]["responses"]["200"]["content"]
    found = set()
    for name, content in (("a.jsonl", b'{"text": "a"}\n'), ("a.csv", b"text\na\n")):
        files = {"file": (name, content)}
        stored = (await client.post("/v1/files", files=files, data={"purpose": "fine-tune"})).json()
        response = await client.get(f"/v1/files/{stored['id']}/content")
        assert response.content == content
        found.add(response.headers["content-type"].partition(";")[0])
    assert found == set(documented)
