"""`smolora cluster up`, `status` and `down`, as a user runs them on one machine."""

import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from server.cluster.node import FILE_NAME
from tests.cluster.conftest import needs_ray
from tests.cluster.kit import CACHES, FLAGS, wait_until
from tests.end_to_end.server_process import PATIENCE, command, environment, free_port

pytestmark = [pytest.mark.cluster, needs_ray]


def ended(*words: str, **flags: object) -> subprocess.CompletedProcess[str]:
    called = [part for part in command(("cluster", *words), **flags) if part != "--workers=0" or words == ("up",)]
    return subprocess.run(called, env=environment(), capture_output=True, text=True, timeout=PATIENCE)


def test_up_status_and_down(tmp_path: Path, long_base: Path) -> None:
    home, port = tmp_path / "home", free_port()
    flags = {"home": home, "port": port, "ray_port": free_port(), "cpus": 8, "model": long_base, **FLAGS, **CACHES}
    with (tmp_path / "log").open("wb") as log:
        up = subprocess.Popen(command(("cluster", "up"), **flags), env=environment(), stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"

        def is_ready() -> bool:
            assert up.poll() is None, (tmp_path / "log").read_text()
            try:
                return httpx.get(f"{url}/ready", trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(is_ready, "it isn't ready", PATIENCE)
        answer = httpx.post(
            f"{url}/generate", json={"prompt": "404", "max_tokens": 4}, trust_env=False, timeout=60
        )
        assert answer.status_code == 200
        assert (home / "serving").stat().st_size > 8, (
            "the replica has said, beside the API process, that it was busy"
        )
        shown = ended("status", home=home).stdout
        assert f"API {url}: ready" in shown
        assert "replicas: 1 running" in shown
        done = ended("down", home=home)
        assert (done.returncode, done.stderr) == (0, "")
        assert up.wait(PATIENCE) == 0
        assert not (home / FILE_NAME).exists()
    finally:
        if up.poll() is None:
            up.send_signal(signal.SIGTERM)
            up.wait(PATIENCE)


def test_cluster_needs_shared_stores(tmp_path: Path) -> None:
    done = ended("up", home=tmp_path, api=2)
    assert done.returncode == 1
    assert "SMOLORA_DATABASE_URL and SMOLORA_BYTES_URL" in done.stderr
    assert "no cluster was started" in ended("status", home=tmp_path).stderr
