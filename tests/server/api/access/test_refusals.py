"""Every refusal is counted by its reason, and its log line has the reason."""

from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI

from adapters.names import Viewpoint
from server.access.principal import OPERATOR, Quota
from server.api.bodies import SMALL_BODY_BYTES, BytesInFlight
from server.api.lanes import Lane, Places, Turns
from server.errors import REASONS, QueueFull
from server.metrics.metrics import Metrics
from tests.server.api.access.key_kit import OPERATORS, access_of, client_with, new_secret
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.fakes import FakeEngine
from tests.server.api.train_kit import ROWS
from tests.server.conftest import MakeServices, client_of, new_app
from tests.server.metrics.test_metrics import samples

pytestmark = pytest.mark.anyio

PROMPT = {"prompt": "a", "max_tokens": 2}
JOB = {"name": "a", "data": ROWS}


async def refusals(app: FastAPI) -> dict[str, float]:
    """Return the counts so far, by reason, of those that aren't 0."""
    metrics: Metrics = app.state.services.metrics
    metrics._keep_until = float("-inf")  # read them now: otherwise they may be MAX_AGE old
    found = samples(metrics).items()
    return {
        dict(labels)["reason"]: value
        for (name, labels), value in found
        if name == "smolora_refused_total" and value
    }


def key(app: FastAPI, **limits: int) -> str:
    return new_secret(app, "acme", quota=Quota().with_limits(limits))


async def test_every_reason_is_counted(
    make_services: MakeServices, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="smolora.api")
    app = new_app(make_services(api_keys=OPERATORS))
    expected = dict.fromkeys(REASONS, 0)

    async def counted(reason: str, response: httpx.Response, status: int) -> None:
        assert response.status_code == status, response.text
        expected[reason] += 1
        assert await refusals(app) == {name: number for name, number in expected.items() if number}
        assert f" refused={reason} " in f"{caplog.records[-1].getMessage()} "

    async with client_with(app, OPERATORS) as client:
        engine.refusal = QueueFull(reason="queue")
        await counted("queue", await client.post("/generate", json=PROMPT), 429)
        engine.refusal = None
        await counted("site", await client.get("/adapters", headers={"Host": "elsewhere.example"}), 403)
        await counted("site", await client.get("/adapters", headers={"Origin": "https://elsewhere.example"}), 403)
    async with client_with(app, new_secret(app, "acme", ["generate"])) as client:
        await counted("scope", await client.post("/train", json=JOB), 403)
        await counted("scope", await client.get("/adapters", headers={"OpenAI-Project": "other"}), 403)
    async with client_with(app, key(app, requests_per_minute=1)) as client:
        assert (await client.post("/generate", json=PROMPT)).status_code == 200
        await counted("requests_per_minute", await client.post("/generate", json=PROMPT), 429)
    async with client_with(app, key(app, tokens_per_minute=1)) as client:
        await counted("tokens_per_minute", await client.post("/generate", json=PROMPT), 429)
    async with client_with(app, key(app, max_jobs=1)) as client:
        assert (await client.post("/train", json=JOB)).status_code == 202
        await counted("max_jobs", await client.post("/train", json=JOB), 429)
    async with client_with(app, key(app, max_bytes=1)) as client:
        await counted("max_bytes", await client.post("/adapters/a", files=as_parts(*peft_files())), 403)
    async with client_with(app, key(app, allow_full=False)) as client:
        await counted("limit", await client.post("/train", json={**JOB, "method": "full"}), 403)
    engine.draining = True
    async with client_with(app, OPERATORS) as client:
        await counted("not_serving", await client.post("/generate", json=PROMPT), 503)
        before = await refusals(app)
        assert (await client.get("/ready")).status_code == 503
        assert await refusals(app) == before, "a probe isn't work"
    assert {name for name, number in expected.items() if not number} == {"disk", "wrong_keys"}, "tested elsewhere"


async def test_full_limits_are_counted_by_their_names(
    make_services: MakeServices, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="smolora.api")
    services = make_services()
    metrics = services.metrics.lanes
    merging = Lane("merging", "merges", Turns(1), 0, metrics=metrics)
    uploads = Places("uploads", 1, name="uploads", metrics=metrics)
    bodies = BytesInFlight(4 * SMALL_BODY_BYTES, metrics)
    app = new_app(
        replace(services, limiters=replace(services.limiters, merging=merging, uploads=uploads, bodies=bodies))
    )
    merge = {"expression": "a+b", "method": "ties"}
    large = {"Content-Type": "application/json"}
    async with client_of(app) as client:
        with merging._places.taken("other"), uploads.taken("other"), bodies.reserving("other") as add:
            add(3 * SMALL_BODY_BYTES)
            for reason, refused in (
                ("merging", await client.post("/compositions/c", json=merge)),
                ("uploads", await client.post("/adapters/a", files=as_parts(*peft_files()))),
                ("bodies", await client.post("/generate", content=b" " * 2 * SMALL_BODY_BYTES, headers=large)),
                ("bodies", await client.post("/v1/decisions", content=b" " * (1 << 20), headers=large)),
            ):
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "5"), reason
    lines = [record.getMessage() for record in caplog.records if " status=429 " in record.getMessage()]
    assert [line.split(" refused=")[1].split()[0] for line in lines] == ["merging", "uploads", "bodies", "bodies"]
    assert await refusals(app) == {"merging": 1, "uploads": 1, "bodies": 2}


async def test_a_full_disk_is_counted(make_services: MakeServices) -> None:
    app = new_app(make_services(min_free_bytes="1000TiB"))
    async with client_of(app) as client:
        assert (await client.post("/train", json=JOB)).status_code == 503
    assert await refusals(app) == {"disk": 1}


async def test_answers_and_faults_of_the_request_are_not_counted(app: FastAPI, client: httpx.AsyncClient) -> None:
    for path, body, status in (("/generate", PROMPT, 200), ("/generate", {}, 422), ("/nowhere", {}, 404)):
        assert (await client.post(path, json=body)).status_code == status
    assert await refusals(app) == {}


async def test_use_of_quotas(app: FastAPI) -> None:
    from server.api.quotas import quota_use

    access = access_of(app)
    access.projects.put("acme", Quota(max_jobs=4, max_bytes=1_000_000), who=OPERATOR)
    access.projects.put("other", Quota(max_jobs=2, requests_per_minute=9), who=OPERATOR)
    access.projects.put("free", Quota(), who=OPERATOR)
    async with client_with(app, new_secret(app, "acme")) as client:
        for _ in range(3):
            assert (await client.post("/train", json=JOB)).status_code == 202
        uploaded = await client.post("/adapters/a", files=as_parts(*peft_files()))
    use = quota_use(app.state.services)
    of_jobs = app.state.services.jobs.of(Viewpoint("acme")).num_bytes()
    stored = uploaded.json()["bytes"] + of_jobs
    assert of_jobs > 0
    assert use.pop(("acme", "max_bytes")) == pytest.approx(stored / 1_000_000)
    assert use == {("acme", "max_jobs"): 0.75, ("other", "max_jobs"): 0}
