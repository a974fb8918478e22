"""The load: streamed requests over HTTP, from this process alone.

A stream sends its next request when the last one has ended. While requests run, nothing is done but noting when
which bytes came; what they say is read afterwards, so that the client takes little of the cores that it shares
with the server.
"""

import asyncio
import gc
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from benchmarks.measure import Run, differences

TIMEOUT = 900.0  # seconds without a byte


@dataclass(frozen=True)
class Request:
    """A greedy request for exactly `max_tokens` tokens."""

    prompt: str
    adapter: str | None  # an expression
    max_tokens: int

    def body(self, **more: object) -> dict[str, object]:
        fields = {"prompt": self.prompt, "adapter": self.adapter, "max_tokens": self.max_tokens}
        return {**fields, "temperature": 0.0, "ignore_eos": True, **more}


@dataclass
class Exchange:
    """One request on its way: the bytes that came, and when."""

    request: Request
    sent: float = 0.0
    ended: float = 0.0
    chunks: list[tuple[float, bytes]] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """What a stream said. Times are those of `time.perf_counter`."""

    request: Request
    sent: float
    ended: float
    arrivals: tuple[float, ...]  # of each piece of text, which is a token but for a few
    text: str
    num_tokens: int = 0  # from here on: 0 where the stream was cut off
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    queue_seconds: float = 0.0  # as the server says

    @classmethod
    def of(cls, exchange: Exchange) -> "Answer":
        """RuntimeError where the server reported a failure."""
        arrivals, pieces, last = [], [], {}
        for at, event in _events(exchange.chunks):
            if event.startswith(b"event: error"):
                raise RuntimeError(f"a stream failed: {event.decode()}")
            if event == b"data: [DONE]":
                continue
            data = json.loads(event.removeprefix(b"data: "))
            if "finish_reason" in data:
                last = data
            else:
                arrivals.append(at)
                pieces.append(data["text"])
        if not last:
            return cls(exchange.request, exchange.sent, exchange.ended, tuple(arrivals), "".join(pieces))
        return cls(
            exchange.request,
            exchange.sent,
            exchange.ended,
            tuple(arrivals),
            "".join(pieces),
            int(last["usage"]["completion_tokens"]),
            int(last["usage"]["prompt_tokens"]),
            int(last["usage"]["cached_tokens"]),
            float(last["timing"]["queue_ms"]) / 1e3,
        )

    @property
    def first_token(self) -> float:
        """Seconds from sending the request to the first text, or to the end where no text came."""
        return (self.arrivals[0] if self.arrivals else self.ended) - self.sent


def drive(url: str, streams: Sequence[Sequence[Request]]) -> list[Answer]:
    """Run the streams at once, each one's requests one after the other."""
    with _without_collector():
        exchanges = asyncio.run(_drive(url, streams))
    answers = [Answer.of(exchange) for exchange in exchanges]
    for answer in answers:
        if answer.num_tokens != answer.request.max_tokens:
            raise RuntimeError(f"{answer.num_tokens} tokens came instead of {answer.request.max_tokens}")
    return answers


def interfere(
    url: str, running: Sequence[Request], arriving: Sequence[Request], every: float
) -> tuple[list[float], list[float]]:
    """Gaps between tokens of `running` streams: alone, and while a request of `arriving` comes `every` seconds.

    The first figure is of as many seconds as lie between two arrivals. What still runs at the end is cut off.
    """
    with _without_collector():
        exchanges, quiet, start, stop = asyncio.run(_interfere(url, running, arriving, every))
    alone: list[float] = []
    disturbed: list[float] = []
    for exchange in exchanges:
        arrivals = Answer.of(exchange).arrivals
        alone += differences([at for at in arrivals if quiet <= at < start])
        disturbed += differences([at for at in arrivals if start <= at <= stop])
    return alone, disturbed


def summarize(answers: Sequence[Answer]) -> Run:
    return Run(
        sum(answer.num_tokens for answer in answers),
        max(answer.ended for answer in answers) - min(answer.sent for answer in answers),
        tuple(answer.first_token for answer in answers),
        tuple(gap for answer in answers for gap in differences(answer.arrivals)),
        tuple(answer.text for answer in answers),
    )


async def _drive(url: str, streams: Sequence[Sequence[Request]]) -> list[Exchange]:
    async with _client(url) as client:

        async def follow(requests: Sequence[Request]) -> list[Exchange]:
            exchanges = [Exchange(request) for request in requests]
            for exchange in exchanges:
                await _send(client, exchange)
            return exchanges

        done = await asyncio.gather(*map(follow, streams))
    return [exchange for exchanges in done for exchange in exchanges]


async def _interfere(
    url: str, running: Sequence[Request], arriving: Sequence[Request], every: float
) -> tuple[list[Exchange], float, float, float]:
    async with _client(url) as client:
        exchanges = [Exchange(request) for request in running]
        tasks = [asyncio.create_task(_send(client, exchange)) for exchange in exchanges]
        while not all(exchange.chunks for exchange in exchanges):
            await asyncio.sleep(0.01)
            if any(task.done() for task in tasks):
                await asyncio.gather(*tasks)
                raise RuntimeError("a stream ended before the others began")
        quiet = time.perf_counter()
        await asyncio.sleep(every)
        start = time.perf_counter()
        arrivals = []
        for request in arriving:
            arrivals.append(asyncio.create_task(_send(client, Exchange(request))))
            await asyncio.sleep(every)
        await asyncio.gather(*arrivals)
        stop = time.perf_counter()
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):
            raise end
    return exchanges, quiet, start, stop


async def _send(client: httpx.AsyncClient, exchange: Exchange) -> None:
    exchange.sent = time.perf_counter()
    async with client.stream("POST", "/generate", json=exchange.request.body(stream=True)) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for chunk in response.aiter_raw():
            exchange.chunks.append((time.perf_counter(), chunk))
    exchange.ended = exchange.chunks[-1][0]


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits, trust_env=False, verify=False)


def _events(chunks: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Each event with the time at which its last byte came."""
    rest = b""
    for at, chunk in chunks:
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            yield at, event


@contextmanager
def _without_collector() -> Iterator[None]:
    """A collection amid a run would show as a gap between tokens."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
