"""Keys, proxies, names and addresses that a command can't use."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server.cli.main import app
from server.client import client as client_module
from server.client.client import Client
from server.client.connection import ClientError

ELSEWHERE = "http://smolora.invalid:8000"


def jobs(url: str, **environment: str) -> Result:
    return CliRunner().invoke(app, ["jobs"], env={"SMOLORA_URL": url, **environment})


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("all_proxy", "http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("key", ["sk-smolora-abc\r", "sk-…", "two words", "sk-smolora-abc\n"])
def test_malformed_keys_are_refused(key: str) -> None:
    result = jobs("http://127.0.0.1:9", SMOLORA_API_KEY=key)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("smolora: the API key (SMOLORA_API_KEY, --api-key) has characters that no key")
    assert result.stderr.count("\n") == 1
    assert key.strip() not in result.stderr


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"all_proxy": "socks5://127.0.0.1:1"}, "socksio"),
        ({"http_proxy": "ftp://127.0.0.1:1"}, "Unknown scheme for proxy URL"),
        ({"http_proxy": "http://127.0.0.1:1", "no_proxy": "::1,fd00::/8"}, "Invalid port"),
    ],
)
def test_invalid_proxies_are_reported(variables: dict[str, str], reason: str) -> None:
    result = jobs(ELSEWHERE, **variables)
    assert result.exit_code == 1
    assert result.stderr.startswith("smolora: the proxy variables (ALL_PROXY, HTTP_PROXY, HTTPS_PROXY, NO_PROXY)")
    assert reason in result.stderr
    assert jobs("http://127.0.0.1:9", **variables).stderr.startswith("smolora: can't reach http://127.0.0.1:9: ")


def test_unreachable_proxy_is_reported() -> None:
    dead = jobs(ELSEWHERE, http_proxy="http://127.0.0.1:9")
    assert dead.exit_code == 1
    assert "the request went through a proxy, because the proxy variables" in dead.stderr
    around = jobs(ELSEWHERE, http_proxy="http://127.0.0.1:9", no_proxy="smolora.invalid")
    assert around.exit_code == 1
    assert "proxy" not in around.stderr


@pytest.mark.parametrize("name", ["acme/tweets", "", "..", "two words"])
def test_invalid_names_are_refused(name: str, tmp_path: Path) -> None:
    """They would lead to another path, with a misleading error such as "the body is larger than …"."""
    environment = {"SMOLORA_URL": "http://127.0.0.1:9"}
    for command in (["adapters", "import", str(tmp_path), "--name", name], ["compose", name, "tweets"]):
        result = CliRunner().invoke(app, command, env=environment)
        assert result.exit_code == 1
        assert result.stderr.startswith("smolora: name: must be 1 to 64 letters, digits, ")


@pytest.mark.parametrize(
    "command", [("jobs", ""), ("jobs", ".."), ("adapters", "show", ".."), ("adapters", "delete", ".")]
)
def test_empty_and_dotted_names_are_refused(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, command, env={"SMOLORA_URL": "http://127.0.0.1:9"})
    assert (result.exit_code, result.stderr) == (1, f'smolora: "{command[-1]}" names nothing\n')


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["adapters", "--url", ELSEWHERE, "delete", "codes"], "adapters delete … --url"),
        (["adapters", "--json", "show", "codes"], "adapters show … --json"),
        (["datasets", "--api-key", "secret", "delete", "ds-1"], "datasets delete … --api-key"),
    ],
)
def test_options_before_a_groups_command_are_refused(arguments: list[str], advice: str) -> None:
    environment = {"SMOLORA_URL": "http://127.0.0.1:9", "COLUMNS": "200"}
    result = CliRunner().invoke(app, arguments, env=environment)
    assert result.exit_code == 2
    assert f"give it behind the command: {advice}" in result.stderr
    behind = CliRunner().invoke(app, [*arguments[:1], *arguments[-2:]], env=environment)
    assert behind.stderr.startswith("smolora: can't reach http://127.0.0.1:9: ")


class Cut(BaseHTTPRequestHandler):
    """A proxy that ends each event stream. The job is queued until it was requested ten times."""

    num_asked = 0

    def do_GET(self) -> None:
        is_stream = self.path.endswith("/events")
        status = "succeeded" if Cut.num_asked >= 10 else "queued"
        body = b": the job's events\n\n" if is_stream else json.dumps({"status": status}).encode()
        Cut.num_asked += not is_stream
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + is_stream))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log nothing."""


def test_queued_job_is_followed_through_a_proxy_that_ends_streams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the proxy ends streams at once, the command gives up."""
    with HTTPServer(("127.0.0.1", 0), Cut) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{server.server_port}", retries=(0.0, 0.0)) as client:
            with pytest.raises(ClientError, match="can't reach"):
                list(client.events("job-1"))
            assert Cut.num_asked == 0
            monkeypatch.setattr(client_module, "_LASTING_SECONDS", 0.0)
            assert list(client.events("job-1")) == []
            assert Cut.num_asked == 11
        server.shutdown()
