"""A real server and its worker with bytes in an object store: HOME is a disposable cache."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.server_process import ServerProcess, environment
from tests.end_to_end.training_client import code_rows, get, submit, wait_for_end
from tests.kits.buckets import SECRET, Proxy

pytestmark = pytest.mark.cluster
ROWS = b'{"prompt": "200", "completion": "OK"}\n{"prompt": "404", "completion": "Not Found"}\n'
TRAINING = {"max_steps": 3, "batch_size": 2, "max_length": 32, "learning_rate": 0.05}


def start(home: Path, base: Path, url: str) -> ServerProcess:
    return ServerProcess(
        home, model=base, dtype="fp32", workers=1, adapter_cache_bytes="4MiB", bytes_url=url, bytes_cache="64MiB"
    )


def doctor(home: Path, url: str, *more: str) -> str:
    command = [str(Path(sys.executable).with_name("smolora")), "doctor", f"--home={home}", *more]
    settings = environment() | {"SMOLORA_BYTES_URL": url}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_home_is_a_disposable_cache(tmp_path: Path, converted_tiny: Path, bytes_url: str) -> None:
    home = tmp_path / "a"
    server = start(home, converted_tiny, bytes_url)
    try:
        dataset = server.client.post("/datasets", files={"file": ("rows.jsonl", ROWS)}).json()
        file = server.client.post(
            "/v1/files", files={"file": ("rows.jsonl", ROWS)}, data={"purpose": "fine-tune"}
        ).json()
        job_id = submit(server, name="codes", dataset=dataset["id"], training=TRAINING)
        assert wait_for_end(server, job_id)["status"] == "succeeded"
        said = server.text("404", adapter="codes", max_tokens=8)
        assert said != server.text("404", max_tokens=8)
        (version,) = get(server, "/adapters/codes")["versions"]
    finally:
        server.close()
    assert SECRET not in server.log()
    assert "sound: 1 version, 1 stored adapter, 2 uploads checked" in doctor(home, bytes_url)

    for folder in ("adapters", "jobs", "datasets", "files"):
        shutil.rmtree(home / folder)
    server = start(home, converted_tiny, bytes_url)
    try:
        assert server.text("404", adapter="codes", max_tokens=8) == said
        assert get(server, "/datasets")["datasets"][0]["id"] == dataset["id"]
        assert server.client.get(f"/v1/files/{file['id']}/content").content == ROWS
        job_id = submit(server, name="codes", data=code_rows(4), training=TRAINING, start_from="codes")
        assert wait_for_end(server, job_id)["status"] == "succeeded"
    finally:
        server.close()

    other = tmp_path / "b"
    assert "published again from the directories: codes@1, codes@2" in doctor(other, bytes_url, "--rebuild")
    server = start(other, converted_tiny, bytes_url)
    try:
        assert server.text("404", adapter="codes@1", max_tokens=8) == said
        assert get(server, "/adapters/codes")["versions"][0]["digest"] == version["digest"]
        assert server.client.delete("/adapters/codes").status_code == 204
        assert server.client.post("/generate", json={"prompt": "a", "adapter": "codes"}).status_code == 404
    finally:
        server.close()


def test_failing_store_gives_503_then_recovers(
    tmp_path: Path, converted_tiny: Path, bytes_url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    server = start(tmp_path, converted_tiny, bytes_url)
    try:
        assert server.client.post("/datasets", files={"file": ("rows.jsonl", ROWS)}).status_code == 201
        proxy.fail("500")
        for path in ("/datasets", "/v1/files"):
            answer = server.client.get(path)
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5"), answer.text
            assert "the object store can't be reached just now" in answer.text
        assert server.text("404", max_tokens=4)
        proxy.fail("")
        assert len(get(server, "/datasets")["datasets"]) == 1
    finally:
        server.close()


def test_read_only_store_is_reported_at_startup(tmp_path: Path, converted_tiny: Path, aws: str) -> None:
    with pytest.raises(RuntimeError, match="SMOLORA_BYTES_URL: can't write there") as caught:
        start(tmp_path, converted_tiny, "s3://no-such-bucket/x").close()
    assert SECRET not in str(caught.value)
