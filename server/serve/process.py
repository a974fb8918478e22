"""The process around the app: uvicorn in this process, from the first connection to a clean end.

SIGTERM, SIGINT or SIGHUP drains: from that moment /ready says 503 and nothing new is taken; what runs or waits
ends within DRAIN_SECONDS, or fails with a message; then exit code 0. A second signal waits HURRY_SECONDS at most:
then exit code 1. Training workers start once everything is ready, and are asked to release their jobs as soon as
draining begins. An engine that can't go on is shown on /ready for a moment, then exit
code 1; where its thread hangs, nothing waits for that.
"""

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from server.api.deps import EngineClient
from server.config import Limits
from server.jobs.supervisor import Supervisor
from server.jobs.yielding import BusyFlag
from server.serve.address import cannot_listen
from server.serve.connections import Connections, allow_files
from server.system.messages import plural

DRAIN_SECONDS = 30.0
HURRY_SECONDS = 5.0
_FLUSH_SECONDS = 3  # for answers that are on their way when nothing runs any more
_DEAD_SECONDS = 2.0  # so that whoever probes /ready sees why
KEEP_ALIVE_SECONDS = 75  # longer than clients and proxies keep an idle connection, so that they close it
_POLL_SECONDS = 0.05
_BACKLOG = 2048  # connections that the kernel keeps until they are taken, as far as it does

log = logging.getLogger("smolora.run")


def run(
    app: FastAPI,
    engine: EngineClient,
    bound: socket.socket,
    announce: Callable[[], None],
    supervisor: Supervisor,
    flag: BusyFlag,
    trusted_proxies: Sequence[str],
    limits: Limits,
) -> int:
    """Serve until told to stop; the exit code. `announce` is called once everything is ready.

    `trusted_proxies` are those whose X-Forwarded-For and -Proto count.
    """
    limits = allow_files(limits)
    hurry = threading.Timer(HURRY_SECONDS, _leave, [1])
    hurry.daemon = True
    process = Process(
        app,
        engine,
        bound,
        supervisor=supervisor,
        flag=flag,
        trusted_proxies=trusted_proxies,
        limits=limits,
        on_hurry=hurry.start,
    )
    code = asyncio.run(process.run(announce))
    if engine.hung or process.is_hurried:  # an ordinary exit would wait for its threads
        _leave(code)
    _flush()
    return code


def _leave(code: int) -> None:
    """End the process now, whatever its threads do. The kernel ends its workers with it."""
    logging.shutdown()
    _flush()
    os._exit(code)


def _flush() -> None:
    """Write what was printed; what can't be written is dropped, and doesn't change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # it is where whoever started this closed it
                stream.flush()
        except OSError:  # a full disk, or a pipe that nobody reads: Python would try again at the very end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def as_seen(networks: Sequence[str]) -> list[str]:
    """With IPv4's as a socket that listens on :: sees them, too: 10.0.0.1 is ::ffff:10.0.0.1 there."""
    parsed = [ipaddress.ip_network(network) for network in networks]
    mapped = [f"::ffff:{net.network_address}/{96 + net.prefixlen}" for net in parsed if net.version == 4]
    return [*networks, *mapped]


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(_BACKLOG)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are ours: uvicorn would stop listening at once and end by the signal


class Process:
    """One run of the server. `drain_seconds` is the time that running requests get to end; `on_hurry` is called at
    the second signal.
    """

    def __init__(
        self,
        app: FastAPI,
        engine: EngineClient,
        bound: socket.socket,
        drain_seconds: float = DRAIN_SECONDS,
        supervisor: Supervisor | None = None,
        flag: BusyFlag | None = None,
        trusted_proxies: Sequence[str] = (),
        limits: Limits | None = None,
        on_hurry: Callable[[], None] = lambda: None,
    ) -> None:
        self._connections = Connections(limits or Limits())
        config = uvicorn.Config(
            app,
            http=self._connections.protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(trusted_proxies),
            forwarded_allow_ips=as_seen(trusted_proxies),
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_FLUSH_SECONDS,
            # The connections that asyncio accepts in a turn. With 1, a new one waited 2 s behind a burst of 400.
            # `_Server` says how many may wait.
            backlog=16,
        )
        self._server = _Server(config)
        self._engine = engine
        self._bound = bound
        self._drain_seconds = drain_seconds
        self._supervisor = supervisor or Supervisor(0, ())
        self._flag = flag
        self._num_signals = 0
        self._on_hurry = on_hurry

    @property
    def is_hurried(self) -> bool:
        """Whether it was told to stop more than once."""
        return self._num_signals > 1

    async def run(self, announce: Callable[[], None]) -> int:
        """Serve until told to stop; the exit code."""
        try:
            return await self._run(announce)
        finally:
            self._supervisor.ask_to_stop()
            while self._supervisor.is_running:
                if self.is_hurried:
                    self._supervisor.hurry()
                await asyncio.sleep(_POLL_SECONDS)
            log.info("stopped")

    async def _run(self, announce: Callable[[], None]) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # the last: its terminal was closed
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # as nohup has it
            loop.add_signal_handler(number, self._signalled)
        serving = asyncio.create_task(self._server.serve(sockets=[self._bound]))
        watching = asyncio.create_task(self._connections.watch())
        announced = False
        while not (serving.done() or self._num_signals or self._engine.dead):
            if not announced and self._server.started and self._engine.ready:
                announced = True
                self._supervisor.start()
                announce()
            await self._tick()
        self._supervisor.ask_to_stop()
        if self._engine.dead:
            log.critical("the engine can't go on: exiting")
            await asyncio.sleep(_DEAD_SECONDS)
        elif self._num_signals:
            await self._drain()
        self._server.should_exit = True
        try:
            await serving
        except OSError as error:  # the address was taken between binding and listening
            await self._engine.stop()
            host, port = self._bound.getsockname()[:2]
            raise cannot_listen(host, port, error) from None
        finally:
            watching.cancel()
        return 1 if self._engine.dead else 0

    async def _tick(self) -> None:
        """A moment, at whose start trainers are told how busy the engine is."""
        if self._flag is not None:
            self._flag.set(self._engine.num_in_flight)
        await asyncio.sleep(_POLL_SECONDS)

    def _signalled(self) -> None:
        self._num_signals += 1
        self._engine.drain()
        if self._num_signals == 2:
            self._on_hurry()

    async def _drain(self) -> None:
        """Let what runs end; what doesn't in time is told so."""
        left = self._engine.num_in_flight
        waits = (
            f"waiting at most {self._drain_seconds:.0f} s for {plural(left, 'running sequence')}"
            if left
            else "no request runs"
        )
        log.info(
            "told to stop: taking nothing new, %s; a job that trains goes back to the queue; a second signal "
            "(Ctrl-C) stops at once",
            waits,
        )
        deadline = asyncio.get_running_loop().time() + self._drain_seconds
        while not self.is_hurried and asyncio.get_running_loop().time() < deadline:
            is_busy = self._engine.num_in_flight or self._server.server_state.tasks  # uploads, say
            if not is_busy or self._engine.dead:
                return
            await self._tick()
        await self._engine.stop()
