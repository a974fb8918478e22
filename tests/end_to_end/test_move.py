"""A HOME filled by a real server is moved into a cluster and back: all lists are equal, and a paused job
continues."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from server.model.base.source import resolve_base
from server.model.base.weights import load_base
from tests.end_to_end.server_process import PATIENCE, ServerProcess, environment
from tests.end_to_end.training_client import code_rows, get, submit, succeeded, wait_until
from tests.kits.postgres import CLUSTER, Postgres
from tests.kits.tiny import save_tiny_base
from tests.server.api.adapters.peft_files import as_parts, peft_files

pytestmark = [*CLUSTER, pytest.mark.slow]
ROWS = b'{"prompt": "200", "completion": "OK"}\n{"prompt": "404", "completion": "Not Found"}\n'
SHORT = {"max_steps": 3, "batch_size": 2, "max_length": 32, "learning_rate": 0.05}
LONG = {"max_steps": 200, "batch_size": 4, "max_length": 48, "checkpoint_steps": 3, "eval_steps": 100}
EXPRESSIONS = [None, "codes", "a@1", "a@prod*0.5", "a@1*0.7+codes", "mix"]
LISTED = (
    "/adapters", "/adapters/a", "/adapters/codes", "/adapters/mix", "/datasets", "/v1/files", "/train", "/keys",
    "/projects", "/audit", "/usage",
)  # fmt: skip


def smolora(*arguments: str | Path, code: int = 0, settings: Mapping[str, str] = {}) -> str:
    """Run a command; return what it prints, on stderr if it fails."""
    program = Path(sys.executable).with_name("smolora")
    env = environment() | {f"SMOLORA_{name}": value for name, value in settings.items()}
    done = subprocess.run(
        [program, *arguments], env=env, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def answers(server: ServerProcess) -> list[Any]:
    """Return greedy texts with log-probabilities, to compare bitwise."""
    found = []
    for expression in EXPRESSIONS:
        adapter = {} if expression is None else {"adapter": expression}
        (choice,) = server.generate("HTTP 404:", max_tokens=8, logprobs=2, **adapter)["choices"]
        found.append(choice)
    return found


def listed(server: ServerProcess, job_ids: list[str]) -> dict[str, Any]:
    """Return the lists of everything stored, and the usage before these requests."""
    paths = [*LISTED, *(f"/train/{job_id}{what}" for job_id in job_ids for what in ("", "/events"))]
    found = {path: get(server, path) for path in paths}
    for key in found["/keys"]["keys"]:
        key.pop("last_used_at")
    return found


def test_moving_to_a_cluster_and_back(tmp_path: Path, postgres: Postgres, bytes_url: str) -> None:
    base = save_tiny_base(tmp_path / "tiny")
    flags: dict[str, Any] = {"model": base, "dtype": "fp32", "adapter_cache_bytes": "4MiB"}
    first, back, url = tmp_path / "first", tmp_path / "back", postgres.url(postgres.new())
    cluster = {"DATABASE_URL": url, "BYTES_URL": bytes_url}
    key = smolora("keys", "create", "operator", "--scopes=admin,generate,train,metrics", "--home", first).strip()
    acme = smolora("keys", "create", "theirs", "--project=acme", "--home", first).strip()
    server = ServerProcess(first, key, **flags, workers=1)
    try:
        expected, jobs, dataset = fill(server, base, acme)
        said = answers(server)
        assert len({json.dumps(choice["logprobs"]) for choice in said}) == len(said), "each is another adapter's"
        assert "is served already" in smolora("move", "to-cluster", "--home", first, code=1, settings=cluster)
    finally:
        stop(server)
    before = listed_by(ServerProcess(first, key, **flags), jobs)

    moved = json.loads(smolora("move", "to-cluster", "--home", first, "--json", settings=cluster))
    assert (moved["num_adapters"], moved["num_jobs"], moved["num_unended_jobs"], moved["going_on"]) == (
        3,
        3,
        1,
        [],
    )
    assert "isn't empty, it has" in smolora("move", "to-cluster", "--home", first, code=1, settings=cluster)
    shared = {**flags, "database_url": url, "bytes_url": bytes_url}
    server = ServerProcess(tmp_path / "api", key, **shared)
    try:
        assert same(listed(server, jobs), before)
        assert answers(server) == said
        assert "stop all of them first" in smolora("move", "to-home", "--home", back, code=1, settings=cluster)
        assert not back.exists()
    finally:
        stop(server)
    before = listed_by(ServerProcess(tmp_path / "api", key, **shared), jobs)  # with the usage of the answers there

    moved = json.loads(smolora("move", "to-home", "--home", back, "--json", settings=cluster))
    assert (moved["num_adapters"], moved["num_jobs"], moved["num_unended_jobs"]) == (3, 3, 1)
    assert "isn't empty" in smolora("move", "to-home", "--home", back, code=1, settings=cluster)
    assert "sound: " in smolora("doctor", "--home", back)
    for place, more in ((back, {}), (tmp_path / "api-2", {"database_url": url, "bytes_url": bytes_url})):
        server = ServerProcess(place, key, **flags, **more, workers=1)
        try:
            assert same(listed(server, jobs), before)
            assert answers(server) == said
            assert server.client.post(f"/train/{jobs[-1]}/resume").status_code == 200
            assert succeeded(server, jobs[-1])["adapter"]["digest"] == expected
            steps = [e["data"]["step"] for e in get(server, f"/train/{jobs[-1]}/events") if e["type"] == "metrics"]
            assert steps == list(range(1, len(steps) + 1)), "no gap, and none twice"
            theirs = {"Authorization": f"Bearer {acme}"}
            assert server.client.get("/adapters/own", headers=theirs).status_code == 200
            assert len(server.client.get("/datasets", headers=theirs).json()["datasets"]) == 1
            job_id = submit(server, name="codes", dataset=dataset, training=SHORT, start_from="codes")
            assert succeeded(server, job_id)["adapter"]["version"] == 2, "numbers go on"
        finally:
            server.close()


def stop(server: ServerProcess) -> None:
    """Stop the server as an operator does, so that usage is stored."""
    server.terminate()
    server.exit_code()
    server.close()


def listed_by(server: ServerProcess, job_ids: list[str]) -> dict[str, Any]:
    """Return `listed` by a server that is then stopped."""
    try:
        return listed(server, job_ids)
    finally:
        server.close()


def fill(server: ServerProcess, base: Path, acme: str) -> tuple[str, list[str], str]:
    """Make adapters, uploads and jobs of two projects. Return the paused job's expected result, the jobs' ids, and
    a data set's id."""
    dataset = server.client.post("/datasets", files={"file": ("rows.jsonl", ROWS)}).json()["id"]
    purpose = {"purpose": "fine-tune"}
    assert server.client.post("/v1/files", files={"file": ("r.jsonl", ROWS)}, data=purpose).status_code == 200
    training = submit(server, name="codes", dataset=dataset, training=SHORT)
    succeeded(server, training)
    shape = load_base(resolve_base(str(base), server.home)).config.shape
    for _ in range(2):
        assert server.client.post("/adapters/a", files=as_parts(*peft_files(1, shape=shape))).status_code == 201
    assert server.client.put("/adapters/a/aliases/prod", json={"version": 2}).status_code == 200
    assert server.client.post("/compositions/mix", json={"expression": "codes*0.5+a@1*0.6"}).status_code == 201
    theirs = {"Authorization": f"Bearer {acme}"}
    parts = as_parts(*peft_files(2, shape=shape))
    assert server.client.post("/adapters/own", files=parts, headers=theirs).status_code == 201
    rows = {"file": ("theirs.jsonl", b'{"text": "theirs"}\n')}
    assert server.client.post("/datasets", files=rows, headers=theirs).status_code == 201

    whole = submit(server, name="whole", data=code_rows(), training=LONG, validation=0.2)
    expected = succeeded(server, whole)["adapter"]["digest"]
    assert server.client.delete("/adapters/whole").status_code == 204
    paused = submit(server, name="paused", data=code_rows(), training=LONG, validation=0.2)
    wait_until(lambda: get(server, f"/train/{paused}")["progress"]["step"] >= 4)
    assert server.client.post(f"/train/{paused}/pause").status_code in (200, 202)
    wait_until(lambda: bool(get(server, f"/train/{paused}")["status"] == "paused"))
    return expected, [training, whole, paused], dataset


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Raise AssertionError with the differences if the two aren't equal; else return True."""
    for path, answer in expected.items():
        assert found[path] == answer, path
    return True
