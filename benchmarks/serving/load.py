"""Load generator: streamed requests over HTTP from this process.

A stream sends its next request when the last one has ended. The client shares the cores with the server, so it
must use as little processor time as possible: while requests run, it only records the time at which bytes arrive
and parses them afterwards; aiohttp parses HTTP in C.
"""

import asyncio
import gc
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import aiohttp

from benchmarks.measure import Run, differences
from benchmarks.serving.systems.wires import Request, Usage, Wire

TIMEOUT = 900.0  # seconds without a byte
MAX_CONNECTIONS = 512
"""Connections at once. Servers close connections above their own limit: ours above 1,024 by default."""
MAX_RESENDS = 3
"""Resends of a request whose connection is dropped, so that a server that sometimes drops one can be measured."""
RESEND_AFTER = 0.1
"""Seconds of pause, which count towards the request's latency."""


@dataclass
class Exchange:
    """A request in flight: the bytes received, and when."""

    request: Request
    sent: float = 0.0
    ended: float = 0.0
    chunks: list[tuple[float, bytes]] = field(default_factory=list)
    num_resent: int = 0


@dataclass(frozen=True)
class Answer:
    """The answer of a stream. Times are those of `time.perf_counter`."""

    request: Request
    sent: float
    ended: float
    arrivals: tuple[float, ...]  # of each piece of text, nearly always one token
    text: str
    usage: Usage | None  # None if the stream was cut off
    num_resent: int

    @classmethod
    def of(cls, exchange: Exchange, wire: Wire) -> "Answer":
        """Parse the answer. Raise RuntimeError if the server reported a failure."""
        arrivals: list[float] = []
        pieces: list[str] = []
        usage: Usage | None = None
        for at, event in _events(exchange.chunks):
            if event == b"data: [DONE]" or event.startswith(b":"):  # the end, or a keep-alive comment
                continue
            if not event.startswith(b"data: "):
                raise RuntimeError(f"a stream failed: {event.decode()}")
            found = wire.read(json.loads(event.removeprefix(b"data: ")))
            if isinstance(found, Usage):
                usage = found
            else:
                arrivals.append(at)
                pieces.append(found)
        times = (exchange.sent, exchange.ended, tuple(arrivals))
        return cls(exchange.request, *times, "".join(pieces), usage, exchange.num_resent)

    @property
    def first_token(self) -> float:
        """Seconds from sending the request to the first text, or to the end if there was no text."""
        return (self.arrivals[0] if self.arrivals else self.ended) - self.sent


def drive(url: str, wire: Wire, streams: Sequence[Sequence[Request]]) -> list[Answer]:
    """Run the streams concurrently, with the requests of each stream in sequence; return the answers by stream.

    A request whose connection is dropped is sent again, on any server. Its partial answer is discarded; the lost
    time counts. Raise aiohttp.ClientError if resending doesn't help.
    """
    with without_collector():
        exchanges = asyncio.run(_drive(url, wire, streams))
    answers = [Answer.of(exchange, wire) for exchange in exchanges]
    for answer in answers:
        if answer.usage is None or answer.usage.num_tokens != answer.request.max_tokens:
            raise RuntimeError(f"{answer.usage} came instead of {answer.request.max_tokens} tokens")
    return answers


def interfere(
    url: str, wire: Wire, running: Sequence[Request], arriving: Sequence[Request], every: float
) -> tuple[list[float], list[float], list[float]]:
    """Measure gaps between tokens of `running` streams: undisturbed, and while an `arriving` request comes every
    `every` seconds.

    The undisturbed gaps are of one such interval. Streams that still run at the end are cut off. Returned last are
    the arriving requests' times to first token.
    """
    with without_collector():
        exchanges, arrived, quiet, start, stop = asyncio.run(_interfere(url, wire, running, arriving, every))
    alone: list[float] = []
    disturbed: list[float] = []
    for exchange in exchanges:
        arrivals = Answer.of(exchange, wire).arrivals
        alone += differences([at for at in arrivals if quiet <= at < start])
        disturbed += differences([at for at in arrivals if start <= at <= stop])
    return alone, disturbed, [Answer.of(exchange, wire).first_token for exchange in arrived]


def summarize(answers: Sequence[Answer]) -> Run:
    usages = [answer.usage for answer in answers if answer.usage is not None]
    return Run(
        sum(usage.num_tokens for usage in usages),
        max(answer.ended for answer in answers) - min(answer.sent for answer in answers),
        tuple(answer.first_token for answer in answers),
        tuple(gap for answer in answers for gap in differences(answer.arrivals)),
        tuple(answer.text for answer in answers),
        sum(usage.num_cached_tokens for usage in usages),
        sum(answer.num_resent for answer in answers),
    )


async def send(client: aiohttp.ClientSession, wire: Wire, exchange: Exchange) -> None:
    """Send the request. Raise RuntimeError if the answer isn't a stream, aiohttp.ClientError if the connection
    drops."""
    exchange.sent = exchange.sent or time.perf_counter()
    async with client.post(wire.path, json=wire.body(exchange.request)) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.text()}")
        async for chunk in response.content.iter_any():
            exchange.chunks.append((time.perf_counter(), chunk))
    exchange.ended = exchange.chunks[-1][0]


def http_client(url: str) -> aiohttp.ClientSession:
    # One connection per request: the server may close an idle connection just as the next request is sent.
    connector = aiohttp.TCPConnector(limit=MAX_CONNECTIONS, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=TIMEOUT)
    return aiohttp.ClientSession(url, connector=connector, timeout=timeout)


@contextmanager
def without_collector() -> Iterator[None]:
    """Disable garbage collection: a collection during a run would show as a gap between tokens."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def _drive(url: str, wire: Wire, streams: Sequence[Sequence[Request]]) -> list[Exchange]:
    async with http_client(url) as client:

        async def follow(requests: Sequence[Request]) -> list[Exchange]:
            exchanges = [Exchange(request) for request in requests]
            for exchange in exchanges:
                await _send_until_answered(client, wire, exchange)
            return exchanges

        done = await asyncio.gather(*map(follow, streams))
    return [exchange for exchanges in done for exchange in exchanges]


async def _send_until_answered(client: aiohttp.ClientSession, wire: Wire, exchange: Exchange) -> None:
    while True:
        try:
            return await send(client, wire, exchange)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            if exchange.num_resent == MAX_RESENDS or isinstance(error, aiohttp.ServerTimeoutError):
                raise
        exchange.chunks.clear()
        exchange.num_resent += 1
        await asyncio.sleep(RESEND_AFTER)


async def _interfere(
    url: str, wire: Wire, running: Sequence[Request], arriving: Sequence[Request], every: float
) -> tuple[list[Exchange], list[Exchange], float, float, float]:
    async with http_client(url) as client:
        exchanges = [Exchange(request) for request in running]
        tasks = [asyncio.create_task(send(client, wire, exchange)) for exchange in exchanges]
        while not all(exchange.chunks for exchange in exchanges):
            await asyncio.sleep(0.01)
            if any(task.done() for task in tasks):
                await asyncio.gather(*tasks)
                raise RuntimeError("a stream ended before the others began")
        quiet = time.perf_counter()
        await asyncio.sleep(every)
        start = time.perf_counter()
        arrived = [Exchange(request) for request in arriving]
        arrivals = []
        for exchange in arrived:
            arrivals.append(asyncio.create_task(send(client, wire, exchange)))
            await asyncio.sleep(every)
        await asyncio.gather(*arrivals)
        stop = time.perf_counter()
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):
            raise end
    return exchanges, arrived, quiet, start, stop


def _events(chunks: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Yield each event with the arrival time of its last byte."""
    rest = b""
    for at, chunk in chunks:
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            yield at, event
