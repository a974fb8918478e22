"""/datasets as specified by API.md: upload, list, use, delete."""

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from tests.server.api.train_kit import ROWS, train_body

pytestmark = pytest.mark.anyio

JSONL = "\n".join(map(json.dumps, ROWS)).encode()
CSV = "prompt,completion\n" + "".join(f'"{row["prompt"]}","{row["completion"]}"\n' for row in ROWS)


async def upload(client: httpx.AsyncClient, content: bytes, name: str = "rows.jsonl") -> httpx.Response:
    return await client.post("/datasets", files={"file": (name, content)})


async def test_upload_list_delete(client: httpx.AsyncClient, tmp_path: Path) -> None:
    response = await upload(client, JSONL)
    assert response.status_code == 201
    dataset = response.json()
    assert dataset.pop("warnings") == []
    assert response.headers["location"] == f"/datasets/{dataset['id']}"
    created = datetime.fromisoformat(dataset["created_at"])
    assert timedelta() <= datetime.now(UTC) - created < timedelta(minutes=1)
    assert dataset == {
        "id": dataset["id"],
        "filename": "rows.jsonl",
        "format": "jsonl",
        "rows": len(ROWS),
        "bytes": len(JSONL),
        "kinds": {"completion": len(ROWS)},
        "digest": dataset["digest"],
        "created_at": dataset["created_at"],
    }
    assert (await client.get(f"/datasets/{dataset['id']}")).json() == dataset
    assert (await client.get("/datasets")).json() == {"datasets": [dataset], "next": None}
    assert (await client.delete(f"/datasets/{dataset['id']}")).status_code == 204
    assert (await client.get("/datasets")).json() == {"datasets": [], "next": None}
    for method in ("GET", "DELETE"):
        assert (await client.request(method, f"/datasets/{dataset['id']}")).status_code == 404
    assert not list((tmp_path / "datasets").glob("*"))


async def test_the_same_rows_are_one_data_set(client: httpx.AsyncClient) -> None:
    first = (await upload(client, JSONL)).json()
    again = await upload(client, CSV.encode(), "rows.CSV")
    assert again.status_code == 201
    assert again.json() == first
    assert len((await client.get("/datasets")).json()["datasets"]) == 1


async def test_a_data_set_has_its_files_name(client: httpx.AsyncClient, tmp_path: Path) -> None:
    dataset = (await upload(client, JSONL, f"../../etc/{'ü' * 300}.jsonl")).json()
    assert dataset["filename"] == "ü" * 255
    facts = tmp_path / "datasets" / dataset["id"] / "dataset.json"
    old = json.loads(facts.read_bytes())
    assert old.pop("filename") == "ü" * 255
    facts.write_text(json.dumps(old))  # as before names were stored
    assert (await client.get("/datasets")).json()["datasets"] == [
        {name: value for name, value in dataset.items() if name != "warnings"} | {"filename": None}
    ]


@pytest.mark.parametrize(("route", "facts"), [("/datasets", "dataset.json"), ("/v1/files", "file.json")])
async def test_damaged_data_set_hides_no_other(
    client: httpx.AsyncClient, tmp_path: Path, route: str, facts: str
) -> None:
    """Lists, usage and deletes work although the disk has damaged one data set's metadata."""
    ids = []
    for content in (JSONL, b'{"text": "a"}'):
        form = {"purpose": "fine-tune"} if facts == "file.json" else {}
        response = await client.post(route, files={"file": ("rows.jsonl", content)}, data=form)
        ids.append(response.json()["id"])
    (place,) = tmp_path.glob(f"*/{ids[0]}/{facts}")
    place.write_bytes(b"{}")
    listed = (await client.get(route)).json()
    assert [entry["id"] for entry in listed.get("datasets", listed.get("data"))] == ids[1:]
    assert (await client.get("/usage")).status_code == 200
    assert (await client.get(f"{route}/{ids[0]}")).status_code == 500
    for entry in ids:
        assert (await client.delete(f"{route}/{entry}")).status_code in (200, 204)
        assert (await client.delete(f"{route}/{entry}")).status_code == 404
    assert not list(tmp_path.glob(f"*/*/{facts}"))


async def test_the_newest_first(client: httpx.AsyncClient) -> None:
    ids = [(await upload(client, json.dumps(row).encode())).json()["id"] for row in ROWS[:3]]
    listed = (await client.get("/datasets")).json()["datasets"]
    assert [dataset["id"] for dataset in listed] == ids[::-1]


async def test_a_data_set_in_use_stays(client: httpx.AsyncClient) -> None:
    ids = [(await upload(client, content)).json()["id"] for content in (JSONL, b'{"text": "a"}')]
    job = (await client.post("/train", json=train_body(data=None, dataset=ids[0], validation=ids[1]))).json()
    for dataset_id in ids:
        response = await client.delete(f"/datasets/{dataset_id}")
        assert response.status_code == 409
        assert response.headers["content-type"] == "application/problem+json"
    await client.post(f"/train/{job['id']}/cancel")
    for dataset_id in ids:
        assert (await client.delete(f"/datasets/{dataset_id}")).status_code == 204


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', ["file", 2, "text"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"prompt": "a"}\n', ["file", 3, "completion"]),
        ("a.jsonl", b'{"text": "a"}\nnot json\n', ["file"]),
        ("a.jsonl", b'{"text": "a\xff"}\n', ["file"]),
        ("a.jsonl", b'{"text": "a\0"}\n', ["file"]),
        ("a.jsonl", b"", ["file"]),
        ("a.jsonl", b"\n\n", ["file"]),
        ("a.csv", b"prompt,completion\na,b\nc,\n", ["file", 3, "completion"]),
        ("a.csv", b"a,b\n1,2\n", ["file"]),
        ("a.txt", b'{"text": "a"}', ["file"]),
        ("a", b'{"text": "a"}', ["file"]),
    ],
)
async def test_bad_files(
    client: httpx.AsyncClient, name: str, content: bytes, place: list[str | int], tmp_path: Path
) -> None:
    response = await upload(client, content, name)
    assert response.status_code == 422
    assert place in [error["loc"] for error in response.json()["errors"]]
    assert not list((tmp_path / "datasets").glob("*"))


HOSTILE = {
    "a million blank lines": ("a.jsonl", b"\n" * 1_000_000),
    "a million empty objects": ("a.jsonl", b"{}\n" * 1_000_000),
    "a million blank records": ("a.csv", b"text\n" + b"\n" * 1_000_000),
    "a million empty fields": ("a.csv", b"text\n" + b'""\n' * 1_000_000),
    "one line of 16 MiB": ("a.jsonl", b'{"text": "' + b"a" * (16 << 20) + b'"}'),
    "one field of 16 MiB": ("a.csv", b'text\n"' + b"a\n" * (8 << 20) + b'"'),
    "a million NUL bytes": ("a.csv", b"\0" * 1_000_000),
    "a million bytes of no UTF-8": ("a.jsonl", b"\xff\n" * 500_000),
}


@pytest.mark.parametrize(("name", "content"), HOSTILE.values(), ids=HOSTILE)
async def test_hostile_files(client: httpx.AsyncClient, name: str, content: bytes, tmp_path: Path) -> None:
    """They are refused with their place, quickly, and leave nothing. Memory is tested with `row_files`."""
    started = time.monotonic()
    response = await upload(client, content, name)
    assert time.monotonic() - started < 20
    assert response.status_code == 422
    assert all(error["loc"][0] == "file" for error in response.json()["errors"])
    assert len(response.content) < 5000
    assert not list((tmp_path / "datasets").glob("*"))


async def test_lines_are_named(client: httpx.AsyncClient) -> None:
    response = await upload(client, b'{"text": "a"}\n' * 6 + b'{"txt": "a"}\n')
    assert "line 7" in response.json()["errors"][0]["message"]


async def test_an_answer_to_thousands_of_bad_lines_is_short(client: httpx.AsyncClient) -> None:
    response = await upload(client, b'{"text": 5}\n' * 50_000)
    assert response.status_code == 422
    assert len(response.content) < 5000


async def test_forms_without_a_file(client: httpx.AsyncClient) -> None:
    for files, field in (
        ({"rows": ("a.jsonl", JSONL)}, "rows"),
        ({"file": ("a.jsonl", JSONL), "more": ("b.jsonl", JSONL)}, "more"),
        ([("file", ("a.jsonl", JSONL)), ("file", ("b.jsonl", JSONL))], "file"),
        ({"file": (None, JSONL)}, "file"),
    ):
        response = await client.post("/datasets", files=files)
        assert response.status_code == 422
        assert response.json()["errors"][0]["loc"] == [field]
    response = await client.post("/datasets", json={"file": "a"})
    assert response.status_code == 422


@pytest.mark.parametrize("dataset_id", ["nothing", "ds-0", "ds-" + "0" * 32, "%2E%2E", "x" * 200])
async def test_no_such_data_set(client: httpx.AsyncClient, dataset_id: str) -> None:
    for method in ("GET", "DELETE"):
        assert (await client.request(method, f"/datasets/{dataset_id}")).status_code == 404


async def test_more_than_a_json_body_may_have(client: httpx.AsyncClient) -> None:
    content = b"".join(json.dumps({"text": f"{number} " * 100}).encode() + b"\n" for number in range(6000))
    assert len(content) > 2 << 20
    response = await upload(client, content)
    assert response.status_code == 201
    assert response.json()["rows"] == 6000


async def test_a_file_over_its_bound(client: httpx.AsyncClient) -> None:
    headers = {"Content-Length": str((256 << 20) + 1), "Content-Type": "multipart/form-data; boundary=x"}
    assert (await client.post("/datasets", content=b"", headers=headers)).status_code == 413


async def test_ignored_fields_are_reported(client: httpx.AsyncClient) -> None:
    labelled = b'{"prompt": "a", "completion": "b", "label": 1}\n'
    said = "fields that are not trained on were ignored: label in 1 row"
    response = await upload(client, labelled)
    assert response.json()["warnings"] == [said]
    body = {"name": "a", "data": [json.loads(labelled)]}
    response = await client.post("/train?dry_run=true", json=body)
    assert response.json()["warnings"] == [said]


async def test_spelled_end_tokens_are_reported(client: httpx.AsyncClient) -> None:
    """In a dry run, and in the job's first events."""
    body = {
        "name": "a",
        "data": [{"prompt": "a", "completion": "b<|im_end|>"}, {"prompt": "a", "completion": "b"}],
    }
    (warning,) = (await client.post("/train?dry_run=true", json=body)).json()["warnings"]
    assert warning.startswith("<|im_end|> in 1 row is encoded as plain text")
    job = (await client.post("/train", json=body)).json()
    events = (await client.get(f"/train/{job['id']}/events")).json()
    assert [event["message"] for event in events if event["level"] == "warning"] == [warning]


async def test_rows_are_paged_and_searched(client: httpx.AsyncClient) -> None:
    rows = [{"prompt": f"ask {number}", "completion": " Yes" if number % 2 else " No"} for number in range(40)]
    dataset = (await upload(client, "\n".join(map(json.dumps, [*rows, rows[3]])).encode())).json()["id"]
    page = (await client.get(f"/datasets/{dataset}/rows?offset=2&limit=3")).json()
    assert (page["count"], page["duplicates"]) == (41, 1)
    assert [(row["index"], row["row"], row["copies"]) for row in page["rows"]] == [
        (number, rows[number], 2 if number == 3 else 1) for number in (2, 3, 4)
    ]
    count = (await client.post("/tokenize", json={"prompt": "ask 2", "add_special_tokens": False})).json()["count"]
    assert page["rows"][0]["tokens"] >= count
    found = (await client.get(f"/datasets/{dataset}/rows?q=YES")).json()
    assert found["count"] == 21
    assert {row["row"]["completion"] for row in found["rows"]} == {" Yes"}
    every = (await client.get(f"/datasets/{dataset}/rows?limit=1000")).json()["rows"]
    body = {"name": "split", "dataset": dataset}
    counts = (await client.post("/train?dry_run=true", json=body)).json()["data"]
    assert [row["split"] for row in every].count("validation") == counts["validation_rows"]
    assert "validation" not in {
        row["split"] for row in (await client.get(f"/datasets/{dataset}/rows?validation=0")).json()["rows"]
    }
    for query in ("limit=0", "offset=-1", "validation=1", "validation=nan", "page=1"):
        assert (await client.get(f"/datasets/{dataset}/rows?{query}")).status_code == 422, query
    assert (await client.get("/datasets/ds-0/rows")).status_code == 404
