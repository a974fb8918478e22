"""A backup of a real server under load, and its restore: bitwise equal answers."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.conftest import AdapterFiles
from tests.end_to_end.server_process import PATIENCE, ServerProcess, environment
from tests.end_to_end.training_client import code_rows, get, submit, succeeded, wait_until

pytestmark = [pytest.mark.real, pytest.mark.thorough]
"""tests/server/operations tests each part on its own homes, and docker/check tests all of it in containers."""

PROMPT = "Once upon a time, in a village"
"""Shorter than a block, so that no answer depends on earlier ones, to the last bit."""
EXPRESSIONS = [None, "kept@1", "kept@2", "kept@prod*0.5", "kept@1*0.7+other", "loud"]
JOB = {"max_steps": 40, "batch_size": 4, "max_length": 32, "checkpoint_steps": 2, "eval_steps": 16}


def smolora(*arguments: str | Path) -> str:
    """Run a command that must succeed; return what it prints."""
    program = Path(sys.executable).with_name("smolora")
    done = subprocess.run(
        [program, *arguments], env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def answers(server: ServerProcess) -> list[Any]:
    """Return greedy texts with log-probabilities, of the base and of the permanent adapters."""
    found = []
    for expression in EXPRESSIONS:
        adapter = {} if expression is None else {"adapter": expression}
        (choice,) = server.generate(PROMPT, max_tokens=12, logprobs=2, **adapter)["choices"]
        found.append(choice)
    assert len({json.dumps(choice["logprobs"]) for choice in found}) == len(found), "each is another adapter's"
    return found


class Load:
    """Answers, publications and deletions without end; and their counts."""

    def __init__(self, server: ServerProcess, adapter: Path) -> None:
        self.counts = {"answered": 0, "published": 0, "deleted": 0}
        self.errors: list[str] = []
        self._server, self._adapter = server, adapter
        self._is_over = threading.Event()
        # One of three clients is always being answered: if there were pauses between requests, the job would
        # continue.
        self._threads = [threading.Thread(target=run) for run in (*[self._ask] * 3, self._publish)]

    def _ask(self) -> None:
        with self._client() as client:
            while not self._is_over.is_set():
                body = {"prompt": PROMPT, "max_tokens": 8, "adapter": "kept"}
                self._count("answered", client.post("/generate", json=body), 200)

    def _publish(self) -> None:
        files = {path.stem: (path.name, path.read_bytes()) for path in self._adapter.glob("adapter_*")}
        with self._client() as client:
            while not self._is_over.is_set():
                self._count("published", client.post("/adapters/passing", files=files), 201)
                rows = {"file": ("rows.jsonl", b'{"text": "%d"}\n' % self.counts["published"])}
                dataset = client.post("/datasets", files=rows)
                self._count("deleted", client.delete(f"/datasets/{dataset.json()['id']}"), 204)
                self._count("deleted", client.delete("/adapters/passing"), 204)

    def _count(self, what: str, response: httpx.Response, expected: int) -> None:
        if response.status_code == expected:
            self.counts[what] += 1
        else:
            self.errors.append(response.text)

    def _client(self) -> httpx.Client:
        return httpx.Client(base_url=self._server.url, timeout=PATIENCE, trust_env=False)

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            for thread in self._threads:
                thread.join()


def test_restored_server_gives_the_same_answers(
    base_dir: Path, adapter_files: AdapterFiles, tmp_path: Path
) -> None:
    """The server answers, publishes, deletes and trains during the backup; after the restore the job continues."""
    # Requests have priority: the job lasts as long as they do, however slow the machine is.
    first = ServerProcess(tmp_path / "home", base_dir=base_dir.parent, workers=1, train_share=0.05)
    files = [tmp_path / "backups" / name for name in ("a.tar", "b.tar.gz")]
    files[0].parent.mkdir()
    try:
        for seed in (51, 52):
            first.upload("kept", adapter_files.make(seed))
        first.upload("other", adapter_files.make(53, rank=16, alpha=32, modules=["q_proj", "o_proj", "up_proj"]))
        assert first.client.put("/adapters/kept/aliases/prod", json={"version": 1}).status_code == 200
        blend = {"expression": "kept@2*0.5+other*0.6"}
        assert first.client.post("/compositions/loud", json=blend).status_code == 201
        expected = answers(first)
        job_id = submit(first, name="codes", data=code_rows(16), training=JOB, validation=0.2)
        checkpoints = tmp_path / "home" / "jobs" / job_id / "checkpoints"
        wait_until(lambda: checkpoints.is_dir() and any(path.name[0] != "." for path in checkpoints.iterdir()))
        load = Load(first, adapter_files.make(54))
        with load.running():
            for file in files:
                smolora("backup", file, "--home", first.home)
        assert load.errors == []
        assert all(load.counts.values()), load.counts
        assert sorted(path.name for path in files[0].parent.iterdir()) == sorted(file.name for file in files)
        trained = succeeded(first, job_id, 600)["adapter"]
    finally:
        first.close()
    for file in files:
        again = tmp_path / f"home-of-{file.name}"
        restored = json.loads(smolora("restore", file, "--home", again, "--json"))
        assert restored["is_sound"]
        assert "sound: " in smolora("doctor", "--home", again)
    assert restored["going_on"] == [job_id], "it was still running when the last backup was made"
    second = ServerProcess(again, base_dir=base_dir.parent, workers=1, train_share=1.0)
    try:
        assert answers(second) == expected
        job = succeeded(second, job_id, 600)
        assert job["adapter"] == trained, "the job's bytes are those of the one that nobody disturbed"
        messages = [event["message"] for event in get(second, f"/train/{job_id}/events")]
        assert "restored from a backup, in which a worker had it" in messages
        steps = [e["data"]["step"] for e in get(second, f"/train/{job_id}/events") if e["type"] == "metrics"]
        assert steps == list(range(1, len(steps) + 1)), "no gap, and none twice"
        assert second.client.get("/adapters/passing").status_code in (200, 404)
        assert answers(second) == expected
    finally:
        second.close()
    assert "sound: " in smolora("doctor", "--home", again)
