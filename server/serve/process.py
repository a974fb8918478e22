"""Serve the app with uvicorn in this process, from the first connection to a clean exit.

SIGTERM, SIGINT or SIGHUP drains the server: /ready answers 503, and new requests are refused. Running and waiting
requests fail unless they finish within DRAIN_SECONDS. The exit code is 0. After a second signal the process exits
within HURRY_SECONDS, with code 1. Training workers start when everything is ready, and are asked to release
their jobs when draining begins. If the engine is dead, /ready reports this for a moment, and the exit code is 1.
The process doesn't wait for an engine's thread that hangs. SIGUSR1 calls `reload`. If systemd runs the process, it
is notified of its states.
"""

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from server.api.deps import EngineClient
from server.config import Limits
from server.config.environment import service_manager
from server.jobs.supervisor import Supervisor
from server.jobs.yielding import BusyFlag
from server.serve.address import cannot_listen
from server.serve.connections import Connections
from server.serve.event_loop import new_event_loop
from server.system.messages import plural
from server.system.service import ServiceManager

DRAIN_SECONDS = 30.0
HURRY_SECONDS = 5.0
_FLUSH_SECONDS = 3  # time for sending the last answers
_DEAD_SECONDS = 2.0  # time for probes of /ready to see why the process exits
KEEP_ALIVE_SECONDS = 75  # longer than clients and proxies keep an idle connection, so that they close it
_POLL_SECONDS = 0.05
_BACKLOG = 2048  # connections that the kernel queues until they are accepted; it may have a lower limit

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
    reload: Callable[[], Awaitable[None]],
) -> int:
    """Serve until a signal or the engine's death, and return the exit code.

    `announce` is called when the server is ready, and `reload` at SIGUSR1. X-Forwarded-For and -Proto are accepted
    from `trusted_proxies`.
    """
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
        reload=reload,
    )
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        code = runner.run(process.run(announce))
    if engine.hung or process.is_hurried:  # a normal exit would wait for threads
        _leave(code)
    _flush()
    return code


def _leave(code: int) -> None:
    """End the process at once, without waiting for threads. The kernel then ends the process's workers."""
    logging.shutdown()
    _flush()
    os._exit(code)


def _flush() -> None:
    """Flush stdout and stderr. Output that can't be written is dropped, and doesn't change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # it is None if the parent process closed it
                stream.flush()
        except OSError:  # a full disk or a closed pipe; without this Python would fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def as_seen(networks: Sequence[str]) -> list[str]:
    """Return the networks, and the IPv4 ones again in the form that a socket on `::` sees (::ffff:10.0.0.1)."""
    parsed = [ipaddress.ip_network(network) for network in networks]
    mapped = [f"::ffff:{net.network_address}/{96 + net.prefixlen}" for net in parsed if net.version == 4]
    return [*networks, *mapped]


def _log_failure(reloading: "asyncio.Future[None]") -> None:
    if not reloading.cancelled() and (error := reloading.exception()) is not None:
        log.error("can't reload: %s", type(error).__name__)


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(_BACKLOG)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `Process` handles signals; uvicorn would stop listening at once and end by the signal


class Process:
    """One run of the server.

    `drain_seconds` limits the time that running requests have to end. `on_hurry` is called at the second signal.
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
        reload: Callable[[], Awaitable[None]] | None = None,
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
            # asyncio accepts up to this many connections in a turn. With 1, a client after a burst of 400
            # waited 2 s. `_Server` sets the length of the kernel's queue.
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
        self._reload = reload
        self._reloading: asyncio.Future[None] | None = None
        self._manager = ServiceManager(*service_manager())

    @property
    def is_hurried(self) -> bool:
        """Whether more than one signal has asked the process to stop."""
        return self._num_signals > 1

    async def run(self, announce: Callable[[], None]) -> int:
        """Serve until a signal or the engine's death, stop the workers, and return the exit code."""
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
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # SIGHUP: the terminal was closed
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup ignores it
            loop.add_signal_handler(number, self._signalled)
        if self._reload is not None:
            loop.add_signal_handler(signal.SIGUSR1, self._begin_reload)
        serving = asyncio.create_task(self._server.serve(sockets=[self._bound]))
        watching = asyncio.create_task(self._connections.watch())
        announced = False
        while not (serving.done() or self._num_signals or self._engine.dead):
            if not announced and self._server.started and self._engine.ready:
                announced = True
                self._supervisor.start()
                announce()
                self._manager.notify("READY=1")
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
            await self._server.lifespan.shutdown()  # else it is cancelled later, and logs a traceback
            host, port = self._bound.getsockname()[:2]
            raise cannot_listen(host, port, error) from None
        finally:
            watching.cancel()
        return 1 if self._engine.dead else 0

    async def _tick(self) -> None:
        """Report the engine's load to the training processes, reset the watchdog, and wait for a moment."""
        self._manager.keep_alive(time.monotonic())
        if self._flag is not None:
            self._flag.set(self._engine.num_in_flight)
        await asyncio.sleep(_POLL_SECONDS)

    def _signalled(self) -> None:
        self._num_signals += 1
        self._engine.drain()
        if self._num_signals == 2:
            self._on_hurry()

    def _begin_reload(self) -> None:
        assert self._reload is not None
        self._reloading = asyncio.ensure_future(self._reload())  # kept: the loop has only a weak reference
        self._reloading.add_done_callback(_log_failure)

    async def _drain(self) -> None:
        """Wait for running requests to end. Requests that don't end in time fail."""
        self._manager.notify("STOPPING=1")
        left = self._engine.num_in_flight
        waits = (
            f"waiting at most {self._drain_seconds:.0f} s for {plural(left, 'running sequence')}"
            if left
            else "no request is running"
        )
        log.info(
            "stopping: new requests are refused; %s; training jobs go back to the queue; a second signal (Ctrl-C) "
            "stops at once",
            waits,
        )
        deadline = asyncio.get_running_loop().time() + self._drain_seconds
        while not self.is_hurried and asyncio.get_running_loop().time() < deadline:
            is_busy = self._engine.num_in_flight or self._server.server_state.tasks  # such as uploads
            if not is_busy or self._engine.dead:
                return
            await self._tick()
        await self._engine.stop()
