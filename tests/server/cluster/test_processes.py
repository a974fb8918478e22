"""What `smolora cluster up` tells the API processes that it starts, and how it looks after them."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from server.cli.options import with_flags
from server.config import DEFAULT_MODEL, PREFIX, Settings, load

pytest.importorskip("ray.serve", reason="needs the extra cluster")
processes = import_module("server.cluster.processes")

pytestmark = pytest.mark.cluster


def settings_of(command: list[str]) -> Settings:
    """Those that a process has which this command starts."""
    app, found = typer.Typer(), list[Settings]()

    @app.command()
    @with_flags(Settings)
    def api(
        settings: Settings,
        address: Annotated[str, typer.Option()],
        parent: Annotated[int, typer.Option()],
    ) -> None:
        found.append(settings)

    done = CliRunner().invoke(app, command[command.index("api") + 1 :])
    assert done.exit_code == 0, done.output
    return found[0]


def test_flags_of_up_win_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the processes that inherit it, too, and whatever is the default."""
    others = {"PORT": "7999", "MODEL": "/elsewhere", "ALLOWED_HOSTS": "lora.example.org", "NATIVE": "0"}
    for name, value in others.items():
        monkeypatch.setenv(f"{PREFIX}{name}", value)
    given = load(Settings, home=tmp_path, model=DEFAULT_MODEL, allowed_hosts="", native=True)
    for index, home in enumerate((tmp_path / "api-0", tmp_path / "api-1")):
        told = settings_of(processes.api_command(given, index, 2, "127.0.0.1:6379"))
        assert told == given.model_copy(update={"home": home, "port": 7999 + index, "workers": 0})
