"""Throughput under overload, compared with peak throughput.

The peak is measured with a full batch of streams that each send the next request at once. Then requests arrive at
five times that rate, whatever happens to them; refused requests aren't retried. Both count the tokens that arrive
within the measured time, after a warm-up.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp

from benchmarks.measure import Figure, percentile
from benchmarks.serving.load import Answer, Exchange, http_client, send, without_collector
from benchmarks.serving.systems.wires import Request, Wire

TIMES = 5.0
LEFT_OUT = 1 / 12
"""Warm-up, as a share of each measurement's duration."""
PEAK_SHARE = 1 / 3
"""Duration of the peak's measurement, as a share of `seconds`."""
AT_MOST = 20
"""Requests per second for which prompts are prepared: preparing more during the run would slow the server."""


@dataclass(frozen=True)
class Overload:
    """Results with an entry for each round."""

    streams: int  # at the peak
    seconds: float  # duration of the arrivals
    peak: tuple[Figure, ...]  # tokens per second
    goodput: tuple[Figure, ...]  # tokens per second of accepted requests
    offered: tuple[Figure, ...]  # requests per second
    refused: tuple[Figure, ...]  # share of refused requests
    first_token: tuple[Figure, ...]  # seconds, the median of answered requests


@dataclass(frozen=True)
class Round:
    peak: float
    goodput: float
    offered: float
    refused: float
    first_token: float


class _Refused(Exception):
    """A request refused because the server is too busy."""


def measure(url: str, wire: Wire, take: Callable[[int], Sequence[Request]], streams: int, seconds: float) -> Round:
    """Measure the peak, then overload. `take` returns new requests, all of one length."""
    with without_collector():
        peak = asyncio.run(_closed(url, wire, take, streams, seconds * PEAK_SHARE))
    rate = TIMES * peak / take(1)[0].max_tokens
    requests = take(max(int(rate * seconds), 1))
    with without_collector():
        exchanges, refused, start, stop = asyncio.run(_open(url, wire, requests, 1 / rate, seconds))
    answers = [Answer.of(exchange, wire) for exchange in exchanges]
    first = [answer.first_token for answer in answers if answer.arrivals]
    goodput = _speed(exchanges, wire, start, stop)
    return Round(peak, goodput, rate, refused / len(requests), percentile(first, 50))


async def _closed(
    url: str, wire: Wire, take: Callable[[int], Sequence[Request]], streams: int, seconds: float
) -> float:
    """Return tokens per second of `streams` closed-loop streams."""
    exchanges: list[Exchange] = []
    waiting = list(take(streams + int(seconds * AT_MOST)))
    async with http_client(url) as client:
        start = time.perf_counter()

        async def follow() -> None:
            while time.perf_counter() - start < seconds:
                if not waiting:
                    waiting.extend(take(streams))
                exchange = Exchange(waiting.pop())
                exchanges.append(exchange)
                await send(client, wire, exchange)

        await asyncio.gather(*(follow() for _ in range(streams)))
    return _speed(exchanges, wire, start + seconds * LEFT_OUT, start + seconds)


async def _open(
    url: str, wire: Wire, requests: Sequence[Request], every: float, seconds: float
) -> tuple[list[Exchange], int, float, float]:
    """Send requests at a fixed rate; return those started, the number refused, and the measured interval."""
    exchanges = [Exchange(request) for request in requests]
    async with http_client(url) as client:
        start = time.perf_counter()
        tasks = []
        for number, exchange in enumerate(exchanges):
            await asyncio.sleep(max(start + number * every - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(_try(client, wire, exchange)))
        await asyncio.sleep(max(start + seconds - time.perf_counter(), 0))
        stop = time.perf_counter()
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception) and not isinstance(end, _Refused):
            raise end
    begun = [exchange for exchange in exchanges if exchange.chunks]
    refused = sum(isinstance(end, _Refused) for end in ends)
    return begun, refused, start + seconds * LEFT_OUT, stop


async def _try(client: aiohttp.ClientSession, wire: Wire, exchange: Exchange) -> None:
    exchange.sent = time.perf_counter()
    async with client.post(wire.path, json=wire.body(exchange.request)) as response:
        if response.status in (429, 503):
            raise _Refused
        response.raise_for_status()
        async for chunk in response.content.iter_any():
            exchange.chunks.append((time.perf_counter(), chunk))


def _speed(exchanges: Sequence[Exchange], wire: Wire, start: float, stop: float) -> float:
    """Return pieces of text per second in the interval. Raise if a stream failed."""
    arrivals = [at for exchange in exchanges for at in Answer.of(exchange, wire).arrivals]
    return sum(start <= at <= stop for at in arrivals) / (stop - start)
