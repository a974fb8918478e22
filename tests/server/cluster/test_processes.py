"""Settings that `smolora cluster up` passes to the API processes that it starts, and their supervision."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from server.cli import cluster as commands
from server.cli.common import with_flags
from server.cluster import node
from server.cluster.node import FILE_NAME, ClusterState, alone, read_state, write_state
from server.config import DEFAULT_MODEL, PREFIX, Settings, load
from server.errors import StartupError
from tests.end_to_end.server_process import free_port

pytest.importorskip("ray.serve", reason="needs the extra cluster")
processes = import_module("server.cluster.processes")

pytestmark = pytest.mark.cluster


def settings_of(command: list[str]) -> Settings:
    """Return the settings of a process that this command starts."""
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
    """This includes processes that inherit the environment, and holds for any default."""
    others = {"PORT": "7999", "MODEL": "/elsewhere", "ALLOWED_HOSTS": "lora.example.org", "NATIVE": "0"}
    for name, value in others.items():
        monkeypatch.setenv(f"{PREFIX}{name}", value)
    given = load(Settings, home=tmp_path, model=DEFAULT_MODEL, allowed_hosts="", native=True)
    for index, home in enumerate((tmp_path / "api-0", tmp_path / "api-1")):
        own = settings_of(processes.api_command(given, index, 2, "127.0.0.1:6379"))
        assert own == given.model_copy(update={"home": home, "port": 7999 + index, "workers": 0})


class Ready(BaseHTTPRequestHandler):
    """The response of a ready API process."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def ready_at(host: str) -> Iterator[int]:
    """Serve readiness on that address alone; yield the port."""
    server = HTTPServer((host, 0), Ready)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "0.0.0.0", "localhost"])
def test_api_processes_are_checked_at_their_addresses(host: str) -> None:
    with ready_at(host) as port:
        (url,) = processes.urls_of(load(Settings, host=host, port=port), 1)
        assert processes.is_ready(url)


def test_api_processes_are_checked_without_a_proxy() -> None:
    """A proxy in the environment is meant for other hosts."""
    code = "import sys; from server.cluster.processes import is_ready; sys.exit(not is_ready(sys.argv[1]))"
    kept = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    with ready_at("127.0.0.1") as port:
        arguments = [sys.executable, "-c", code, f"http://127.0.0.1:{port}"]
        assert subprocess.run(arguments, env={**kept, "http_proxy": "http://127.0.0.1:1"}).returncode == 0


@pytest.fixture
def stranger() -> Iterator["subprocess.Popen[bytes]"]:
    """Start a process with the id of a process of the cluster, as after a reboot."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_another_process_with_the_same_id_is_not_ended(
    tmp_path: Path, stranger: "subprocess.Popen[bytes]"
) -> None:
    gone = f"{node.mark_of(stranger.pid)}0"
    state = ClusterState("10.0.0.1:6379", stranger.pid, stranger.pid, (), 0, mark=gone, ray_mark=gone)
    write_state(tmp_path, state)
    with pytest.raises(StartupError, match="has ended: start it again"):
        processes.restart(tmp_path, print)
    commands.down(tmp_path)
    assert not (tmp_path / FILE_NAME).exists()
    assert node.is_alive(stranger.pid)


@pytest.fixture
def sleepers() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Yield a list of processes that are killed at the end."""
    found = list["subprocess.Popen[bytes]"]()
    yield found
    for process in found:
        process.kill()
        process.wait()


def test_ray_that_ends_is_started_again_while_other_processes_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleepers: list["subprocess.Popen[bytes]"]
) -> None:
    states, stop, deploys = list[ClusterState](), list[Any](), list[list[str]]()
    running, apis = list[Any](), list[int]()

    def start_head(*_: object) -> tuple["subprocess.Popen[bytes]", str]:
        if len(sleepers) == 1:  # the first attempt to start it again fails
            sleepers.append(subprocess.Popen(["true"]))
            raise StartupError("port 6379 is taken")
        sleepers.append(subprocess.Popen(["sleep", "60"]))
        return sleepers[-1], "127.0.0.1:6379"

    def is_ready(url: str) -> bool:
        pids = running[0]._running[0].pids
        apis.extend(pid for pid in pids if pid not in apis)
        if apis and len(sleepers) == 1:
            sleepers[0].kill()
        if len(sleepers) == 3:
            stop[0]()
        return False

    def deploy(command: list[str], *_: object) -> bool:
        deploys.append(command)
        return len(deploys) > 1

    class Watched(processes.Processes):  # type: ignore[misc, name-defined]
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            running[:] = [self]

    def handle(number: int, handler: Any) -> None:
        if number == signal.SIGTERM:
            stop[:] = [handler]

    monkeypatch.setattr(processes, "Processes", Watched)
    monkeypatch.setattr(processes, "is_ready", is_ready)
    monkeypatch.setattr(processes, "_TICK_SECONDS", 0.02)
    monkeypatch.setattr(processes, "_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(processes, "_deploy", deploy)
    monkeypatch.setattr(processes, "write_state", lambda _, state: states.append(state))
    monkeypatch.setattr(processes.signal, "signal", handle)
    monkeypatch.setattr(node, "start_head", start_head)
    monkeypatch.setattr(processes, "api_command", lambda *_: ["sleep", "60"])
    said = list[str]()
    settings = load(Settings, home=tmp_path, port=free_port(), workers=0)
    assert processes.up(settings, None, 1, None, 6379, None, said.append) == 0
    assert [state.ray_pid for state in states] == [sleepers[0].pid, sleepers[2].pid]
    assert len(apis) == 1, "the API process went on"
    assert "port 6379 is taken: trying again" in said
    assert "the engine replicas weren't deployed: trying again" in said
    assert len(deploys) == 2
    assert not any(part.startswith(("--replicas", "--forget")) for part in deploys[0]), "as the last time"
    assert sleepers[2].poll() is not None


def test_a_killed_ups_ray_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stranger: "subprocess.Popen[bytes]"
) -> None:
    """It goes on with its replicas, and ends with its new owner."""
    gone, lives = f"{node.mark_of(stranger.pid)}0", node.mark_of(stranger.pid)
    former = ClusterState("127.0.0.1:6379", 1, stranger.pid, (), 0, mark=gone, ray_mark=lives, is_head=True)
    write_state(tmp_path, former)
    seen = list[ClusterState]()

    def handle(number: int, handler: Any) -> None:
        if number == signal.SIGINT:
            seen.append(read_state(tmp_path))
            handler()

    monkeypatch.setattr(processes, "_TICK_SECONDS", 0.02)
    monkeypatch.setattr(processes.signal, "signal", handle)
    settings = load(Settings, home=tmp_path, port=free_port(), workers=0)
    assert processes.up(settings, None, 0, None, 6379, None, print) == 0
    assert (seen[0].pid, seen[0].ray_pid) == (os.getpid(), stranger.pid)
    assert stranger.wait(60) == -signal.SIGTERM
    assert not (tmp_path / FILE_NAME).exists()


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if Ray is started."""

    def start(*_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(node, "start_head", start)
    monkeypatch.setattr(node, "start_node", start)
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)


@pytest.mark.usefixtures("no_ray")
def test_serving_without_keys_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="can be reached from elsewhere: make a key"):
        processes.up(load(Settings, home=tmp_path, host="0.0.0.0"), None, 1, None, 6379, None, print)


@pytest.mark.usefixtures("no_ray")
def test_ports_that_api_processes_can_not_have_are_refused_before_anything_starts(tmp_path: Path) -> None:
    """They would be restarted again and again, and never be ready."""
    shared = {"database_url": "postgresql://db/smolora", "bytes_url": "s3://smolora/production"}
    with ready_at("127.0.0.1") as taken:
        with pytest.raises(StartupError, match=f"port {taken} on 127.0.0.1 is taken"):
            processes.up(load(Settings, home=tmp_path, port=taken), None, 1, None, 6379, None, print)
        assert processes.is_ready(f"http://127.0.0.1:{taken}")
    with pytest.raises(StartupError, match="API process 2 would have port 65536"):
        processes.up(load(Settings, home=tmp_path, port=65535, **shared), None, 2, None, 6379, None, print)
    with pytest.raises(StartupError, match="ports that are known"):
        processes.up(load(Settings, home=tmp_path, port=0), None, 1, None, 6379, None, print)


@pytest.mark.usefixtures("no_ray")
def test_an_unreachable_cluster_is_reported_before_anything_starts(tmp_path: Path) -> None:
    """Ray would try to reach it for over a minute."""
    shared = {"database_url": "postgresql://db/smolora", "bytes_url": "s3://smolora/production"}
    settings = load(Settings, home=tmp_path, port=free_port(), **shared)
    for address in (
        f"127.0.0.1:{free_port()}",
        f"[::1]:{free_port()}",
        "127.0.0.1:99999",
        "a..b:6379",
        f"a:{'9' * 5000}",
    ):
        with pytest.raises(StartupError, match=rf"nothing answers at {re.escape(address)} \(.+\): --address is"):
            processes.up(settings, None, 1, address, 6379, None, print)
    with ready_at("127.0.0.1") as port, pytest.raises(AssertionError, match="Ray was started"):
        processes.up(settings, None, 1, f"127.0.0.1:{port}", 6379, None, print)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_second_up_is_refused(tmp_path: Path, stranger: "subprocess.Popen[bytes]", address: str | None) -> None:
    """It would overwrite the first one's state, and `down` and `status` would know nothing of the first."""
    shared = {"database_url": "postgresql://db/smolora", "bytes_url": "s3://smolora/production"}
    settings = load(Settings, home=tmp_path, port=free_port(), **shared)
    lives = node.mark_of(stranger.pid)
    state = ClusterState("10.0.0.1:6379", stranger.pid, stranger.pid, (), 0, mark=lives, ray_mark=lives)
    write_state(tmp_path, state)
    with pytest.raises(StartupError, match=f"runs already.* process {stranger.pid}"):
        processes.up(settings, None, 1, address, 6379, None, print)
    assert read_state(tmp_path) == state


@pytest.mark.usefixtures("no_ray")
def test_a_second_up_is_refused_while_the_first_starts(tmp_path: Path) -> None:
    """Ray takes a minute to start, and there is no state until then."""
    settings = load(Settings, home=tmp_path, port=free_port())
    with (
        alone(tmp_path),
        pytest.raises(StartupError, match="is about to start, or to end"),
    ):
        processes.up(settings, None, 1, None, 6379, None, print)
    with pytest.raises(StartupError, match="would have Ray's port"):  # it is free again
        processes.up(settings, None, 1, None, settings.port, None, print)


def test_up_fails_if_replicas_do_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stranger: "subprocess.Popen[bytes]"
) -> None:
    monkeypatch.setattr(node, "start_head", lambda *_: (stranger, "127.0.0.1:6379"))
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)
    monkeypatch.setattr(processes, "deploy_command", lambda *_, **__: ["false"])
    settings = load(Settings, home=tmp_path, port=free_port(), workers=0)
    assert processes.up(settings, {"replicas": 1}, 1, None, 6379, None, print) == 1
    assert stranger.wait(60) == -signal.SIGTERM


def test_the_command_of_a_first_deployment_has_the_flags_of_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOLORA_MAX_QUEUE", "7")
    settings = load(Settings, home=tmp_path, model="/elsewhere", database_url="postgresql://db/smolora")
    command = processes.deploy_command(settings, "127.0.0.1:6379", {"replicas": 3, "num_cpus": 0.5}, forget=True)
    given = ["--address=127.0.0.1:6379", "--replicas=3", "--replica-cpus=0.5", "--forget", f"--home={tmp_path}"]
    assert command[command.index("deploy") + 1 :] == [*given, "--model=/elsewhere", "--max-queue=7"]


def test_numbers_of_replicas_that_contradict_each_other(tmp_path: Path) -> None:
    """The larger number used to win, and autoscaling never happened."""
    done = CliRunner().invoke(
        commands.group, ["up", "--home", str(tmp_path), "--replicas", "3", "--max-replicas", "2"]
    )
    assert isinstance(done.exception, StartupError)
    assert str(done.exception) == "--max-replicas 2 is less than --replicas 3"


def test_max_replicas_without_replicas_is_refused(tmp_path: Path) -> None:
    """A machine that joins doesn't change the number of replicas, unless it sets one."""
    arguments = ["up", "--home", str(tmp_path), "--address", "10.0.0.1:6379", "--max-replicas", "2"]
    done = CliRunner().invoke(commands.group, arguments)
    assert isinstance(done.exception, StartupError)
    assert str(done.exception).startswith("with --address, --max-replicas needs --replicas")


@pytest.mark.parametrize("port", ["0", "65536"])
def test_an_invalid_ray_port_is_refused(port: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(commands.group, ["up", "--home", str(tmp_path), "--ray-port", port])
    assert done.exit_code == 2
    assert "--ray-port" in done.output
