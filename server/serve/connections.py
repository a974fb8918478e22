"""What a connection may do to the server: how many there are, and how long each may keep it waiting.

uvicorn's own protocol for HTTP has no such bounds. A connection that is closed here loses nothing that is being
worked on: only those are, whose client has to act next. Bodies that stop are
`server.api.bodies.Body`'s part, which can still answer.
"""

import asyncio
import logging
import resource
import socket
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.problems import PROBLEMS
from server.config import Limits
from server.system.messages import plural

_UNSENT_BYTES = 128 << 10
"""Of an answer, in the kernel: without a bound it takes megabytes for a reader that has stopped."""
_READ_BYTES = 64 << 10
"""Of a connection, before others have their turn: with asyncio's 256 KiB, 400 uploads keep everybody waiting."""
_OTHER_FILES = 512
_LOOK_SECONDS = 1.0

log = logging.getLogger("smolora.api")


class Connections:
    """All connections of one server. `protocol` is what uvicorn makes of each; have `watch` run beside it."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._limits = limits
        self._open: OrderedDict[Connection, None] = OrderedDict()  # whose last event was longest ago comes first
        self._num_crowded_out = 0  # closed since the last look

    @property
    def protocol(self) -> type[H11Protocol]:
        """The class of this server's connections."""
        return type("Connection", (Connection,), {"all": self})

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: "Connection") -> None:
        """A new one; where it is one too many, the longest idle one goes, or itself where none is idle."""
        self._open[connection] = None
        if len(self._open) > self._limits.max_connections:
            idle = (other for other in self._open if other.is_idle and other is not connection)
            self._close(next(idle, connection))
            self._num_crowded_out += 1

    def touch(self, connection: "Connection") -> None:
        """Something has just happened on it."""
        if connection in self._open:
            self._open.move_to_end(connection)

    def remove(self, connection: "Connection") -> None:
        self._open.pop(connection, None)

    def look(self) -> None:
        """Close those that are out of time; and tell how many were closed, for lack of room as well."""
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
        """Look, again and again."""
        every = min(_LOOK_SECONDS, self._limits.header_timeout / 4, self._limits.stall_timeout / 4)
        while True:
            await asyncio.sleep(every)
            self.look()

    def _close(self, connection: "Connection") -> None:
        self.remove(connection)
        connection.transport.abort()


class Connection(H11Protocol):
    """One of them. What it knows of time are the moments at which something happened."""

    all: ClassVar[Connections]
    _headers_due_since: float | None = None  # None: no request has begun, or one is being answered
    _unsent = 0  # bytes of the answer, at the last look
    _unsent_since = 0.0  # when that number last changed

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        vars(transport)["max_size"] = _READ_BYTES  # asyncio has no other way to set it
        # Nothing is added to what is unsent: it shrinks, or the reader takes nothing.
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
        """Answer what isn't HTTP with a problem, unless a request's answer has begun; end the connection."""
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
        """To no protocol: who offers HTTP/2 or asks for a WebSocket is answered in HTTP/1.1, without a warning."""
        return False

    @property
    def is_idle(self) -> bool:
        """Whether the server waits for the client: for a request, or for more of one's body."""
        return not self._is_answering or (self.cycle.more_body and not self.flow.read_paused)

    def without_headers_for(self, now: float) -> float:
        """Seconds that a request has begun for, or the connection, and its headers aren't complete."""
        return 0.0 if self._headers_due_since is None else now - self._headers_due_since

    def unsent_for(self, now: float) -> float:
        """Seconds that the reader has taken nothing for, as far as was looked."""
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, now
        if unsent and self._headers_due_since is not None:
            self._headers_due_since = now  # it reads the last answer still
        return now - self._unsent_since

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _mark(self) -> None:
        """Whether a next request has begun, or the rest of one that was answered before its end has to come."""
        if self._is_answering:
            self._headers_due_since = None
        elif self._headers_due_since is None and (
            self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]
        ):
            self._headers_due_since = self.all.clock()


def allow_files(limits: Limits) -> Limits:
    """Let this process open as many files as so many connections need, as far as the system does.

    Returns the limits that hold then: with fewer files there are fewer connections, so that others can be opened.
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
        "this process may open %d files: at most %s, whatever SMOLORA_MAX_CONNECTIONS says",
        most,
        plural(num_connections, "connection"),
    )
    return limits.model_copy(update={"max_connections": num_connections})
