"""A HOME whose adapters were made on one base, served with another: a warning, or 409 if shapes differ."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from adapters.catalog.catalog import Catalog
from adapters.catalog.records import Records
from adapters.library import Library
from adapters.lora import BaseShape
from adapters.store.store import AdapterStore
from server.api.submission import Submissions
from server.jobs.jobs import Jobs
from server.model.text.chat import PromptEncoder
from server.training.datasets import DatasetStore
from server.training.encoding import RowEncoder
from server.training.files import FileStore, RowSources
from tests.kits.tiny import save_tiny_base, tiny_tokenizer
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.fakes import FakeEngine
from tests.server.api.train_kit import ROWS
from tests.server.conftest import BASE_DIGEST, BASE_NAME, MAX_POSITIONS, SHAPE, MakeServices, client_of, new_app
from tests.server.running import running

pytestmark = pytest.mark.anyio

OTHER_DIGEST = "0b" * 32
WIDER = BaseShape(2, {**SHAPE.features, "up_proj": (32, 16)})
DEEPER = BaseShape(3, SHAPE.features)
SHALLOWER = BaseShape(1, SHAPE.features)

Serve = Callable[..., httpx.AsyncClient]


@pytest.fixture
def serve(
    make_services: MakeServices,
    database: sa.Engine,
    store: AdapterStore,
    jobs: Jobs,
    datasets: DatasetStore,
    files: FileStore,
    encoder: PromptEncoder,
    tmp_path: Path,
) -> Serve:
    """Return a client of a server on the same HOME, with a base of this name, weights and shapes."""

    def start(name: str = BASE_NAME, digest: str = BASE_DIGEST, shape: BaseShape = SHAPE) -> httpx.AsyncClient:
        catalog = Catalog(database, Records(tmp_path / "adapters"))
        library = Library(catalog, store, shape, name, jobs.in_use, digest)
        rows = RowEncoder(encoder, tiny_tokenizer().eos_token_id)
        sources = RowSources(datasets, files)
        submissions = Submissions(tmp_path, jobs, sources, library, rows, MAX_POSITIONS, digest, 1)
        services = replace(make_services(), library=library, base_name=name, submissions=submissions)
        return client_of(new_app(services))

    return start


async def publish(client: httpx.AsyncClient, name: str, seed: int = 0, base: str | None = BASE_NAME) -> None:
    response = await client.post(f"/adapters/{name}", files=as_parts(*peft_files(seed, base_model=base)))
    assert response.status_code == 201, response.text


async def generate(client: httpx.AsyncClient, adapter: str, **fields: object) -> httpx.Response:
    return await client.post("/generate", json={"prompt": "Hi", "max_tokens": 1, "adapter": adapter, **fields})


async def warnings_of(client: httpx.AsyncClient, adapter: str) -> list[str]:
    response = await generate(client, adapter)
    assert response.status_code == 200, response.text
    warnings: list[str] = response.json()["warnings"]
    return warnings


async def test_no_warning_as_a_rule(serve: Serve) -> None:
    client = serve()
    await publish(client, "a")
    assert await warnings_of(client, "a") == []
    assert await warnings_of(client, "base") == []
    assert (await client.get("/adapters/a/1")).json()["warnings"] == []
    chat = {"model": "a", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert "x-smolora-warning" not in (await client.post("/v1/chat/completions", json=chat)).headers


async def test_different_base_is_reported_everywhere(serve: Serve) -> None:
    await publish(serve(), "a")
    await publish(serve(), "b", seed=1)
    client = serve("other-llama", OTHER_DIGEST)
    for listed in (
        (await client.get("/adapters/a/1")).json(),
        (await client.get("/adapters/a")).json()["versions"][0],
        (await client.get("/adapters")).json()["adapters"][0]["versions"][0],
        (await client.put("/adapters/a/aliases/prod", json={"version": 1})).json()["versions"][0],
    ):
        (text,) = listed["warnings"]
        assert BASE_DIGEST[:12] in text
        assert OTHER_DIGEST[:12] in text
        assert "other-llama" in text
    assert await warnings_of(client, "a") == [f"a@1: {text}"]
    assert await warnings_of(client, "a@prod*0.5+a@1*0.1") == [f"a@1: {text}"], "one for each version"
    assert await warnings_of(client, "b*0.5+a") == [f"b@1: {text}", f"a@1: {text}"]

    await publish(client, "a", seed=2, base="other-llama")
    assert await warnings_of(client, "a") == [], "a new version, made for this base"

    compared = await client.post("/compare", json={"prompt": "Hi", "max_tokens": 1, "adapters": ["base", "a@1"]})
    assert [result["warnings"] for result in compared.json()["results"]] == [[], [f"a@1: {text}"]]

    streamed = await generate(client, "a@1", stream=True, n=2)
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    last = [event for event in events if "finish_reason" in event]
    assert [event["warnings"] for event in last] == [[f"a@1: {text}"]] * 2


async def test_composition_of_parts_from_another_base(serve: Serve) -> None:
    await publish(serve(), "a")
    await serve().post("/compositions/early", json={"expression": "a*0.5"})
    client = serve("other-llama", OTHER_DIGEST)
    await publish(client, "b", seed=1, base="other-llama")
    mixed = (await client.post("/compositions/late", json={"expression": "a*0.5+b"})).json()
    ((text,),) = [listed["warnings"] for listed in (await client.get("/adapters/a")).json()["versions"]]
    assert await warnings_of(client, "early") == [f"a@1: {text}"]
    assert await warnings_of(client, "late") == [f"a@1: {text}"]
    assert (await client.get("/adapters/early/1")).json()["warnings"] == [text]
    assert mixed["warnings"] == (await client.get("/adapters/late/1")).json()["warnings"]
    assert "different bases" in mixed["warnings"][0]


@pytest.mark.parametrize(
    ("call", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("completions", {"prompt": ["Hi", "Ho"]}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_openai_clients_find_it_in_a_header(
    serve: Serve, call: str, body: dict[str, object], stream: bool
) -> None:
    await publish(serve(), "a", base="Grüße/someone's")
    await publish(serve(), "b", seed=1)
    client = serve("other-llama", OTHER_DIGEST)
    call_body = {"model": "a*0.5+b", "max_tokens": 1, "stream": stream, **body}
    response = await client.post(f"/v1/{call}", json=call_body)
    assert response.status_code == 200, response.text
    found = response.headers.get_list("x-smolora-warning")
    assert [line.partition(":")[0] for line in found] == ["a@1", "a@1", "b@1"]
    assert "Gr\\xfc\\xdfe" in found[0]
    assert OTHER_DIGEST[:12] in found[2]
    assert "warning" not in response.text


async def test_headers_are_bounded(serve: Serve) -> None:
    long = "é" * 900
    for number in range(9):
        await publish(serve(), f"a{number}", seed=number, base=f"{long}{number}")
    body = {"model": "+".join(f"a{number}*0.1" for number in range(9)), "prompt": "Hi", "max_tokens": 1}
    response = await serve().post("/v1/completions", json=body)
    found = response.headers.get_list("x-smolora-warning")
    assert len(found) == 8
    assert [line[:4] for line in found[:7]] == [f"a{number}@1" for number in range(7)]
    assert found[7].startswith("and 2 more")
    assert all(len(line) <= 400 for line in found)


async def test_no_header_ends_in_a_blank(serve: Serve) -> None:
    """HTTP headers can't end in a blank: the answer would be cut off."""
    for number in range(5):  # one of these is cut at a blank
        await publish(serve(), f"a{number}", seed=number, base="a" * number + "é " * 99 + "b")
    body = {"model": "+".join(f"a{number}*0.1" for number in range(5)), "prompt": "Hi", "max_tokens": 1}
    found = (await serve().post("/v1/completions", json=body)).headers.get_list("x-smolora-warning")
    assert sorted(map(len, found)) == [399, 400, 400, 400, 400]
    assert [line for line in found if line != line.strip()] == []


async def test_base_named_by_an_upload_is_compared(serve: Serve) -> None:
    client = serve()
    await publish(client, "a", base="someone/other")
    (listed,) = (await client.get("/adapters/a/1")).json()["warnings"]
    assert "someone/other" in listed
    assert await warnings_of(client, "a") == [f"a@1: {listed}"]


async def test_versions_without_a_digest_are_identified_by_name(serve: Serve, database: sa.Engine) -> None:
    await publish(serve(), "a")
    await publish(serve(), "b", seed=1, base="someone/else")
    with database.begin() as connection:
        connection.execute(sa.text("UPDATE adapter_versions SET base_digest = NULL"))
    assert await warnings_of(serve(), "a") == []
    (text,) = await warnings_of(serve(), "b")
    assert "someone/else" in text
    assert await warnings_of(serve("tiny-llama", OTHER_DIGEST), "a") == [], "nothing says otherwise"
    (text,) = await warnings_of(serve("other-llama", OTHER_DIGEST), "a")
    assert "tiny-llama" in text
    assert "other-llama" in text


@pytest.mark.parametrize("shape", [WIDER, DEEPER, SHALLOWER])
@pytest.mark.parametrize("adapter", ["a", "b*0.5+a@1*0.1", "mix"])
async def test_other_shapes_are_a_conflict(
    serve: Serve, engine: FakeEngine, shape: BaseShape, adapter: str
) -> None:
    await publish(serve(), "a")
    await serve().post("/compositions/mix", json={"expression": "a*0.5"})
    client = serve("other-llama", OTHER_DIGEST, shape)
    fitting = peft_files(1, base_model="other-llama", shape=shape)
    assert (await client.post("/adapters/b", files=as_parts(*fitting))).status_code == 201
    assert await warnings_of(client, "b") == []
    del engine.requests[:]

    row = {"name": "c", "data": ROWS}
    chat = {"model": adapter, "messages": [{"role": "user", "content": "Hi"}]}
    refused = [
        await generate(client, adapter),
        await generate(client, adapter, stream=True),
        await client.post("/compare", json={"prompt": "Hi", "adapters": ["base", adapter]}),
        await client.post("/compositions/m", json={"expression": adapter}),
        await client.post("/compositions/m", json={"expression": adapter, "method": "ties"}),
    ]
    if adapter == "a":
        gate = {"data": ROWS, "validation": 0.1, "publish_if": "improves_latest"}
        refused.append(await client.post("/train", json={"name": "a", **gate}))
        assert (await client.post("/train", json={"name": "b", **gate})).status_code == 202
        assert (await client.post("/train", json={"name": "new", **gate})).status_code == 202
    if "+" not in adapter:
        refused += [
            await client.post("/train", json={**row, "start_from": adapter}),
            await client.post("/train?dry_run=true", json={**row, "start_from": adapter}),
        ]
    for response in refused:
        assert response.status_code == 409, response.text
        assert response.headers["content-type"] == "application/problem+json"
        assert "a@1" in response.json()["detail"]
        assert "b@1" not in response.json()["detail"]
        assert "other-llama" in response.json()["detail"]
    for call, body in (("chat/completions", chat), ("completions", {"model": adapter, "prompt": "Hi"})):
        response = await client.post(f"/v1/{call}", json=body)
        assert response.status_code == 409
        assert "a@1" in response.json()["error"]["message"]
    assert not any(request.adapters for request in engine.requests), "the engine never saw it"
    assert (await client.get("/adapters/m")).status_code == 404

    for path in ("/adapters", "/adapters/a", "/adapters/a/1", "/adapters/a/1/download", "/v1/models/a"):
        assert (await client.get(path)).status_code == 200, "it is still there"
    assert (await client.delete("/adapters/a?force=true")).status_code == 409
    assert (await client.delete("/adapters/mix")).status_code == 204
    assert (await client.delete("/adapters/a")).status_code == 204


async def test_training_from_another_bases_adapter_warns(serve: Serve, jobs: Jobs) -> None:
    await publish(serve(), "a")
    client = serve("other-llama", OTHER_DIGEST)
    ((text,),) = [version["warnings"] for version in (await client.get("/adapters/a")).json()["versions"]]
    body = {"name": "c", "data": ROWS, "start_from": "a"}
    warnings = (await client.post("/train?dry_run=true", json=body)).json()["warnings"]
    assert warnings[0] == f"a@1: {text}"
    assert all("facts" in warning for warning in warnings[1:]), "the rows are short and distinct"
    for response in (
        await client.post("/train", json=body),
        await client.post("/compositions/m", json={"expression": "a", "method": "ties"}),
    ):
        assert response.status_code == 202, response.text
        events = jobs.events(response.json()["id"])
        assert [(event.level, event.message) for event in events] == [
            ("info", "queued"),
            ("warning", f"a@1: {text}"),
        ]


async def test_a_real_server_with_another_base(tmp_path: Path) -> None:
    """The same HOME with three bases: the adapter's, one of equal shapes, and one of others."""
    first = save_tiny_base(tmp_path / "first", seed=0)
    second = save_tiny_base(tmp_path / "second", seed=1)
    third = save_tiny_base(tmp_path / "third", options={"hidden_size": 32, "intermediate_size": 64})
    home = tmp_path / "home"
    body = {"prompt": "HTTP 404", "adapter": "a", "max_tokens": 2, "temperature": 0}
    with running(home, first) as server, httpx.Client(base_url=server.url) as client:
        shape = server.services.library.shape
        files = as_parts(*peft_files(base_model="first", shape=shape))
        assert client.post("/adapters/a", files=files).status_code == 201
        assert client.post("/generate", json=body).json()["warnings"] == []
    with running(home, second) as server, httpx.Client(base_url=server.url) as client:
        answer = client.post("/generate", json=body).json()
        assert answer["choices"][0]["text"] is not None
        (text,) = answer["warnings"]
        assert text.startswith("a@1: ")
    with running(home, third) as server, httpx.Client(base_url=server.url) as client:
        assert client.post("/generate", json=body).status_code == 409
        assert client.post("/generate", json={**body, "adapter": None}).status_code == 200
