"""An upgrade from an earlier commit, as docs/operations.md says: keys, adapters and running jobs go on."""

import io
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.server_process import PATIENCE, ServerProcess, command, environment, free_port
from tests.end_to_end.training_client import code_rows, get, succeeded, wait_until
from tests.kits.native import lend_native

ROOT = Path(__file__).parents[2]
BEFORE = "2609a352"
"""A commit that wrote homes in use. Git has it unless the checkout is shallow."""
PROMPT = "HTTP 404:"
JOB = {"max_steps": 60, "batch_size": 4, "max_length": 32, "checkpoint_steps": 5, "learning_rate": 1e-3}

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the earlier code."""
    archive = ["git", "-C", str(ROOT), "archive", BEFORE, "server", "adapters"]
    done = subprocess.run(archive, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"Git has no {BEFORE} here: {done.stderr.decode()}")
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


@contextmanager
def earlier_server(
    code: Path, home: Path, model: Path
) -> Iterator[tuple["subprocess.Popen[bytes]", httpx.Client]]:
    """Serve HOME with the earlier code; yield its process and a client."""
    port = free_port()
    words = command(home=home, port=port, model=model, workers=1)
    own = environment() | {"PYTHONPATH": str(code)}
    with (home / "earlier.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", *words[1:]], env=own, cwd=code, stdout=log, stderr=log
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False) as client:

            def is_ready() -> bool:
                assert process.poll() is None, (home / "earlier.log").read_text()
                try:
                    return client.get("/ready").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(is_ready, what="the earlier server")
            yield process, client
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_upgrade_keeps_keys_adapters_and_running_jobs(
    how: str, earlier: Path, converted_tiny: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    lend_native(home)
    with earlier_server(earlier, home, converted_tiny) as (process, old):
        operator = old.post("/keys", json={"name": "operator", "scopes": ["admin"]}).json()["secret"]
        old.headers["Authorization"] = f"Bearer {operator}"
        limits = {"requests_per_minute": 500, "max_jobs": 5, "max_bytes": 1 << 30}
        tenant = old.post("/keys", json={"name": "ci", "project": "acme", **limits}).json()["secret"]
        body = {"name": "done", "data": code_rows(12), "training": {**JOB, "max_steps": 4}}
        done = old.post("/train", json=body).json()["id"]
        wait_until(lambda: old.get(f"/train/{done}").json()["status"] == "succeeded", what="the first job")
        asked = {"adapter": "done@1", "temperature": 0, "max_tokens": 8}
        answer = old.post("/generate", json={"prompt": PROMPT, **asked}).json()["choices"][0]["text"]
        old.put("/adapters/done/aliases/prod", json={"version": 1})
        queued = {"name": "long", "data": code_rows(12), "training": {**JOB, "max_steps": 4000}}
        running = old.post("/train", json=queued, headers={"Idempotency-Key": "once"}).json()["id"]
        wait_until(lambda: old.get(f"/train/{running}").json()["progress"]["step"] > 10, what="the long job")
        keys = old.get("/keys").json()["keys"]
        step = int(old.get(f"/train/{running}").json()["progress"]["step"])
        process.send_signal(getattr(signal, how))
        process.wait(PATIENCE)
    new = ServerProcess(home, operator, model=converted_tiny, workers=1)
    try:
        assert new.text(PROMPT, **asked) == answer
        assert get(new, "/adapters/done")["aliases"] == {"prod": 1}
        unchanged = ("id", "name", "project", "scopes", "created_at", *limits)
        of = [{name: key[name] for name in unchanged} for key in get(new, "/keys")["keys"]]
        assert of == [{name: key[name] for name in unchanged} for key in keys]
        with httpx.Client(
            base_url=new.url, headers={"Authorization": f"Bearer {tenant}"}, trust_env=False
        ) as acme:
            assert acme.get("/adapters").json()["adapters"] == []
            assert acme.post("/generate", json={"prompt": "a", "max_tokens": 1}).status_code == 200
            assert acme.get("/keys").status_code == 403
        again = new.client.post("/train", json=queued, headers={"Idempotency-Key": "once"})
        assert again.json()["id"] == running
        steps: list[int] = []

        def is_further() -> bool:
            steps.append(get(new, f"/train/{running}")["progress"]["step"])
            return steps[-1] > step

        wait_until(is_further, what="the long job")
        assert min(steps) >= step - 2 * JOB["checkpoint_steps"], "it goes on from its checkpoint"
        assert new.client.post(f"/train/{running}/cancel").status_code == 200
        assert get(new, f"/train/{done}/report")["adapter"]
        training = {**JOB, "max_steps": 4}
        own = {
            "name": "done",
            "start_from": "done@1",
            "data": code_rows(12),
            "training": training,
            "alias": "latest",  # whichever is better
        }
        succeeded(new, str(new.client.post("/train", json=own).json()["id"]))
        assert get(new, "/adapters/done")["latest"] == 2
    finally:
        new.close()
    smolora = [str(Path(sys.executable).with_name("smolora")), "doctor", "--home", str(home)]
    checked = subprocess.run(smolora, env=environment(), capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "sound" in checked.stdout
    assert os.path.exists(home / "keyed")
