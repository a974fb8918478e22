"""Limit the number of connections, and the time for which each may keep the server waiting.

uvicorn's HTTP protocol has no such limits. Only connections whose client has to act next are closed, so no work is
lost. The wait for the rest of a request's body is limited by `server.api.bodies.Body`, which can still send an
answer.
"""

import asyncio
import logging
import resource
import socket
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from typing import ClassVar, TypeVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.problems import PROBLEMS
from server.config import Limits
from server.system.messages import plural

_UNSENT_BYTES = 128 << 10
"""Maximum unsent bytes of an answer in the kernel. By default it buffers megabytes for a reader that stops."""
_READ_BYTES = 64 << 10
"""Maximum bytes read from a connection at once. With asyncio's 256 KiB, 400 uploads delay all other requests."""
_OTHER_FILES = 512
_LOOK_SECONDS = 1.0

LimitsT = TypeVar("LimitsT", bound=Limits)

log = logging.getLogger("smolora.api")


class Connections:
    """All connections of one server. uvicorn uses `protocol`; run `watch` concurrently."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._limits = limits
        self._open: OrderedDict[Connection, None] = OrderedDict()  # least recently active first
        self._num_crowded_out = 0  # connections closed for lack of room since the last look

    @property
    def protocol(self) -> type[H11Protocol]:
        """The class of this server's connections."""
        return type("Connection", (Connection,), {"all": self})

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: "Connection") -> None:
        """Add a connection. If there are too many, close the longest idle one, or the new one if none is idle."""
        self._open[connection] = None
        if len(self._open) > self._limits.max_connections:
            idle = (other for other in self._open if other.is_idle and other is not connection)
            self._close(next(idle, connection))
            self._num_crowded_out += 1

    def touch(self, connection: "Connection") -> None:
        """Mark a connection as the most recently active one."""
        if connection in self._open:
            self._open.move_to_end(connection)

    def remove(self, connection: "Connection") -> None:
        self._open.pop(connection, None)

    def look(self) -> None:
        """Close the connections that have timed out, and log how many were closed since the last call."""
        closed = {"HEADER_TIMEOUT": 0, "STALL_TIMEOUT": 0, "MAX_CONNECTIONS": self._num_crowded_out}
        self._num_crowded_out = 0
        now = self.clock()
        for connection in list(self._open):
            if connection.unsent_for(now) >= self._limits.stall_timeout:
                closed["STALL_TIMEOUT"] += 1
                self._close(connection)
            elif connection.without_headers_for(now) >= self._limits.header_timeout:
                closed["HEADER_TIMEOUT"] += 1
                self._close(connection)
        for name, number in closed.items():
            if number:
                log.info("closed %s: SMOLORA_%s", plural(number, "connection"), name)

    async def watch(self) -> None:
        """Call `look` at regular intervals, forever."""
        every = min(_LOOK_SECONDS, self._limits.header_timeout / 4, self._limits.stall_timeout / 4)
        while True:
            await asyncio.sleep(every)
            self.look()

    def _close(self, connection: "Connection") -> None:
        self.remove(connection)
        connection.transport.abort()


class Connection(H11Protocol):
    """One connection. It records when events happen; `Connections` closes it after a timeout."""

    all: ClassVar[Connections]
    _headers_due_since: float | None = None  # None: no request has begun, or a request is being answered
    _unsent = 0  # bytes of the answer, at the last look
    _unsent_since = 0.0  # when that number last changed

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        vars(transport)["max_size"] = _READ_BYTES  # asyncio has no other way to set it
        # Pause writing while any bytes are unsent. Then their number shrinks unless the reader has stopped.
        transport.set_write_buffer_limits(high=0)
        if (option := getattr(socket, "TCP_NOTSENT_LOWAT", None)) is not None:
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, option, _UNSENT_BYTES)
        super().connection_made(transport)
        self._headers_due_since = self.all.clock()
        self.all.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.all.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.all.touch(self)
        super().data_received(data)
        self._mark()

    def on_response_complete(self) -> None:
        self.all.touch(self)
        super().on_response_complete()
        self._mark()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP with an RFC 9457 problem, unless an answer has begun, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            own_id = uuid.uuid4().hex
            log.warning("not HTTP: request=%s client=%s", own_id, self.client[0] if self.client else "-")
            problem = PROBLEMS.problem(400, msg, headers={"X-Request-Id": own_id, "Connection": "close"})
            for event in (
                h11.Response(status_code=400, headers=problem.raw_headers, reason=b"Bad Request"),
                h11.Data(data=bytes(problem.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _should_upgrade(self) -> bool:
        """Return False, so that offers of HTTP/2 and of WebSockets are answered in HTTP/1.1 without a warning."""
        return False

    @property
    def is_idle(self) -> bool:
        """Whether the server is waiting for the client to send a request, or more of a request's body."""
        return not self._is_answering or (self.cycle.more_body and not self.flow.read_paused)

    def without_headers_for(self, now: float) -> float:
        """Return for how many seconds a request's headers have been incomplete, or 0 if none are arriving."""
        return 0.0 if self._headers_due_since is None else now - self._headers_due_since

    def unsent_for(self, now: float) -> float:
        """Return for how many seconds the client has received nothing although data is unsent.

        Unsent data is noticed only when this method is called.
        """
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, now
        if unsent and self._headers_due_since is not None:
            self._headers_due_since = now  # the client is still reading the last answer
        return now - self._unsent_since

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _mark(self) -> None:
        """Start the timeout for headers if a request has begun to arrive. Stop it while a request is answered."""
        if self._is_answering:
            self._headers_due_since = None
        elif self._headers_due_since is None and (
            self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]
        ):
            self._headers_due_since = self.all.clock()


def allow_files(limits: LimitsT) -> LimitsT:
    """Raise this process's limit on open files to what the connections need, as far as the system allows.

    If the system allows fewer files, return limits with fewer connections, so that other files can be opened.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.max_connections + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return limits
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most == wanted:
        return limits
    num_connections = max(most - _OTHER_FILES, most // 2)
    if num_connections >= limits.max_connections:
        return limits
    log.warning(
        "this process may open only %d files, so it accepts at most %s, fewer than SMOLORA_MAX_CONNECTIONS",
        most,
        plural(num_connections, "connection"),
    )
    return limits.model_copy(update={"max_connections": num_connections})
