"""The commands on a HOME, run alongside the app that `tests.server.conftest` builds over it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server.cli.main import app

Run = Callable[..., Result]


@pytest.fixture
def attempt(tmp_path: Path) -> Run:
    """Run a command on HOME, which is `tmp_path`."""

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--home", str(tmp_path)])

    return run


@pytest.fixture
def smolora(attempt: Run) -> Callable[..., str]:
    """Return a function that runs a command, which must succeed, and returns its stdout."""

    def run(*arguments: str) -> str:
        result = attempt(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def refused(result: Result) -> str:
    """Return the only line of a refused command, which is on stderr."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("smolora: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("smolora: ").rstrip("\n")


def bearer(secret: str) -> dict[str, str]:
    """Return the headers with a key, as a command printed it."""
    return {"Authorization": f"Bearer {secret.strip()}"}
