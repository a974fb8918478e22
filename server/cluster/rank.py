"""Which engine replica a request goes to: one pure function of what the request needs and what replicas have.

Ways of others that it is put together from:
- Rendezvous hashing (Thaler and Ravishankar, 1998): each replica draws a number for each adapter and the highest is
  its home, so that a replica that comes or goes moves only its own share of the adapters.
- Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018): who has more than its share of the
  requests takes no more, which go to the next in the adapter's order. So a hot adapter gets a second home by itself.
- A product with the golden ratio of 2⁶⁴ for a hash (Knuth, The Art of Computer Programming, 6.4).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

SPILL = 1.25
"""A replica takes requests up to this multiple of the mean queue."""
ALWAYS_OPEN = 4
"""So many requests are never too many: they share a batch, which costs less than to load an adapter elsewhere."""


@dataclass(frozen=True)
class Part:
    """A weighted digest of the request's expression, without the weight."""

    digest: str
    num_bytes: int  # that are loaded where it isn't resident


@dataclass(frozen=True)
class Replica:
    """What is known of a replica, which may be old: a wrong guess costs time, never an answer."""

    id: str
    resident: frozenset[str]  # digests
    queue: int  # requests sent to it and not ended: waiting and running
    cached: Collection[int] = frozenset()  # hashes of the blocks in its prefix cache; a set


def rank(parts: Sequence[Part], prefix: Sequence[int], replicas: Sequence[Replica]) -> list[str]:
    """The ids of all `replicas`, the best first; it depends neither on their order nor on chance.

    `prefix`: a hash for each of the prompt's leading full blocks, chained: equal only where all tokens before it and
    the adapters are equal, too. Only blocks that a replica has without a gap from the start count.

    1. With room (see `room`): most resident bytes of the parts, then most of the prefix cached, then the shortest
       queue, then an order that differs from prompt to prompt: many routers that know the same would else all
       choose the same.
    2. With room, but cold: nothing resident of the parts, or where there are none nothing cached. The largest part's
       rendezvous order; without parts the shortest queue.
    3. Without room: the shortest queue.
    """
    if not replicas:
        return []
    limit = room([replica.queue for replica in replicas])
    sizes = {part.digest: part.num_bytes for part in parts}
    home = _number(max(sizes, key=lambda digest: (sizes[digest], digest))) if sizes else 0
    prompt = home ^ (prefix[-1] if prefix else 0)
    warm: list[tuple[int, int, int, int, str]] = []
    cold: list[tuple[int, int, str]] = []
    full: list[tuple[int, int, str]] = []
    for replica in replicas:
        number, queue = _number(replica.id), replica.queue
        if queue >= limit:
            full.append((queue, _mixed(number, prompt), replica.id))
            continue
        resident = sum(sizes[digest] for digest in sizes if digest in replica.resident)
        run = _run(prefix, replica.cached)
        if resident or run:
            warm.append((-resident, -run, queue, _mixed(number, prompt), replica.id))
        elif sizes:
            cold.append((0, _mixed(number, home), replica.id))
        else:
            cold.append((queue, _mixed(number, prompt), replica.id))
    return [entry[-1] for group in (sorted(warm), sorted(cold), sorted(full)) for entry in group]


def room(queues: Sequence[int]) -> int:
    """How many requests a replica may have: with fewer, it has room for one more. Some replica always has."""
    return max(ALWAYS_OPEN, math.ceil(SPILL * (sum(queues) + 1) / len(queues)))


def _run(prefix: Sequence[int], cached: Collection[int]) -> int:
    """How many of the leading blocks are cached."""
    for count, block in enumerate(prefix):
        if block not in cached:
            return count
    return len(prefix)


@lru_cache(maxsize=1 << 16)
def _number(text: str) -> int:
    """A name as 64 bits."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def _mixed(replica: int, request: int) -> int:
    """64 bits that depend on both: the order of replicas by it is another one for each request."""
    return (replica ^ request) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
