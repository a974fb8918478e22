"""Simulated worlds: the number and speed of replicas, and the requests, which are the same for all policies."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.cluster.rank import Part

RANKS, SHARES = (8, 16, 32, 64), (0.3, 0.4, 0.2, 0.1)
RANK_BYTES = 610_000  # bytes of one rank of all linear modules of SmolLM2-135M in bf16
NUM_PARTS = (0.85, 0.10, 0.05)  # shares of expressions with 1, 2 and 3 parts
BASE_SHARE = 0.1  # share of requests without an adapter
PREFIX_SHARE = 0.5  # share of requests that begin with a shared text
PREFIXES = 2  # shared texts per adapter
BASE_PREFIXES = 1000
PREFIX_TOKENS = 512  # per shared text, whose blocks are cached and evicted together here


@dataclass(frozen=True)
class World:
    """Parameters of a world. Times are in seconds."""

    title: str
    zipf: float = 1.0  # the k-th most popular adapter's share is proportional to k^-zipf
    load: float = 0.7  # share of the decoding throughput of all replicas at full batches
    report_every: float = 0.5  # seconds between reports
    num_routers: int = 8  # API processes; each knows only its own requests since the last report
    own_counts: int = 8  # weight of a router's own request in its view of a queue until the next report
    num_replicas: int = 1000
    num_adapters: int = 100_000
    num_requests: int = 160_000
    warm_up: int = 100_000  # number of initial requests that aren't counted
    max_num_seqs: int = 32
    places: int = 64  # adapters of mean size that fit on a replica
    prefix_places: int = 128  # shared texts that fit in a replica's prefix cache
    token_time: float = 0.008  # of a sequence alone; twice as long in a full batch
    prefill_time: float = 1e-4  # per token
    load_latency: float = 0.03  # of the object store
    load_bandwidth: float = 200e6  # bytes per second from the object store
    failures: float = 1.0  # per second, over all replicas
    downtime: float = 5.0
    seed: int = 0

    @property
    def capacity(self) -> int:
        """Bytes available for resident adapters."""
        return int(self.places * RANK_BYTES * float(np.dot(RANKS, SHARES)))

    def batch_token_time(self, running: int) -> float:
        """Return the seconds between two tokens of a sequence if `running` sequences share the batch."""
        return self.token_time * (1 + running / self.max_num_seqs)


@dataclass(eq=False)
class Request:
    arrival: float
    router: int
    parts: tuple[Part, ...]
    prefix: tuple[int, ...]  # one number for the blocks of the shared text; other blocks are never shared
    prompt_tokens: int  # after the shared text
    output_tokens: int
    counted: bool
    tries: int = 0


def adapters(world: World) -> list[Part]:
    """Return the adapters, the most popular first."""
    sizes = np.random.default_rng(world.seed).choice(RANKS, world.num_adapters, p=SHARES) * RANK_BYTES
    return [Part(f"{index:05x}", int(size)) for index, size in enumerate(sizes)]


def requests(world: World) -> Iterator[Request]:
    """Yield the requests in order of arrival (Poisson). Every call yields the same requests."""
    draw = np.random.default_rng(world.seed + 1)
    count = world.num_requests
    prompts = np.minimum(draw.lognormal(np.log(200), 0.8, count), 4096).astype(int) + 1
    outputs = np.minimum(draw.lognormal(np.log(100), 0.8, count), 2048).astype(int) + 1
    busy = world.batch_token_time(world.max_num_seqs) * outputs.mean() + world.prefill_time * prompts.mean()
    rate = world.load * world.num_replicas * world.max_num_seqs / busy
    arrivals = np.cumsum(draw.exponential(1 / rate, count))
    known = adapters(world)
    num_parts = np.where(draw.random(count) < BASE_SHARE, 0, draw.choice((1, 2, 3), count, p=NUM_PARTS))
    popular = zipf(draw, world.num_adapters, world.zipf, (count, 3))
    base_texts = zipf(draw, BASE_PREFIXES, 1.0, (count,))
    texts = draw.integers(0, PREFIXES, count)
    shared = draw.random(count) < PREFIX_SHARE
    routers = draw.integers(0, world.num_routers, count)
    for i in range(count):
        parts = {known[index].digest: known[index] for index in popular[i, : num_parts[i]]}
        prefix = (_text(tuple(parts), int(texts[i]) if parts else int(base_texts[i])),) if shared[i] else ()
        yield Request(
            *(float(arrivals[i]), int(routers[i]), tuple(parts.values()), prefix),
            *(int(prompts[i]), int(outputs[i]), i >= world.warm_up),
        )


def zipf(draw: np.random.Generator, count: int, exponent: float, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Draw ranks from 0, with shares proportional to (rank + 1)^-exponent."""
    shares = np.cumsum(np.arange(1, count + 1, dtype=float) ** -exponent)
    places: NDArray[np.int64] = np.searchsorted(shares, draw.random(shape) * shares[-1])
    return places


def _text(digests: tuple[str, ...], text: int) -> int:
    """Return the hash of a shared text with its adapters: equal only if both are, as in the engine."""
    key = 0
    for digest in digests:
        key = (key * 1_000_003 + int(digest, 16) + 1) & (1 << 62) - 1
    return key * 1024 + text
