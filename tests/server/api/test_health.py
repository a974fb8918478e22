"""/health, /ready, /version, /metrics, and the OpenAPI document."""

import subprocess
from pathlib import Path

import httpx
import pytest

from adapters.errors import InvalidInput, SmoloraError
from server import __version__
from server.errors import EngineDead, GenerationFailed, GenerationTimeout, QueueFull, ReadTooSlowly
from server.metrics.metrics import Outcome
from server.system import version
from tests.server.api.access.key_kit import new_secret
from tests.server.api.fakes import FakeEngine, failing
from tests.server.conftest import COMMIT, MakeServices, client_of, new_app

pytestmark = pytest.mark.anyio


async def test_health_is_about_the_process_alone(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.dead = True
    response = await client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("state", ["dead", "draining", "loading"])
async def test_ready_only_while_it_can_serve(client: httpx.AsyncClient, engine: FakeEngine, state: str) -> None:
    assert (await client.get("/ready")).status_code == 200
    setattr(engine, state, True)
    response = await client.get("/ready")
    assert response.status_code == 503
    assert response.headers["content-type"] == "application/problem+json"
    assert int(response.headers["retry-after"]) >= 1


async def test_ready_lists_what_computes_and_what_was_given_up(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    answer = (await client.get("/ready")).json()
    assert (answer["backends"], answer["fallbacks"]) == (["fake"], ["no CUDA graphs: a reason"])


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_monitors_may_ask_for_the_headers_alone(
    make_services: MakeServices, engine: FakeEngine, path: str
) -> None:
    async with client_of(new_app(make_services(api_keys="secret-0123456789"))) as client:
        assert (await client.head(path)).status_code == 200
        assert "head" not in (await client.get("/openapi.json")).json()["paths"][path]
        engine.draining = True
        assert (await client.head("/ready")).status_code == 503


async def test_metrics_have_the_contracts_names(client: httpx.AsyncClient) -> None:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {line.split()[0] for line in response.text.splitlines() if not line.startswith("#")}
    assert {
        "smolora_requests_running",
        "smolora_requests_waiting",
        "smolora_kv_blocks_used",
        "smolora_adapters_resident",
    } <= names


async def test_metrics_follow_requests(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/generate", json={"prompt": "hi", "max_tokens": 3})
    lines = (await client.get("/metrics")).text.splitlines()
    assert 'smolora_requests_total{outcome="completed"} 1.0' in lines
    assert "smolora_time_to_first_token_seconds_count 1.0" in lines
    assert "smolora_inter_token_seconds_count 2.0" in lines
    assert "smolora_queue_seconds_count 1.0" in lines
    assert 'smolora_adapter_tokens_total{adapter="base"} 3.0' in lines


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (GenerationFailed("a step failed"), "failed"),
        (GenerationTimeout(), "failed"),
        (ReadTooSlowly(), "cancelled"),
        (EngineDead(), "failed"),
        (QueueFull(), "refused"),  # by all replicas that were asked
        (InvalidInput.of("adapter", "these adapters together need more memory"), "invalid"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_client_errors_and_refusals_are_no_failures(
    error: SmoloraError, outcome: Outcome, stream: bool, client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    """SmoloraGenerationsFail counts failures, and a client's mistake must not raise it."""
    engine.script = failing(0, error)
    await client.post("/generate", json={"prompt": "hi", "stream": stream})
    lines = (await client.get("/metrics")).text.splitlines()
    samples = [line for line in lines if line.startswith("smolora_requests_total{") and not line.endswith(" 0.0")]
    assert samples == [f'smolora_requests_total{{outcome="{outcome}"}} 1.0']


async def test_metrics_know_routes_by_their_template(client: httpx.AsyncClient) -> None:
    await client.get("/train/job-1")
    await client.get("/train/job-2")
    await client.get("/train/job-1/nothing")
    for number in range(50):
        await client.get(f"/made-up-{number}")
        await client.request(f"M{number}", "/made-up")
    lines = (await client.get("/metrics")).text.splitlines()
    assert 'smolora_http_requests_total{method="GET",route="/train/{job_id}",status="404"} 2.0' in lines
    assert 'smolora_http_requests_total{method="GET",route="other",status="404"} 51.0' in lines
    assert 'smolora_http_requests_total{method="other",route="other",status="404"} 50.0' in lines
    assert not [line for line in lines if "job-1" in line or "made-up" in line]
    assert 'smolora_http_request_seconds_count{route="/train/{job_id}"} 2.0' in lines


async def test_the_document_knows_every_route_and_problem(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert {
        "/generate",
        "/adapters",
        "/adapters/{name}",
        "/adapters/{name}/{version}",
        "/adapters/{name}/{version}/download",
        "/train",
        "/train/{job_id}",
        "/train/{job_id}/events",
        "/train/{job_id}/cancel",
        "/train/{job_id}/pause",
        "/train/{job_id}/stop",
        "/train/{job_id}/resume",
        "/train/{job_id}/report",
        "/train/{job_id}/download",
        "/datasets",
        "/datasets/{dataset_id}",
        "/health",
        "/ready",
        "/metrics",
    } <= set(document["paths"])
    generate = document["paths"]["/generate"]["post"]
    assert {"200", "401", "403", "404", "408", "409", "413", "415", "422", "429", "503", "504"} == set(
        generate["responses"]
    )
    refused = generate["responses"]["422"]["content"]
    assert set(refused) == {"application/problem+json"}
    assert refused["application/problem+json"]["schema"]["$ref"].endswith("/Problem")
    assert set(generate["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    body = document["components"]["schemas"]["GenerateBody"]
    assert body["examples"]
    assert body["properties"]["n"] == {**body["properties"]["n"], "minimum": 1, "maximum": 16, "default": 1}
    for path in ("/adapters/{name}", "/datasets"):
        assert "multipart/form-data" in document["paths"][path]["post"]["requestBody"]["content"]
    train = document["paths"]["/train"]["post"]
    assert {"200", "202", "401", "403", "404", "408", "409", "413", "415", "422", "429", "503"} == set(
        train["responses"]
    )
    body = document["components"]["schemas"]["TrainBody"]
    assert body["examples"]
    assert body["properties"]["training"]["default"]["max_length"] == 512


async def test_a_scraper_without_a_key_may_bring_an_empty_one(make_services: MakeServices) -> None:
    """Prometheus sends an empty key if its key file is empty; accepted until the first key exists."""
    app = new_app(make_services())
    async with client_of(app) as client:
        for given in ("Bearer", "Bearer "):
            assert (await client.get("/metrics", headers={"Authorization": given})).status_code == 200
        new_secret(app)
        assert (await client.get("/metrics", headers={"Authorization": "Bearer wrong"})).status_code == 401


async def test_the_version_has_its_commit(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": __version__, "commit": COMMIT}


def test_a_checkouts_commit_is_its_head() -> None:
    git = ["git", "-C", str(Path(__file__).parents[3]), "rev-parse", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    assert version.commit() == (done.stdout.strip() or None)


@pytest.mark.parametrize("file", ["c0ffee\n", "", None])
def test_a_wheels_commit_is_in_its_file(file: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one, and without Git's files, the commit isn't known."""
    monkeypatch.setattr(version, "PACKAGE", tmp_path / "server")
    (tmp_path / "server").mkdir()
    if file is not None:
        (tmp_path / "server" / version.FILE).write_text(file)
    assert version.commit() == ((file or "").strip() or None)
