"""Schemathesis on the whole OpenAPI document, with keys of all scopes: no 5xx, and nothing undocumented."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.end_to_end.server_process import ServerProcess

pytestmark = pytest.mark.slow

CHECKS = (
    "allow_header_conformance",
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "use_after_free",
)
"""Without `positive_data_acceptance`: the document can't express all rules of names and expressions."""
OF_METHODS = ("allow_header_conformance", "unsupported_method")
"""Checks of methods: a key's scopes are checked before the method."""
SECONDS = 25
"""Seconds of each run. The full run needs 600."""
OPERATOR = "operators-0123456789"
KEYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "generate": ("default", ("generate",)),
    "train": ("default", ("train",)),
    "manage": ("default", ("manage",)),
    "metrics": ("default", ("metrics",)),
    "admin": ("default", ("admin",)),
    "acme's manager": ("acme", ("manage",)),
    "acme's": ("acme", ("generate", "train")),
}
"""The project and the scopes of each key that the operator makes."""


@pytest.fixture(scope="module")
def locked(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Start a server that needs keys."""
    home = tmp_path_factory.mktemp("locked")
    server = ServerProcess(home, key=OPERATOR, model=base_dir, max_model_len=256, api_keys=OPERATOR)
    yield server
    server.close()


def test_every_response_is_documented_without_keys(base_dir: Path, tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "home", model=base_dir, max_model_len=256)
    try:
        run(server, tmp_path, "--exclude-path=/keys")  # the first key would lock the server
    finally:
        server.close()


@pytest.mark.parametrize("key", ["operator", "wrong", *KEYS])
def test_every_response_to_a_key_is_documented(locked: ServerProcess, key: str, tmp_path: Path) -> None:
    """No route answers a key that lacks its scope."""
    secret = OPERATOR if key == "operator" else key
    scopes: tuple[str, ...] = ("admin",)
    if key in KEYS:
        project, scopes = KEYS[key]
        # a run may revoke its own key, but no manager sees one that the operator could use
        made = locked.client.post("/keys", json={"name": "st", "project": project, "scopes": scopes})
        secret = made.json()["secret"]
    run(locked, tmp_path, f"--header=Authorization: Bearer {secret}", scopes=() if key == "wrong" else scopes)


def run(server: ServerProcess, directory: Path, option: str, scopes: Sequence[str] = ("admin",)) -> None:
    """Run Schemathesis with this option. `scopes` are those of the key that is sent, if it is valid."""
    command = [str(Path(sys.executable).with_name("st")), "run", f"{server.url}/openapi.json", option]
    checks = [check for check in CHECKS if "admin" in scopes or check not in OF_METHODS]
    checks += ["scopes_are_required"] if scopes else []
    command += [f"--checks={','.join(checks)}", "--continue-on-failure", "--no-color", "--request-timeout=60"]
    command += [f"--max-time={SECONDS}", "--seed=7"]
    environment = {"SCHEMATHESIS_HOOKS": "tests.end_to_end.scope_check", "KEY_SCOPES": ",".join(scopes)}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, cwd=directory, env=os.environ | environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert server.process.poll() is None
    assert server.client.get("/ready").status_code == 200
    assert " ERROR " not in server.log()
