"""Answers of servers that aren't smolora's, and terminals with limited encodings."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli.main import app

COMMANDS = (["adapters"], ["jobs"], ["datasets"], ["generate", "hi"], ["generate", "hi", "--json"])

LETTERS = "日é🦜"
NAMES = f'{{"adapters": [{{"name": "{LETTERS}"}}], "next": null}}'.encode()
BLEND = {"name": "acme/mix", "version": 1, "kind": "composition", "parent": None, "rank": 8, "bytes": 0}
MODULES = {"target_modules": ["q_proj", "v_proj"], "metrics": {}}
ADAPTER = {"name": "acme/mix", "latest": 1, "aliases": {}, "versions": [BLEND | MODULES]}
SHARED = json.dumps({"adapters": [ADAPTER], "next": None}).encode()


class Answers(BaseHTTPRequestHandler):
    """Answers every request by the first part of its path: `moved`, or a body of status 200."""

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        self.send_response(308 if kind == "moved" else 200)
        if kind == "moved":
            self.send_header("Location", "https://lora.example.org/")
        self.end_headers()
        self.wfile.write(
            {"page": b"<html>", "object": b"{}", "list": b"[]", "names": NAMES, "shared": SHARED}.get(kind, b"")
        )

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_redirects_are_reported(url: str, command: list[str]) -> None:
    result = CliRunner().invoke(app, command, env={"SMOLORA_URL": f"{url}/moved"})
    assert result.exit_code == 1
    assert result.stderr.startswith(
        f"smolora: {url}/moved redirects to https://lora.example.org/: set SMOLORA_URL, or"
    )


@pytest.mark.parametrize("kind", ["page", "object", "list"])
@pytest.mark.parametrize("command", COMMANDS[:-1], ids=" ".join)
def test_other_servers_are_recognized(url: str, command: list[str], kind: str) -> None:
    result = CliRunner().invoke(app, command, env={"SMOLORA_URL": f"{url}/{kind}"})
    assert (result.exit_code, result.stderr) == (1, f"smolora: {url}/{kind} doesn't speak smolora's API\n")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_terminals_with_limited_encodings(url: str, encoding: str) -> None:
    """The `…` in a suggestion must not end the command with a traceback, and JSON stays JSON."""
    command = [str(Path(sys.executable).with_name("smolora")), "adapters", "--json"]
    environment = os.environ | {"SMOLORA_URL": f"{url}/names", "PYTHONIOENCODING": encoding}
    result = subprocess.run(command, env=environment, capture_output=True, encoding=encoding, timeout=60)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"adapters": [{"name": LETTERS}]}
    assert (LETTERS in result.stdout) == (encoding == "utf-8")


def test_public_blend_without_its_parts_is_shown(url: str) -> None:
    result = CliRunner().invoke(app, ["adapters", "show", "acme/mix"], env={"SMOLORA_URL": f"{url}/shared"})
    assert result.stdout.split("\n")[1].split() == ["acme/mix@1", "latest", "8", "q,", "v", "0.0", "MB"]


def test_json_without_stdout(url: str) -> None:
    """If stdout is closed, as by `>&-`, Python has none."""
    smolora = str(Path(sys.executable).with_name("smolora"))
    environment = os.environ | {"SMOLORA_URL": f"{url}/names"}
    command = ["sh", "-c", '"$0" adapters --json >&-', smolora]
    result = subprocess.run(command, env=environment, stderr=subprocess.PIPE, encoding="utf-8", timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
