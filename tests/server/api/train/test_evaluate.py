"""POST /evaluate and its job: what is refused, what is stored, and the findings."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.library import Library
from adapters.store.store import AdapterStore
from server.decisions.questions import parse_question
from server.jobs.evaluation_data import EvaluationData
from server.jobs.leases import Leases
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.train_kit import ROWS, StandIn, submit
from tests.server.conftest import MAX_POSITIONS

pytestmark = pytest.mark.anyio

TEAM: dict[str, Any] = {"type": "choice", "instructions": "", "choices": [{"value": "a"}, {"value": "b"}]}
DECISIONS = [{"input": f"Ticket {number}", "answer": "ab"[number % 2]} for number in range(6)]
RESULT = {"adapter": "base", "dataset": "ds", "metric": "loss", "value": 2.0, "low": 1.5, "high": 2.5, "n": 9}
DIFFERENCE = {"dataset": "ds", "metric": "exact_match", "from": "base", "to": "up", "difference": 0.5}
DIFFERENCE |= {"low": 0.1, "high": 0.9, "gained": 3, "lost": 1}
FLIP = {"dataset": "ds", "metric": "accuracy", "row": 4, "from": "base", "to": "up", "answers": ["a", True]}
REPORT: dict[str, Any] = {
    "kind": "evaluate",
    "results": [RESULT],
    "differences": [DIFFERENCE],
    "flips": [{**FLIP, "gained": True}],
}


async def dataset(client: httpx.AsyncClient, rows: Sequence[Mapping[str, object]] = ROWS) -> str:
    content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    response = await client.post("/datasets", files={"file": ("rows.jsonl", content)})
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


@pytest.fixture
async def up(client: httpx.AsyncClient) -> dict[str, Any]:
    """Publish an adapter, and return its version."""
    response = await client.post("/adapters/up", files=as_parts(*peft_files()))
    document: dict[str, Any] = response.json()
    return document


async def evaluation(client: httpx.AsyncClient, **fields: object) -> dict[str, Any]:
    body = {"adapters": ["base"], **fields}
    if "datasets" not in body:
        body["datasets"] = [await dataset(client)]
    response = await client.post("/evaluate", json=body)
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    assert response.headers["location"] == f"/evaluate/{job['id']}"
    return job


async def warnings(client: httpx.AsyncClient, job_id: str) -> list[str]:
    events = (await client.get(f"/train/{job_id}/events")).json()
    return [event["message"] for event in events if event["level"] == "warning"]


async def test_job_pins_its_adapters_and_rows(
    client: httpx.AsyncClient, up: dict[str, Any], tmp_path: Path
) -> None:
    of_rows = await dataset(client)
    job = await evaluation(client, adapters=["base", "up", "up@1*0.5+up*0.25"], datasets=[of_rows], limit=15)
    part = {"name": "up", "version": 1, "digest": up["digest"]}
    assert (job["status"], job["position"], job["progress"]) == ("queued", 1, {"step": 0, "total_steps": 3})
    assert job["config"] == {
        "adapters": [
            {"adapter": "base", "parts": []},
            {"adapter": "up", "parts": [{**part, "weight": 1.0}]},
            {"adapter": "up@1*0.5+up*0.25", "parts": [{**part, "weight": 0.5}, {**part, "weight": 0.25}]},
        ],
        "datasets": [of_rows],
        "metrics": ["loss", "token_accuracy", "exact_match"],
        "limit": 15,
    }
    assert (job["results"], job["differences"], job["flips"]) == (None, None, None)
    stored = EvaluationData.load(tmp_path / "jobs" / job["id"])
    assert [row.number for row in stored.rows] == list(range(15))
    assert list(stored.examples.sources) == list(range(15))
    assert (await client.get(f"/evaluate/{job['id']}")).json() == job
    for path in ("/adapters/up/1", "/adapters/up", f"/datasets/{of_rows}"):
        assert (await client.delete(path)).status_code == 409
    cancelled = await client.post(f"/evaluate/{job['id']}/cancel")
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert not (tmp_path / "jobs" / job["id"] / "data.json").exists()
    assert (await client.post(f"/evaluate/{job['id']}/cancel")).status_code == 409
    assert (await client.delete("/adapters/up")).status_code == 204
    assert (await client.delete(f"/datasets/{of_rows}")).status_code == 204


async def test_findings_are_in_the_finished_job(client: httpx.AsyncClient, leases: Leases) -> None:
    job = await evaluation(client)
    assert (await client.delete(f"/evaluate/{job['id']}")).status_code == 409
    StandIn(leases).succeed(REPORT)
    ended = (await client.get(f"/evaluate/{job['id']}")).json()
    assert ended["status"] == "succeeded"
    assert {name: ended[name] for name in ("results", "differences", "flips")} == {
        name: REPORT[name] for name in ("results", "differences", "flips")
    }
    assert (await client.delete(f"/evaluate/{job['id']}")).status_code == 204
    later = (await client.get(f"/evaluate/{job['id']}")).json()
    assert later.pop("files_removed_at") is not None
    kept = {name: value for name, value in ended.items() if name != "files_removed_at"}
    assert later == {**kept, "flips": []}  # only their number was bounded, not their size
    unpaired = {name: value for name, value in DIFFERENCE.items() if name not in ("gained", "lost")}
    other = await evaluation(client, limit=3)
    few = {
        "results": [{**RESULT, "low": None, "high": None}],
        "differences": [{**unpaired, "low": None, "high": None}],
    }
    StandIn(leases).succeed({**REPORT, **few})
    ended = (await client.get(f"/evaluate/{other['id']}")).json()
    assert {name: ended[name] for name in few} == few


async def test_evaluations_and_other_jobs_are_listed_apart(client: httpx.AsyncClient) -> None:
    of_rows = await dataset(client)
    jobs = [(await evaluation(client, datasets=[of_rows], limit=n))["id"] for n in (1, 2, 3)]
    trained = await submit(client)
    assert [job["id"] for job in (await client.get("/train")).json()["jobs"]] == [trained]
    listed = (await client.get("/evaluate?limit=2")).json()
    assert [job["id"] for job in listed["evaluations"]] == [jobs[2], jobs[1]]
    assert "results" not in listed["evaluations"][0]
    rest = (await client.get(f"/evaluate?after={listed['next']}")).json()
    assert ([job["id"] for job in rest["evaluations"]], rest["next"]) == ([jobs[0]], None)
    for method, path in (("GET", ""), ("POST", "/cancel"), ("DELETE", "")):
        refused = await client.request(method, f"/evaluate/{trained}{path}")
        assert (refused.status_code, refused.json()["detail"]) == (
            404,
            f"there is no evaluation {trained}: GET /evaluate lists them",
        )
    refused = await client.get(f"/evaluate?after={trained}")
    assert refused.status_code == 422
    general = (await client.get(f"/train/{jobs[0]}")).json()  # pauses, resumes and events are every job's
    assert (general["kind"], general["data"], general["progress"]["total_steps"]) == ("evaluate", None, 1)
    assert (await client.post(f"/train/{jobs[0]}/pause")).json()["status"] == "paused"
    assert (await client.get("/evaluate?status=paused")).json()["evaluations"][0]["id"] == jobs[0]


async def test_equal_rows_count_once(client: httpx.AsyncClient, tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[1], ROWS[0], ROWS[2], ROWS[3]]
    job = await evaluation(client, datasets=[await dataset(client, rows)], limit=3)
    stored = EvaluationData.load(tmp_path / "jobs" / job["id"])
    assert [row.number for row in stored.rows] == [0, 1, 3]


async def test_rows_longer_than_the_context(client: httpx.AsyncClient, tmp_path: Path) -> None:
    long = "word " * MAX_POSITIONS
    rows: list[dict[str, object]] = [
        *ROWS[:2],
        {"prompt": long, "completion": "b"},
        {"prompt": "a", "completion": long},
        {"text": long},
    ]
    job = await evaluation(client, datasets=[of_rows := await dataset(client, rows)])
    stored = EvaluationData.load(tmp_path / "jobs" / job["id"])
    assert [row.reference is not None for row in stored.rows] == [True, True, False, False, False]
    assert set(stored.examples.sources) == {0, 1, 3, 4}
    assert max(stored.examples.lengths) == MAX_POSITIONS
    limit = f"the base's context ({MAX_POSITIONS} tokens)"
    found = await warnings(client, job["id"])
    assert [text.partition(":")[0] for text in found] == [of_rows] * 3
    for verb, text in zip(("cut", "dropped", "longer"), found, strict=True):
        assert f"1 row {verb}" in text
        assert limit in text
    response = await client.post(
        "/evaluate", json={"adapters": ["base"], "datasets": [await dataset(client, rows[2:3])]}
    )
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"][-1] == "datasets"
    assert "item 0: each row is longer than the base's context" in response.json()["detail"]


async def test_questions_of_the_body(client: httpx.AsyncClient, tmp_path: Path) -> None:
    of_rows = await dataset(client, DECISIONS)
    refused = await client.post("/evaluate", json={"adapters": ["base"], "datasets": [of_rows]})
    assert refused.status_code == 422
    assert "datasets.0.0.question: is missing" in refused.json()["detail"]
    job = await evaluation(client, datasets=[of_rows], questions={"team": TEAM})
    stored = EvaluationData.load(tmp_path / "jobs" / job["id"])
    digest = parse_question(TEAM).digest
    assert stored.values == {digest: ("a", "b")}
    assert [row.asked and row.asked.answer for row in stored.rows] == [0, 1] * 3
    assert job["config"]["metrics"] == ["loss", "token_accuracy", "exact_match", "accuracy", "brier"]


async def test_questions_of_the_adapters(client: httpx.AsyncClient, library: Library, tmp_path: Path) -> None:
    """Two versions with different questions of a name need the body's, unless each row has its own."""
    await client.post("/adapters/up", files=as_parts(*peft_files()))
    uploaded = library.catalog.version("up", 1)
    other = {**TEAM, "instructions": "Which team?"}
    for name, asked in (("first", TEAM), ("second", other)):
        shared = {key: getattr(uploaded, key) for key in ("digest", "bytes", "rank", "alpha", "parameters")}
        shared["target_modules"] = uploaded.target_modules
        temperatures = {parse_question(asked).digest: 2.0}
        decisions = {"format": 1, "questions": {"team": {**asked, "name": "team"}}, "temperatures": temperatures}
        library.catalog.publish(name, **shared, config={"decisions": decisions})
    of_rows = await dataset(client, DECISIONS)
    job = await evaluation(client, adapters=["base", "first", "first*0.5"], datasets=[of_rows])
    stored = EvaluationData.load(tmp_path / "jobs" / job["id"])
    assert stored.temperatures == [{}, {parse_question(TEAM).digest: 2.0}, {}]
    body = {"adapters": ["first", "second"], "datasets": [of_rows]}
    refused = await client.post("/evaluate", json=body)
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["loc"] == ["questions"]
    assert "the adapters store different questions named team" in refused.json()["detail"]
    await evaluation(client, **body, questions={"team": TEAM})
    own = [{**row, "question": TEAM} for row in DECISIONS]
    await evaluation(client, adapters=["first", "second"], datasets=[await dataset(client, own)])


@pytest.mark.parametrize(
    ("fields", "status", "field", "fault"),
    [
        ({"adapters": []}, 422, "adapters", "must not be empty"),
        ({"adapters": [f"a{n}" for n in range(17)]}, 422, "adapters", "at most 16"),
        ({"adapters": ["base", "nobody"]}, 404, None, "no such adapter: nobody"),
        ({"adapters": ["base", "up*"]}, 422, "adapters", "item 1: at character 4: expected a weight"),
        ({"adapters": ["base", "base"]}, 422, "adapters", "names base 2 times: name it once"),
        ({"datasets": ["ds-" + "0" * 32]}, 404, None, "datasets: item 0: no data set has this id"),
        ({"datasets": []}, 422, "datasets", "must not be empty"),
        ({"metrics": []}, 422, "metrics", "must not be empty"),
        ({"metrics": ["bleu"]}, 422, None, "must be 'loss'"),
        (
            {"metrics": ["loss", "brier"]},
            422,
            "metrics",
            "metrics that fit: loss, token_accuracy, exact_match",
        ),
        ({"limit": 0}, 422, "limit", "at least 1"),
        ({"limit": 1001}, 422, "limit", "at most 1000"),
        ({"limits": 5}, 422, "limits", "did you mean limit?"),
    ],
)
async def test_bad_fields_are_named(
    client: httpx.AsyncClient,
    up: dict[str, Any],
    fields: Mapping[str, object],
    status: int,
    field: str | None,
    fault: str,
) -> None:
    body = {"adapters": ["base"], "datasets": [await dataset(client)], **fields}
    response = await client.post("/evaluate", json=body)
    assert response.status_code == status, response.text
    assert fault in response.json()["detail"]
    if field is not None:
        assert field in response.json()["errors"][0]["loc"]
    assert (await client.get("/evaluate")).json()["evaluations"] == []


CODE = {"type": "object", "properties": {"code": {"type": "integer"}}, "required": ["code"]}


async def test_rows_with_a_schema_are_measured_by_it(client: httpx.AsyncClient, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "404"}, {"role": "assistant", "content": '{"code": 404}'}]
    rows: list[dict[str, object]] = [
        {"prompt": "200", "completion": '{"code": 200}', "schema": CODE},
        {"messages": turns, "schema": CODE},
        {"prompt": "200", "completion": '{"code": 200}'},
        {"prompt": "word " * MAX_POSITIONS, "completion": "{}", "schema": CODE},
    ]
    job = await evaluation(client, datasets=[await dataset(client, rows)])
    assert job["config"]["metrics"] == ["loss", "token_accuracy", "exact_match", "json_valid"]
    stored = EvaluationData.load(tmp_path / "jobs" / job["id"])
    assert [row.schema and json.loads(row.schema) for row in stored.rows] == [CODE, CODE, None, None]
    body = {"adapters": ["base"], "datasets": [await dataset(client, rows[2:3])], "metrics": ["json_valid"]}
    refused = await client.post("/evaluate", json=body)
    assert refused.status_code == 422
    assert "metrics that fit: loss, token_accuracy, exact_match" in refused.json()["detail"]


async def test_a_bad_schema_is_refused_where_rows_come_in(client: httpx.AsyncClient) -> None:
    rows = [ROWS[0], {"prompt": "a", "completion": "{}", "schema": {"type": "invoice"}}]
    content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    uploaded = await client.post("/datasets", files={"file": ("rows.jsonl", content)})
    submitted = await client.post("/train", json={"name": "codes", "data": rows})
    for response, loc in ((uploaded, ["file", 2, "schema"]), (submitted, ["data", 1, "schema"])):
        assert response.status_code == 422, response.text
        (error,) = response.json()["errors"]
        assert error["loc"][-3:] == loc
        assert "isn't a valid JSON Schema" in error["message"]


async def test_exact_match_fits_no_texts(client: httpx.AsyncClient) -> None:
    of_texts = await dataset(client, [{"text": "a b"}])
    body = {"adapters": ["base"], "datasets": [await dataset(client), of_texts], "metrics": ["exact_match"]}
    response = await client.post("/evaluate", json=body)
    assert response.status_code == 422
    assert f"item 0: exact_match fits no row of {of_texts}" in response.json()["detail"]
    assert (await evaluation(client, datasets=[of_texts]))["config"]["metrics"] == ["loss", "token_accuracy"]


async def test_a_large_rank_is_refused(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    await client.post("/adapters/up", files=as_parts(*peft_files()))
    await client.post("/adapters/other", files=as_parts(*peft_files(1)))
    monkeypatch.setattr("server.api.evaluate_submission.MAX_MEASURED_RANK", 3)
    of_rows = await dataset(client)
    await evaluation(client, adapters=["up"], datasets=[of_rows])
    body = {"adapters": ["base", "up*0.5+other"], "datasets": [of_rows]}
    response = await client.post("/evaluate", json=body)
    assert response.status_code == 422
    assert "item 1: its adapters have rank 4 together, and may have 3" in response.json()["detail"]


async def test_repeated_request_is_the_same_job(client: httpx.AsyncClient) -> None:
    body = {"adapters": ["base"], "datasets": [await dataset(client)]}
    headers = {"Idempotency-Key": "k"}
    first, again = [await client.post("/evaluate", json=body, headers=headers) for _ in range(2)]
    assert first.json()["id"] == again.json()["id"]
    other = await client.post("/evaluate", json={**body, "limit": 3}, headers=headers)
    assert other.status_code == 422
    assert other.json()["errors"][0]["loc"][-1] == "Idempotency-Key"


async def test_deleted_public_adapter_keeps_its_bytes(
    client: httpx.AsyncClient, up: dict[str, Any], store: AdapterStore
) -> None:
    """Another project's job needs them, but can't stop the owner from deleting the name."""
    await client.put("/adapters/up/visibility", json={"visibility": "public"})
    mine = (await client.post("/keys", json={"name": "m", "scopes": ["admin"]})).json()
    client.headers["Authorization"] = f"Bearer {mine['secret']}"
    theirs = (await client.post("/keys", json={"name": "k", "project": "acme", "scopes": ["train"]})).json()
    client.headers["Authorization"] = f"Bearer {theirs['secret']}"
    job = await evaluation(client, adapters=["default/up"])
    client.headers["Authorization"] = f"Bearer {mine['secret']}"
    assert (await client.delete("/adapters/up")).status_code == 204
    store.verify(up["digest"])
    assert (await client.get(f"/evaluate/{job['id']}")).json()["status"] == "queued"


async def test_a_blend_is_stored_with_its_evaluation(
    client: httpx.AsyncClient, leases: Leases, up: dict[str, Any]
) -> None:
    job = await evaluation(client, adapters=["base", "up*0.5"])
    body = {"expression": "up@1*0.5", "evaluation": job["id"]}
    early = await client.post("/compositions/half", json=body)
    assert (early.status_code, early.json()["errors"][0]["loc"]) == (422, ["evaluation"])
    StandIn(leases).succeed({**REPORT, "results": [RESULT, {**RESULT, "adapter": "up*0.5", "value": 1.5}]})
    for wrong in (
        {**body, "expression": "up*0.25"},
        {**body, "evaluation": "job-nothing"},
        {**body, "method": "svd"},
    ):
        refused = await client.post("/compositions/half", json=wrong)
        assert (refused.status_code, refused.json()["errors"][0]["loc"]) == (422, ["evaluation"])
    made = await client.post("/compositions/half", json=body)
    assert made.status_code == 201, made.text
    stored = {"id": job["id"], "results": [{**RESULT, "adapter": "up*0.5", "value": 1.5}]}
    assert made.json()["config"] == {"evaluation": stored}
    assert (await client.get("/adapters/half/1")).json()["config"] == {"evaluation": stored}
