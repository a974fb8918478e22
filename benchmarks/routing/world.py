"""What is simulated: how many replicas, how fast they are, and the requests, the same for all policies."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.cluster.rank import Part

RANKS, SHARES = (8, 16, 32, 64), (0.3, 0.4, 0.2, 0.1)
RANK_BYTES = 610_000  # a rank row of all linear modules of SmolLM2-135M in bf16
NUM_PARTS = (0.85, 0.10, 0.05)  # shares of expressions with 1, 2 and 3 parts
BASE_SHARE = 0.1  # of requests, that name no adapter
PREFIX_SHARE = 0.5  # of requests, that begin with a shared text
PREFIXES = 2  # such texts an adapter
BASE_PREFIXES = 1000
PREFIX_TOKENS = 512  # of a shared text, whose blocks come and go together here


@dataclass(frozen=True)
class World:
    """Times are in seconds."""

    title: str
    zipf: float = 1.0  # the k-th most popular adapter's share is in proportion to k^-zipf
    load: float = 0.7  # of what all replicas can decode at full batches
    report_every: float = 0.5  # how old what routers know becomes
    num_routers: int = 8  # API processes, each knowing only what it sent itself since the last report
    own_counts: int = 8  # a router's request, in the queue that it knows, until the next report; 1: it alone
    num_replicas: int = 1000
    num_adapters: int = 100_000
    num_requests: int = 160_000
    warm_up: int = 100_000  # the first requests, which aren't counted
    max_num_seqs: int = 32
    places: int = 64  # adapters of mean size that a replica has room for
    prefix_places: int = 128  # shared texts in a replica's prefix cache
    token_time: float = 0.008  # of a sequence that runs alone; twice that in a full batch
    prefill_time: float = 1e-4  # a token
    load_latency: float = 0.03  # of the object store
    load_bandwidth: float = 200e6  # bytes a second from it
    failures: float = 1.0  # a second, of any replica
    downtime: float = 5.0
    seed: int = 0

    @property
    def capacity(self) -> int:
        """Bytes of resident adapters."""
        return int(self.places * RANK_BYTES * float(np.dot(RANKS, SHARES)))

    def batch_token_time(self, running: int) -> float:
        """Between two tokens of a sequence, `running` of them together."""
        return self.token_time * (1 + running / self.max_num_seqs)


@dataclass(eq=False)
class Request:
    arrival: float
    router: int
    parts: tuple[Part, ...]
    prefix: tuple[int, ...]  # one number for the shared text's blocks; its own tokens are nobody else's
    prompt_tokens: int  # after the shared text
    output_tokens: int
    counted: bool
    tries: int = 0


def adapters(world: World) -> list[Part]:
    """The most popular first."""
    sizes = np.random.default_rng(world.seed).choice(RANKS, world.num_adapters, p=SHARES) * RANK_BYTES
    return [Part(f"{index:05x}", int(size)) for index, size in enumerate(sizes)]


def requests(world: World) -> Iterator[Request]:
    """In the order of their arrival (Poisson), the same whenever they are asked for."""
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
    """Places from 0, with shares in proportion to (place + 1)^-exponent."""
    shares = np.cumsum(np.arange(1, count + 1, dtype=float) ** -exponent)
    places: NDArray[np.int64] = np.searchsorted(shares, draw.random(shape) * shares[-1])
    return places


def _text(digests: tuple[str, ...], text: int) -> int:
    """The hash of a shared text under adapters, as the engine has it: equal only where both are."""
    key = 0
    for digest in digests:
        key = (key * 1_000_003 + int(digest, 16) + 1) & (1 << 62) - 1
    return key * 1024 + text
