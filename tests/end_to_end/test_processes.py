"""The server process from start to end: keys, signals, a kill, a restart, an occupied port."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.conftest import AdapterFiles
from tests.end_to_end.server_process import PATIENCE, ServerProcess, command, environment

pytestmark = pytest.mark.real

PROMPT = "Once upon a time, in a village"
"""Shorter than a block, so that no answer depends on earlier ones, to the last bit."""
KEYS = "first-key-of-two-keys, second-key-of-two-keys"


@dataclass(frozen=True)
class Survivor:
    """A server on the HOME of a killed one, and the killed server's answers."""

    server: ServerProcess
    listed: dict[str, Any]
    text: str


@pytest.fixture(scope="module")
def survivor(
    base_dir: Path, adapter_files: AdapterFiles, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Survivor]:
    """Kill a server in the middle of a stream and restart it, with default settings except for the keys."""
    home = tmp_path_factory.mktemp("killed")
    first = ServerProcess(home, key="second-key-of-two-keys", base_dir=base_dir, api_keys=KEYS)
    try:
        for seed in (31, 32):
            first.upload("kept", adapter_files.make(seed))
        assert first.client.delete("/adapters/kept/1").status_code == 204
        text = first.text(PROMPT, adapter="kept", max_tokens=12)
        listed = first.client.get("/adapters").json()
        with first.stream(PROMPT, max_tokens=400, ignore_eos=True) as events:
            next(events)
            first.kill()
            with pytest.raises(httpx.TransportError):
                list(events)
    finally:
        first.close()
    second = ServerProcess(home, key="second-key-of-two-keys", base_dir=base_dir, api_keys=KEYS)
    yield Survivor(second, listed, text)
    second.close()


def test_adapters_survive_a_kill(survivor: Survivor) -> None:
    listed = survivor.server.client.get("/adapters").json()
    assert [version["version"] for version in listed["adapters"][0]["versions"]] == [2]
    for now, then in zip(versions(listed), versions(survivor.listed), strict=True):
        assert now == {**then, "resident": False}
    answer = survivor.server.generate(PROMPT, adapter="kept", max_tokens=12)
    assert answer["choices"][0]["text"] == survivor.text
    assert answer["adapters"][0]["version"] == 2
    assert survivor.server.text(PROMPT, max_tokens=12) != survivor.text


def versions(listed: dict[str, Any]) -> list[dict[str, Any]]:
    return [version for adapter in listed["adapters"] for version in adapter["versions"]]


def test_keys(survivor: Survivor) -> None:
    """The server's own client always uses the second key."""
    body = {"prompt": PROMPT, "max_tokens": 1}
    with httpx.Client(base_url=survivor.server.url, timeout=PATIENCE, trust_env=False) as client:
        for given in (
            "",
            "Bearer",
            "Bearer wrong-key",
            "Bearer first-key-of-two-keys,second-key-of-two-keys",
            "Basic first-key-of-two-keys",
        ):
            headers = {"Authorization": given} if given else {}
            for method, path in (
                ("POST", "/generate"),
                ("GET", "/adapters"),
                ("GET", "/metrics"),
            ):
                response = client.request(method, path, json=body, headers=headers)
                assert response.status_code == 401, (given, path)
                assert response.headers["www-authenticate"].startswith("Bearer")
                assert response.headers["content-type"] == "application/problem+json"
        assert client.delete("/adapters/kept").status_code == 401
        for path in ("/health", "/ready", "/", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
        allowed = client.post("/generate", json=body, headers={"Authorization": "Bearer first-key-of-two-keys"})
        assert allowed.status_code == 200
    assert "second-key-of-two-keys" not in survivor.server.log()


def test_signal_lets_running_requests_end(survivor: Survivor) -> None:
    server = survivor.server
    # Long enough to outlast these requests, and short enough for a slow machine to finish while it drains.
    body: dict[str, Any] = {"max_tokens": 160, "ignore_eos": True, "speculation": "off"}
    undisturbed = server.text(PROMPT, **body)
    with server.stream(PROMPT, **body) as events:
        pieces = [next(events)]
        server.terminate()
        while (ready := server.client.get("/ready")).status_code == 200:
            pass
        assert ready.status_code == 503
        refused = server.client.post("/generate", json={"prompt": PROMPT})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert server.client.get("/health").status_code == 200
        pieces += events
    assert "".join(piece.get("text", "") for piece in pieces) == undisturbed
    assert pieces[-1]["usage"]["completion_tokens"] == 160
    assert server.exit_code() == 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_command_suggested_at_startup_works(server: ServerProcess) -> None:
    announced, _, ours, curl = server.log().partition(" is ready at ")[2].splitlines()[:4]
    assert announced.startswith(f"http://127.0.0.1:{server.port} ")
    said = subprocess.run(shlex.split(ours), capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert (said.stdout, said.stderr) == ("The capital of France is Paris.\n", "")
    answer = subprocess.run(shlex.split(curl), capture_output=True, check=True, timeout=PATIENCE)
    assert json.loads(answer.stdout)["choices"][0]["text"] == "The capital of France is Paris."


def test_occupied_port_is_reported(server: ServerProcess, tmp_path: Path) -> None:
    line = last_line(command(home=tmp_path, port=server.port))
    assert line.startswith(f"smolora: port {server.port} on 127.0.0.1 is taken: ")
    assert server.client.get("/ready").status_code == 200


def test_public_address_needs_keys(tmp_path: Path) -> None:
    line = last_line(command(home=tmp_path, host="0.0.0.0", port=0))
    assert line.startswith("smolora: 0.0.0.0 can be reached from elsewhere: make a key (")
    assert f"smolora keys create NAME --home {tmp_path}), set SMOLORA_API_KEYS" in line


def last_line(arguments: list[str]) -> str:
    """Return the only line of output of a server that can't start, with exit code 1."""
    ended = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    return line
