"""`smolora cluster up`, `status` and `down`, as a user runs them on one machine."""

import os
import re
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.cluster.node import FILE_NAME, read_state
from tests.cluster.conftest import needs_ray
from tests.cluster.kit import CACHES, FLAGS, SIZES, TITLE, wait_until
from tests.cluster.machines import is_ready
from tests.end_to_end.server_process import PATIENCE, command, environment, free_port
from tests.kits.tiny import save_tiny_base

pytestmark = [pytest.mark.cluster, needs_ray]


def ended(*words: str, **flags: object) -> subprocess.CompletedProcess[str]:
    called = [part for part in command(("cluster", *words), **flags) if part != "--workers=0" or words == ("up",)]
    return subprocess.run(called, env=environment(), capture_output=True, text=True, timeout=PATIENCE)


def unprotected_metrics(ray: psutil.Process) -> set[int]:
    """Return the ports on which Ray's processes answer /metrics without a token."""
    found = set()
    for process in ray.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("tcp"):
                port = connection.laddr.port
                with suppress(httpx.HTTPError):
                    if (
                        connection.status == psutil.CONN_LISTEN
                        and httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).status_code == 200
                    ):
                        found.add(port)
    return found


def test_up_status_and_down(tmp_path: Path, long_base: Path) -> None:
    home, port = tmp_path / "home", free_port()
    flags = {"home": home, "port": port, "ray_port": free_port(), "cpus": 8, "model": long_base, **FLAGS, **CACHES}
    flags["workers"] = 1
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

        wait_until(is_ready, "it isn't ready", 3 * PATIENCE)
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
        assert str(home / "ray.log") in shown
        assert unprotected_metrics(psutil.Process(read_state(home).ray_pid)) <= {44217, 44227}
        assert ", Ray's head): 8 cores for replicas\n" in shown
        (line,) = [line for line in shown.splitlines() if line.startswith("  replica ")]
        found = re.fullmatch(r"  replica \w+: running, process (\d+), log (/\S+)", line)
        assert found is not None, line
        assert kin(psutil.Process(read_state(home).ray_pid), TITLE) == {int(found[1])}
        assert Path(found[2]).stat().st_mode & 0o077 == 0
        worker = rf"^worker on {re.escape(socket.gethostname())}, process \d+, since .* UTC: idle$"
        assert re.search(worker, shown, re.MULTILINE), shown
        done = ended("down", home=home)
        assert done.returncode == 0
        assert "all machines' engine replicas stop" in done.stderr
        assert up.wait(PATIENCE) == 0
        assert not (home / FILE_NAME).exists()
    finally:
        if up.poll() is None:
            up.send_signal(signal.SIGTERM)
            up.wait(PATIENCE)


@pytest.fixture
def flags(tmp_path: Path, long_base: Path) -> dict[str, Any]:
    """Flags of `up` on one machine, with two replicas."""
    ports = {"port": free_port(), "ray_port": free_port()}
    return {"home": tmp_path / "home", **ports, "cpus": 8, "replicas": 2, "model": long_base, **FLAGS, **CACHES}


def started(log: Path, **flags: Any) -> "subprocess.Popen[bytes]":
    """Start `up`; return it once its API process is ready."""
    with log.open("ab") as output:
        up = subprocess.Popen(command(("cluster", "up"), **flags), env=environment(), stdout=output, stderr=output)

    def ready() -> bool:
        assert up.poll() is None, log.read_text()
        return is_ready(f"http://127.0.0.1:{flags['port']}")

    wait_until(ready, "it isn't ready", 3 * PATIENCE)
    return up


def kin(process: psutil.Process, word: str) -> set[int]:
    """Return the processes below `process` with this word in their command lines."""
    found = set()
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any(word in part for part in child.cmdline()):
                found.add(child.pid)
    return found


def test_ray_head_and_up_are_killed(flags: dict[str, Any], tmp_path: Path, long_base: Path) -> None:
    log, url = tmp_path / "log", f"http://127.0.0.1:{flags['port']}"
    body = {"prompt": "404", "max_tokens": 4, "temperature": 0}

    def ask() -> httpx.Response:
        return httpx.post(f"{url}/generate", json=body, trust_env=False, timeout=60)

    up = started(log, **flags)
    try:
        expected = ask().json()["choices"]
        apis = kin(psutil.Process(up.pid), "api")
        (head,) = kin(psutil.Process(up.pid), "gcs_server")
        os.kill(head, signal.SIGKILL)
        wait_until(lambda: not is_ready(url), "the API doesn't notice")
        assert httpx.get(f"{url}/health", trust_env=False, timeout=60).status_code == 200
        refused = ask()
        assert (refused.status_code, refused.headers.get("Retry-After")) == (503, "5")
        wait_until(lambda: is_ready(url), log.read_text(), 3 * PATIENCE)
        assert ask().json()["choices"] == expected
        assert apis & kin(psutil.Process(up.pid), "api") == apis
        wait_until(lambda: "replicas: 2 running" in ended("status", home=flags["home"]).stdout, log.read_text())

        replicas = kin(psutil.Process(read_state(flags["home"]).ray_pid), TITLE)
        up.kill()
        up.wait()
        wait_until(lambda: not any(map(psutil.pid_exists, apis)), "the API process runs on")
        up = started(log, **flags)
        assert "taking over the Ray" in log.read_text()
        assert kin(psutil.Process(read_state(flags["home"]).ray_pid), TITLE) == replicas

        address = f"127.0.0.1:{flags['ray_port']}"
        done = ended("deploy", home=flags["home"], address=address)
        assert done.returncode == 0, done.stderr
        assert kin(psutil.Process(read_state(flags["home"]).ray_pid), TITLE) == replicas
        other = save_tiny_base(tmp_path / "other" / "tiny-llama", options={**SIZES, "num_hidden_layers": 1})
        done = ended("deploy", home=flags["home"], address=address, model=other)
        assert "API processes (1) serve another base" in done.stderr
        assert ask().json()["choices"] == expected
        assert "replicas: 2 running" in ended("status", home=flags["home"]).stdout
        assert ended("down", home=flags["home"]).returncode == 0
        assert up.wait(PATIENCE) == 0
    finally:
        if up.poll() is None:
            up.send_signal(signal.SIGTERM)
            up.wait(PATIENCE)


def test_cluster_needs_shared_stores(tmp_path: Path) -> None:
    done = ended("up", home=tmp_path, api=2)
    assert done.returncode == 1
    assert "SMOLORA_DATABASE_URL and SMOLORA_BYTES_URL" in done.stderr
    assert "no cluster was started" in ended("status", home=tmp_path).stderr
