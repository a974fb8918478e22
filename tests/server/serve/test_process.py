"""The server process: addresses, draining, dying. It uses real sockets and signals in this process."""

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from server.errors import StartupError
from server.jobs.supervisor import Supervisor
from server.jobs.yielding import BusyFlag
from server.serve.address import bind, url
from server.serve.process import Process
from tests.server.api.fakes import FakeEngine, until

pytestmark = pytest.mark.anyio


class Running:
    """A server on a free port, and a client of it."""

    def __init__(self, client: httpx.AsyncClient, ended: "asyncio.Task[int]") -> None:
        self.client = client
        self.ended = ended

    async def exit_code(self) -> int:
        async with asyncio.timeout(25):  # less than `drain_seconds`
            return await self.ended


@contextmanager
def no_more_files() -> Iterator[None]:
    """Make this process unable to open files in the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@asynccontextmanager
async def serving(app: FastAPI, engine: FakeEngine, drain_seconds: float = 30.0) -> AsyncIterator[Running]:
    bound = bind("127.0.0.1", 0)
    announced = asyncio.Event()
    process = Process(app, engine, bound, drain_seconds)
    ended = asyncio.create_task(process.run(announced.set))
    async with httpx.AsyncClient(base_url=url(bound, "127.0.0.1"), timeout=60) as client:
        async with asyncio.timeout(60):
            await announced.wait()
        try:
            yield Running(client, ended)
        finally:
            if not ended.done():
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
                await ended


async def test_the_server_answers_and_ends_by_a_signal(app: FastAPI, engine: FakeEngine) -> None:
    async with serving(app, engine) as server:
        assert engine.started
        answer = await server.client.post("/generate", json={"prompt": "a", "max_tokens": 2})
        assert answer.json()["choices"][0]["text"] == "w0 w1 "
        os.kill(os.getpid(), signal.SIGINT)
        assert await server.exit_code() == 0
        assert engine.stopped


async def test_connections_wait_for_free_file_descriptors(app: FastAPI, engine: FakeEngine) -> None:
    """It is logged once or twice a second, depending on Python's version, however many wait."""
    reports: list[str] = []
    loop = asyncio.get_running_loop()
    usual = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: reports.append(context["message"]))
    async with serving(app, engine) as server:
        port = server.client.base_url.port
        assert port is not None
        with ExitStack() as closed_again:
            waiting = [closed_again.enter_context(socket.socket()) for _ in range(64)]
            with no_more_files():
                for client in waiting:
                    client.settimeout(5)
                    client.connect(("127.0.0.1", port))  # while the server's loop does nothing
                await asyncio.sleep(0.5)
            assert 0 < len(reports) <= 2
            assert set(reports) == {"socket.accept() out of system resource"}
            loop.set_exception_handler(usual)
            assert (await server.client.get("/health")).status_code == 200
            for client in waiting:
                client.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                assert (await asyncio.to_thread(client.recv, 100)).startswith(b"HTTP/1.1 200")


async def test_nothing_is_announced_before_the_engine_is_ready(app: FastAPI, engine: FakeEngine) -> None:
    engine.loading = True
    bound = bind("127.0.0.1", 0)
    announced = asyncio.Event()
    ended = asyncio.create_task(Process(app, engine, bound).run(announced.set))
    async with httpx.AsyncClient(base_url=url(bound, "127.0.0.1")) as client:
        await until(lambda: engine.started)
        async with asyncio.timeout(60):
            while True:
                with suppress(httpx.ConnectError):
                    assert (await client.get("/ready")).status_code == 503
                    break
        assert not announced.is_set()
        engine.loading = False
        await asyncio.wait_for(announced.wait(), 60)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(ended, 25) == 0


@pytest.mark.parametrize(
    ("stream", "number"), [(False, signal.SIGTERM), (True, signal.SIGTERM), (False, signal.SIGHUP)]
)
async def test_draining_lets_running_requests_end(
    app: FastAPI, engine: FakeEngine, stream: bool, number: int
) -> None:
    """SIGHUP, which follows the closing of a terminal, also drains."""
    engine.hold_after = 1
    body = {"prompt": "a", "max_tokens": 3, "stream": stream}
    async with serving(app, engine) as server:
        running = asyncio.create_task(server.client.post("/generate", json=body))
        await until(lambda: len(engine.open) == 1)
        if signal.getsignal(number) is signal.SIG_IGN:
            pytest.skip("the tests run under nohup, as a server might")
        os.kill(os.getpid(), number)
        await until(lambda: engine.draining)
        for method, path in (
            ("GET", "/ready"),
            ("POST", "/generate"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/train"),
            ("DELETE", "/adapters/a"),
        ):
            response = await server.client.request(method, path, json=body)
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
        for path in ("/health", "/adapters", "/train"):
            assert (await server.client.get(path)).status_code == 200
        assert not server.ended.done()
        engine.held.set()
        answer = await running
        assert answer.text.endswith("data: [DONE]\n\n") if stream else answer.json()["choices"]
        assert await server.exit_code() == 0


async def test_requests_that_do_not_end_in_time_fail(app: FastAPI, engine: FakeEngine) -> None:
    engine.hold_after = 1
    async with serving(app, engine, drain_seconds=0.2) as server:
        streamed = asyncio.create_task(server.client.post("/generate", json={"prompt": "a", "stream": True}))
        whole = asyncio.create_task(server.client.post("/generate", json={"prompt": "a"}))
        await until(lambda: len(engine.open) == 2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert "event: error" in (await streamed).text
        assert (await whole).status_code == 503
        assert await server.exit_code() == 0


async def test_a_second_signal_ends_the_drain(app: FastAPI, engine: FakeEngine) -> None:
    engine.hold_after = 0
    async with serving(app, engine) as server:
        running = asyncio.create_task(server.client.post("/generate", json={"prompt": "a"}))
        await until(lambda: len(engine.open) == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: engine.draining)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await running).status_code == 503
        assert await server.exit_code() == 0


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
async def test_on_hurry_is_called_once(
    app: FastAPI, engine: FakeEngine, numbers: tuple[signal.Signals, signal.Signals]
) -> None:
    engine.hold_after = 0
    was_hurried = list[bool]()
    process = Process(app, engine, bind("127.0.0.1", 0), on_hurry=lambda: was_hurried.append(process.is_hurried))
    ended = asyncio.create_task(process.run(lambda: None))
    await until(lambda: engine.started)
    first, second = numbers
    os.kill(os.getpid(), first)
    await until(lambda: engine.draining)
    assert was_hurried == []
    for number in (second, first):
        os.kill(os.getpid(), number)
    assert await asyncio.wait_for(ended, 25) == 0
    assert was_hurried == [True]


async def test_a_running_upload_is_not_cut_off(app: FastAPI, engine: FakeEngine) -> None:
    """The drain waits for uploads as for running requests, longer than for the last answers."""
    async with serving(app, engine) as server:

        async def body() -> AsyncIterator[bytes]:
            begin = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{"text": '
            yield begin
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(4)
            yield b'"a"}\r\n--x--\r\n'

        headers = {"content-type": "multipart/form-data; boundary=x"}
        answer = await server.client.post("/datasets", content=body(), headers=headers)
        assert answer.status_code == 201, answer.text
        assert await server.exit_code() == 0


async def test_a_dead_engine_fails_requests_and_ends_the_process(app: FastAPI, engine: FakeEngine) -> None:
    engine.hold_after = 0
    async with serving(app, engine) as server:
        running = asyncio.create_task(server.client.post("/generate", json={"prompt": "a"}))
        await until(lambda: len(engine.open) == 1)
        engine.die()
        assert (await running).status_code == 503
        assert (await server.client.get("/ready")).status_code == 503
        assert await server.exit_code() == 1


async def test_workers_start_and_end_with_the_server(app: FastAPI, engine: FakeEngine) -> None:
    supervisor = Supervisor(1, ("sleep", "60"))
    engine.loading = True
    process = Process(app, engine, bind("127.0.0.1", 0), supervisor=supervisor)
    ended = asyncio.create_task(process.run(lambda: None))
    await until(lambda: engine.num_looks > 3)
    assert not supervisor.is_running
    engine.loading = False
    await until(lambda: len(supervisor.pids) == 1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(ended, 25) == 0
    assert not supervisor.is_running
    with pytest.raises(ProcessLookupError):
        os.kill(supervisor.pids[0], 0)


DEAF = """
import pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (here / "asked").touch())
(here / "up").touch()
while True:
    time.sleep(60)
"""


async def test_a_second_signal_does_not_wait_for_workers(app: FastAPI, engine: FakeEngine, tmp_path: Path) -> None:
    supervisor = Supervisor(1, (sys.executable, "-S", "-c", DEAF, str(tmp_path)))
    process = Process(app, engine, bind("127.0.0.1", 0), supervisor=supervisor)
    ended = asyncio.create_task(process.run(lambda: None))
    await until((tmp_path / "up").exists)
    os.kill(os.getpid(), signal.SIGTERM)
    await until((tmp_path / "asked").exists)
    assert not ended.done()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(ended, 15) == 0  # they are given 25 s


async def test_trainers_see_that_requests_run(app: FastAPI, engine: FakeEngine, tmp_path: Path) -> None:
    engine.hold_after = 0
    serving, training = BusyFlag(tmp_path), BusyFlag(tmp_path)
    bound = bind("127.0.0.1", 0)
    ended = asyncio.create_task(Process(app, engine, bound, flag=serving).run(lambda: None))
    await until(lambda: engine.started)
    async with httpx.AsyncClient(base_url=url(bound, "127.0.0.1"), timeout=60) as client:
        running = asyncio.create_task(client.post("/generate", json={"prompt": "a", "max_tokens": 2}))
        await until(lambda: training.read() == 1)
        engine.held.set()
        await running
        await until(lambda: training.read() == 0)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(ended, 25) == 0


def test_a_taken_port_is_an_error_of_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"port {port} on 127.0.0.1 is taken"):
            bind("127.0.0.1", port)


async def test_a_port_taken_between_binding_and_listening(
    app: FastAPI, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a StartupError, and nothing else is logged."""
    with bind("127.0.0.1", 0) as bound, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(bound.getsockname())
        other.listen()
        with pytest.raises(StartupError, match="is taken"):
            await Process(app, engine, bound).run(lambda: None)
        assert engine.stopped
    await asyncio.sleep(0.1)
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []


@pytest.mark.parametrize("trusted", ["127.0.0.1", "127.0.0.0/8", "::ffff:127.0.0.1"])
async def test_an_ipv4_proxy_is_trusted_on_an_ipv6_socket(
    app: FastAPI, engine: FakeEngine, caplog: pytest.LogCaptureFixture, trusted: str
) -> None:
    """It is seen as ::ffff:127.0.0.1 there."""
    caplog.set_level("INFO", logger="smolora.api")
    bound, announced = bind("::", 0), asyncio.Event()
    process = Process(app, engine, bound, trusted_proxies=[trusted])
    ended = asyncio.create_task(process.run(announced.set))
    async with asyncio.timeout(60):
        await announced.wait()
    async with httpx.AsyncClient(base_url=url(bound, "127.0.0.1"), timeout=60) as client:
        await client.get("/adapters", headers={"X-Forwarded-For": "203.0.113.9"})
    os.kill(os.getpid(), signal.SIGTERM)
    await ended
    assert any("client=203.0.113.9" in str(record.msg) for record in caplog.records), caplog.text


def test_ipv4_is_preferred_for_a_name_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """On most systems localhost has both, IPv6 first, and commands use 127.0.0.1 by default."""
    known = {host: socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM) for host in ("::1", "127.0.0.1")}
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [*known["::1"], *known["127.0.0.1"]])
    with bind("localhost", 0) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(StartupError, match="can't listen on"):
        bind(host, 0)


def test_urls() -> None:
    with bind("127.0.0.1", 0) as bound:
        assert url(bound, "127.0.0.1") == f"http://127.0.0.1:{bound.getsockname()[1]}"
        assert url(bound, "::1").startswith("http://[::1]:")
        assert url(bound, "0.0.0.0") == url(bound, "127.0.0.1"), "nobody can open 0.0.0.0"
        assert url(bound, "::") == url(bound, "::1")


def test_unwritable_output_does_not_prevent_the_exit() -> None:
    """An example is standard error on a full disk after a second signal."""
    code = (
        "import sys; from contextlib import suppress; from server.serve.process import _leave\n"
        "with suppress(OSError): print('stopped', file=sys.stderr)\n"
        "_leave(3)"
    )
    with open("/dev/full", "w") as full:
        environment = os.environ | {"PYTHONUNBUFFERED": ""}  # with it nothing is left to be written at the end
        done = subprocess.run([sys.executable, "-c", code], stderr=full, env=environment, timeout=60, check=False)
    assert done.returncode == 3
