"""Named compositions: pinned, flattened, versioned, usable like adapters, and protecting their parts."""

import httpx
import pytest

from adapters.expression import parse
from adapters.library import Library
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.adapters.test_aliases import point, upload, used
from tests.server.api.fakes import FakeEngine

pytestmark = pytest.mark.anyio


async def compose(client: httpx.AsyncClient, name: str, expression: str) -> httpx.Response:
    return await client.post(f"/compositions/{name}", json={"expression": expression})


async def composed(client: httpx.AsyncClient, name: str, expression: str) -> dict[str, object]:
    response = await compose(client, name, expression)
    assert response.status_code == 201, response.text
    version: dict[str, object] = response.json()
    return version


async def test_a_composition_is_listed_with_its_parts(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    (first,), (second, third) = await upload(client, "tweets", 0), await upload(client, "movies", 1, 2)
    response = await compose(client, "mix", "tweets*0.7 + movies@1*-0.3")
    assert response.status_code == 201
    assert response.headers["location"] == "/adapters/mix/1"
    version = response.json()
    parts = [
        {"name": "tweets", "version": 1, "digest": first, "weight": 0.7},
        {"name": "movies", "version": 1, "digest": second, "weight": -0.3},
    ]
    single = (await client.get("/adapters/tweets/1")).json()
    assert version == {
        "name": "mix",
        "version": 1,
        "kind": "composition",
        "digest": version["digest"],
        "parts": parts,
        "rank": 4,
        "alpha": None,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "parameters": 2 * single["parameters"],
        "bytes": 0,
        "base_model": "someone/tiny-llama",
        "base_digest": single["base_digest"],
        "data_digest": None,
        "config": {},
        "metrics": {},
        "verdict": None,
        "parent": "tweets@1*0.7+movies@1*-0.3",
        "job_id": None,
        "created_at": version["created_at"],
        "resident": False,
        "warnings": [],
    }
    assert (await client.get("/adapters/mix/1")).json() == version
    adapter = (await client.get("/adapters/mix")).json()
    assert (await client.get("/adapters?name=mix")).json()["adapters"] == [adapter]
    assert adapter | {"versions": []} == {
        "name": "mix",
        "kind": "composition",
        "latest": 1,
        "visibility": "private",
        "aliases": {},
        "parts": parts,
        "versions": [],
        "resident": False,
    }
    engine.resident = frozenset({first, second})
    assert (await client.get("/adapters/mix/1")).json()["resident"] is True
    engine.resident = frozenset({first, third})
    assert (await client.get("/adapters/mix")).json()["resident"] is False
    kinds = {each["name"]: each["kind"] for each in (await client.get("/adapters")).json()["adapters"]}
    assert kinds == {"mix": "composition", "movies": "adapter", "tweets": "adapter"}


async def test_equal_composition_adds_no_version(client: httpx.AsyncClient) -> None:
    await upload(client, "a", 0)
    await upload(client, "b", 1)
    version = await composed(client, "mix", "a*0.5+b")
    again = await compose(client, "mix", "b + a@1*0.5")
    assert again.status_code == 200
    assert again.json() == version | {"warnings": ["it is the same already: there is no new version"]}
    assert again.headers["location"] == "/adapters/mix/1"
    assert (await composed(client, "mix", "a+b"))["version"] == 2
    assert len((await client.get("/adapters/mix")).json()["versions"]) == 2


async def test_it_is_an_adapters_name_everywhere(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await upload(client, "a", 0)
    await upload(client, "b", 1)
    await composed(client, "mix", "a*0.7+b*0.1")
    await point(client, "mix", "prod", 1)
    await composed(client, "mix", "a*2")
    await point(client, "mix", "latest", 1)

    async def weights(expression: str) -> list[tuple[object, object]]:
        return [(part["name"], part["weight"]) for part in await used(client, expression)]

    assert await weights("mix") == [("a", 0.7), ("b", 0.1)]
    assert await weights("mix@2") == [("a", 2.0)]
    assert await weights("mix@prod*0.1") == [("a", 0.07), ("b", 0.01)]  # in decimals, as written
    assert await weights("b*-1+mix*-2+a") == [("b", -1.0), ("a", -1.4), ("b", -0.2), ("a", 1.0)]
    assert await weights("mix@latest") == await weights("mix")
    await used(client, "mix*0.5+a")
    await used(client, "a@1*1.35+b@1*0.05")
    named, inline = engine.requests[-2:]
    assert named.adapters == inline.adapters
    assert len(named.adapters) == 2


async def test_parts_are_pinned_and_flattened(client: httpx.AsyncClient) -> None:
    (old,) = await upload(client, "a", 0)
    await upload(client, "b", 1)
    await composed(client, "inner", "a*0.5+b")
    await composed(client, "outer", "inner*0.5 + a*0.5 + b*-0.5")
    await upload(client, "a", 2)
    await composed(client, "inner", "b")
    assert await used(client, "outer") == [{"name": "a", "version": 1, "digest": old, "weight": 0.75}]
    again = await composed(client, "outer", "outer*2+a")
    assert again["version"] == 2
    assert again["parent"] == "a@1*1.5+a@2"
    assert (await client.get("/adapters/outer/1")).json()["parent"] == "a@1*0.75"
    assert (await client.get("/adapters/outer")).json()["latest"] == 2


async def test_equal_sums_have_equal_digests(client: httpx.AsyncClient) -> None:
    await upload(client, "a", 0)
    await upload(client, "b", 1)
    await upload(client, "c", 0)
    digests = [
        (await composed(client, f"mix-{i}", text))["digest"]
        for i, text in enumerate(("a*0.3+b", "b+a*0.1+a*0.2", "b+c@1*0.3", "b+c@1*0.31"))
    ]
    assert digests[0] == digests[1] == digests[2] != digests[3]


async def test_compositions_protect_all_their_parts(client: httpx.AsyncClient) -> None:
    await upload(client, "a", 0, 1)
    await upload(client, "b", 2)
    await composed(client, "mix", "a@1+b")
    await composed(client, "mix", "b")
    for path, holders in (("a/1", ["mix@1"]), ("a", ["mix@1"]), ("b", ["mix@1", "mix@2"]), ("b/1", ["mix@1"])):
        for query in ("", "?force=true"):
            refused = await client.delete(f"/adapters/{path}{query}")
            assert refused.status_code == 409
            assert all(holder in refused.json()["detail"] for holder in holders)
    assert (await client.delete("/adapters/a/2")).status_code == 204
    assert (await client.delete("/adapters/mix/1")).status_code == 204
    assert (await client.delete("/adapters/a")).status_code == 204
    assert await used(client, "mix")
    await point(client, "mix", "prod", 2)
    assert (await client.delete("/adapters/mix")).status_code == 409
    assert (await client.delete("/adapters/mix?force=true")).status_code == 204
    assert (await client.delete("/adapters/b")).status_code == 204
    assert (await client.get("/adapters")).json()["adapters"] == []


async def test_adapters_and_compositions_never_share_a_name(client: httpx.AsyncClient) -> None:
    await upload(client, "a", 0)
    await composed(client, "mix", "a")
    refused = await compose(client, "a", "mix")
    assert refused.status_code == 409
    assert "'a'" in refused.json()["detail"]
    refused = await client.post("/adapters/mix", files=as_parts(*peft_files(1)))
    assert refused.status_code == 409
    rows = [{"prompt": "a", "completion": "b"}] * 4
    assert (await client.post("/train", json={"name": "mix", "data": rows})).status_code == 409
    assert [len(each["versions"]) for each in (await client.get("/adapters")).json()["adapters"]] == [1, 1]
    assert (await client.delete("/adapters/mix")).status_code == 204  # the name is free; version numbers continue
    response = await client.post("/adapters/mix", files=as_parts(*peft_files(1)))
    assert (response.status_code, response.json()["version"], response.json()["kind"]) == (201, 2, "adapter")
    assert (await compose(client, "mix", "a")).status_code == 409


@pytest.mark.parametrize(
    ("name", "body", "status", "field"),
    [
        ("mix", {"expression": "a*"}, 422, "expression"),
        ("mix", {"expression": ""}, 422, "expression"),
        ("mix", {"expression": "base"}, 422, "expression"),
        ("mix", {"expression": "a*0"}, 422, "expression"),
        ("mix", {"expression": "a+a*-1"}, 422, "expression"),
        ("mix", {"expression": "a+copy*-1"}, 422, "expression"),
        ("mix", {"expression": "big*11"}, 422, "expression"),
        ("mix", {"expression": "a*1e3"}, 422, "expression"),
        ("mix", {"expression": 1}, 422, "expression"),
        ("mix", {}, 422, "expression"),
        ("mix", {"expression": "a", "unknown": 1}, 422, "unknown"),
        ("base", {"expression": "a"}, 422, "name"),
        ("tiny-llama", {"expression": "a"}, 422, "name"),
        ("-x", {"expression": "a"}, 422, "name"),
        ("mix", {"expression": "nobody+a"}, 404, None),
        ("mix", {"expression": "a@2"}, 404, None),
        ("mix", {"expression": "mix"}, 404, None),
    ],
)
async def test_compositions_that_do_not_go(
    client: httpx.AsyncClient, name: str, body: dict[str, object], status: int, field: str | None
) -> None:
    await upload(client, "a", 0)
    await upload(client, "copy", 0)
    await composed(client, "big", "a*10")
    response = await client.post(f"/compositions/{name}", json=body)
    assert response.status_code == status, response.text
    assert [error["loc"][-1] for error in response.json()["errors"]] == ([field] if field else [])
    assert [each["name"] for each in (await client.get("/adapters")).json()["adapters"]] == ["a", "big", "copy"]


async def test_limit_of_sixteen_adapters_applies_to_the_sum(client: httpx.AsyncClient) -> None:
    for number in range(17):
        await upload(client, f"a{number}", number)
    await composed(client, "ten", "+".join(f"a{number}" for number in range(10)))
    await composed(client, "six", "+".join(f"a{number}" for number in range(10, 16)))
    assert len(await used(client, "ten+six+a15+a0")) == 18  # of sixteen adapters
    for body in ({"adapter": "ten+six+a16"}, {"adapter": "ten*100+six*11+a16"}):
        response = await client.post("/generate", json={"prompt": "a", **body})
        assert response.status_code == 422
        assert [error["loc"] for error in response.json()["errors"]] == [["adapter"]]
    assert (await compose(client, "all", "ten+six+a16")).status_code == 422
    await composed(client, "strong", "a0*100")
    response = await client.post("/generate", json={"prompt": "a", "adapter": "strong*2"})
    assert [error["loc"] for error in response.json()["errors"]] == [["adapter"]]


async def test_a_composition_has_no_weights_to_download_or_to_train_on(client: httpx.AsyncClient) -> None:
    await upload(client, "a", 0)
    await upload(client, "b", 1)
    await composed(client, "mix", "a+b")
    assert (await client.get("/adapters/mix/1/download")).status_code == 409
    rows = [{"prompt": "a", "completion": "b"}] * 4
    for start in ("mix", "mix@1"):
        response = await client.post("/train", json={"name": "n", "data": rows, "start_from": start})
        assert response.status_code == 422
        assert [error["loc"][-1] for error in response.json()["errors"]] == ["start_from"]


async def test_a_running_request_outlives_its_composition(
    client: httpx.AsyncClient, engine: FakeEngine, library: Library
) -> None:
    await upload(client, "a", 0)
    version = await composed(client, "mix", "a*0.5")
    pinned = library.pin(parse("mix"))
    assert (await client.delete("/adapters/mix")).status_code == 204
    assert (await client.delete("/adapters/a")).status_code == 204
    assert library.read(pinned.parts[0].digest).weights.digest == pinned.parts[0].digest
    assert version["parts"] == [
        {"name": "a", "version": 1, "digest": pinned.parts[0].digest, "weight": 0.5},
    ]
    pinned.release()
