"""Schemathesis on the whole OpenAPI document, with and without a key: no 5xx, and nothing undocumented."""

import subprocess
import sys
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
"""Checks of methods: the key is checked before the method."""
SECONDS = 25
"""Seconds of each run. The full run needs 600."""


OPERATOR = "operators-0123456789"


@pytest.mark.parametrize("key", [None, OPERATOR, "wrong"])
def test_every_response_is_documented(key: str | None, base_dir: Path, tmp_path: Path) -> None:
    keys = {} if key is None else {"api-keys": OPERATOR}
    server = ServerProcess(
        tmp_path / "home", key=OPERATOR if keys else None, model=base_dir, max_model_len=256, **keys
    )
    try:
        run(server, key, tmp_path)
        assert server.process.poll() is None
        assert server.client.get("/ready").status_code == 200
        assert " ERROR " not in server.log()
    finally:
        server.close()


def run(server: ServerProcess, key: str | None, directory: Path) -> None:
    command = [str(Path(sys.executable).with_name("st")), "run", f"{server.url}/openapi.json"]
    checks = [check for check in CHECKS if key != "wrong" or check not in OF_METHODS]
    command += [f"--checks={','.join(checks)}", "--continue-on-failure", "--no-color", "--request-timeout=60"]
    command += [f"--max-time={SECONDS}", "--seed=7"]
    # the first key would lock the server
    command += ["--exclude-path=/keys"] if key is None else [f"--header=Authorization: Bearer {key}"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-20_000:]
