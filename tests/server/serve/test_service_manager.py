"""What systemd is notified of, and what its reload does. A datagram socket takes systemd's place."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI

from server.api.app import create_app
from server.config.environment import service_manager
from server.serve.address import bind
from server.serve.process import Process
from server.system.service import ServiceManager
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import wait_until
from tests.server.api.fakes import FakeEngine, until
from tests.server.conftest import MakeServices, client_of

pytestmark = pytest.mark.anyio

KEYS = ("k" * 16, "l" * 16, "m" * 16)


class Systemd:
    """A socket like systemd's, and the states that it received."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.setblocking(False)
        self._states: list[str] = []

    @property
    def states(self) -> list[str]:
        """The states so far, in order."""
        while True:
            try:
                self._states.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return list(self._states)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    systemd = Systemd(str(tmp_path / "notify"))
    yield systemd
    systemd.close()


async def test_states_of_a_run(
    app: FastAPI, engine: FakeEngine, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    engine.loading = True
    ended = asyncio.create_task(Process(app, engine, bind("127.0.0.1", 0)).run(lambda: None))
    await until(lambda: "WATCHDOG=1" in systemd.states)
    assert "READY=1" not in systemd.states
    engine.loading = False
    await until(lambda: "READY=1" in systemd.states)
    num_before = len(systemd.states)
    await until(lambda: len(systemd.states) > num_before + 2)
    assert set(systemd.states[num_before:]) == {"WATCHDOG=1"}
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(ended, 25) == 0
    assert [state for state in systemd.states if state != "WATCHDOG=1"] == ["READY=1", "STOPPING=1"]


async def test_watchdog_is_not_reset_while_the_event_loop_is_blocked(
    app: FastAPI, engine: FakeEngine, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    ended = asyncio.create_task(Process(app, engine, bind("127.0.0.1", 0)).run(lambda: None))
    await until(lambda: "READY=1" in systemd.states)
    num_before = len(systemd.states)
    time.sleep(0.5)
    assert len(systemd.states) == num_before
    await until(lambda: len(systemd.states) > num_before)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(ended, 25) == 0


def test_abstract_addresses_and_the_watchdogs_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"smolora-test-{os.getpid()}"
    systemd = Systemd(f"\0{name}")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    manager = ServiceManager(*service_manager())
    for now in (100.0, 100.1, 129.9, 130.0, 159.9, 160.0):
        manager.keep_alive(now)
    assert systemd.states == ["WATCHDOG=1"] * 3, "at 100, 130 and 160 s"
    monkeypatch.setenv("WATCHDOG_PID", "1")  # another process's
    ServiceManager(*service_manager()).keep_alive(1000.0)
    assert len(systemd.states) == 3
    systemd.close()
    manager.notify("READY=1")  # systemd has gone


def test_without_systemd_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    manager = ServiceManager(*service_manager())
    monkeypatch.setattr(socket, "socket", lambda *_: pytest.fail("a socket was made"))
    manager.notify("READY=1")
    manager.keep_alive(1e9)


async def test_reload_reads_the_file_of_keys(
    make_services: MakeServices, engine: FakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="smolora.access")
    file = tmp_path / "operators"
    file.write_text(KEYS[0])
    file.chmod(0o600)
    app = create_app(make_services(api_keys=f"@{file}"))
    ring, ready = app.state.services.access.ring, asyncio.Event()
    process = Process(app, engine, bind("127.0.0.1", 0), reload=ring.reload)
    ended = asyncio.create_task(process.run(ready.set))
    await asyncio.wait_for(ready.wait(), 25)
    file.write_text("\n".join(KEYS))
    os.kill(os.getpid(), signal.SIGUSR1)
    await until(lambda: "reloaded: SMOLORA_API_KEYS has 3 valid keys" in caplog.messages)
    async with client_of(app) as client:
        for key in KEYS:
            assert (await client.get("/adapters", headers={"Authorization": f"Bearer {key}"})).status_code == 200
    file.write_text("short")
    os.kill(os.getpid(), signal.SIGUSR1)
    await until(lambda: "reloaded: SMOLORA_API_KEYS has 0 valid keys" in caplog.messages)
    assert not ended.done()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(ended, 25) == 0


def test_a_real_server_is_ready_when_it_says_so(converted_tiny: Path, tmp_path: Path, systemd: Systemd) -> None:
    server = ServerProcess(tmp_path / "home", model=converted_tiny)
    try:
        wait_until(lambda: systemd.states == ["READY=1"], what="the state")
        server.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: "reloaded: " in server.log(), what="the reload")
        assert server.client.get("/ready").status_code == 200
        server.terminate()
        assert server.exit_code() == 0
        assert systemd.states == ["READY=1", "STOPPING=1"]
    finally:
        server.close()
