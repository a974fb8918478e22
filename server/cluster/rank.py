"""Routing: which engine replica gets a request, as a pure function of the request and the replicas' states.

It combines known methods:
- Rendezvous hashing (Thaler and Ravishankar, 1998): a hash gives each replica a number for each adapter, and the
  replica with the highest number is the adapter's home. If a replica is added or removed, only its share of the
  adapters moves.
- Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018): a replica with more than its
  share of the requests gets no more; they go to the next replica in the adapter's order. A hot adapter thus gets a
  second home automatically.
- Multiplicative hashing with the golden ratio of 2⁶⁴ (Knuth, The Art of Computer Programming, 6.4).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

SPILL = 1.5
"""A replica gets requests up to this multiple of the mean queue.

Queues vary by a factor of 1.25 by chance, so 1.25 would move adapters that aren't hot, too. With 2, queues grow
beyond a batch while other replicas have room in theirs (simulated by `python -m benchmarks.routing`)."""
ALWAYS_OPEN = 4
"""A queue with fewer requests is never full: sharing a batch costs less than loading an adapter."""
GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Part:
    """One adapter of the request's expression, without its weight."""

    digest: str
    num_bytes: int  # to load if it isn't resident


@dataclass(frozen=True)
class Replica:
    """A replica's known state. An outdated state costs time, but never changes an answer."""

    id: str
    resident: frozenset[str]  # digests, at least those of the request's adapters
    queue: int  # unfinished requests, waiting or running
    cached: Collection[int] = frozenset()  # hashes of the blocks in its prefix cache, as a set


def rank(
    parts: Sequence[Part], prefix: Sequence[int], replicas: Sequence[Replica], limit: int | None = None
) -> list[str]:
    """Return the ids of all `replicas`, the best first. The order of the argument `replicas` doesn't matter.

    `parts` are the request's adapters. `prefix` has a hash for each of the prompt's leading full blocks. Hashes
    are chained: they are equal only if the adapters and all tokens up to the block's end are equal. Only a gapless
    run of cached blocks from the start counts. A replica has room if its queue is shorter than `limit`, which the
    function `room` computes. If `limit` is None, it is computed from `replicas`; if these are only some of all
    replicas, pass the limit that is computed from all.

    The groups of replicas, from best to worst, and the order within each:

    1. With room, and with an adapter or a block of the request: the most resident bytes of the adapters, the most
       blocks of the prefix, the shortest queue, then an order that differs between prompts, so that routers with
       the same knowledge don't all choose the same replica.
    2. With room, but without these: the rendezvous order of the largest adapter; without adapters the shortest
       queue.
    3. Without room: the shortest queue.
    """
    if limit is None:
        limit = room(sum(replica.queue for replica in replicas), len(replicas))
    sizes = {part.digest: part.num_bytes for part in parts}
    home = number(max(sizes, key=lambda digest: (sizes[digest], digest))) if sizes else 0
    prompt = home ^ (prefix[-1] if prefix else 0)
    warm: list[tuple[int, int, int, int, str]] = []
    cold: list[tuple[int, int, str]] = []
    full: list[tuple[int, int, str]] = []
    for replica in replicas:
        own, queue = number(replica.id), replica.queue
        if queue >= limit:
            full.append((queue, -mixed(own, prompt), replica.id))
            continue
        resident = sum(sizes[digest] for digest in sizes if digest in replica.resident)
        run = _run(prefix, replica.cached)
        if resident or run:
            warm.append((-resident, -run, queue, -mixed(own, prompt), replica.id))
        elif sizes:
            cold.append((0, -mixed(own, home), replica.id))
        else:
            cold.append((queue, -mixed(own, prompt), replica.id))
    return [entry[-1] for group in (sorted(warm), sorted(cold), sorted(full)) for entry in group]


def room(total: int, count: int) -> int:
    """Return the queue length at which a replica counts as full, if `count` replicas have `total` requests.

    At least one replica always has room.
    """
    return max(ALWAYS_OPEN, math.ceil(SPILL * (total + 1) / count)) if count else ALWAYS_OPEN


def _run(prefix: Sequence[int], cached: Collection[int]) -> int:
    """Return the number of blocks in `prefix` before the first one that isn't cached."""
    for count, block in enumerate(prefix):
        if block not in cached:
            return count
    return len(prefix)


@lru_cache(maxsize=1 << 16)
def number(text: str) -> int:
    """Hash a name to 64 bits."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def mixed(replica: int, request: int) -> int:
    """Mix the numbers of a replica and a request into one number of 64 bits.

    The mixture gives each request its own order of replicas.
    """
    return (replica ^ request) * GOLDEN & 0xFFFFFFFFFFFFFFFF
