"""The curves: what grows along each of them, and the load at each point."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from benchmarks.serving.adapter_files import RANK
from benchmarks.serving.systems.wires import Part

BASE, UNIFORM, ZIPF, EACH = "base", "uniform", "Zipf", "an adapter each"


@dataclass(frozen=True)
class Adapter:
    rank: int
    index: int

    @property
    def name(self) -> str:
        return f"r{self.rank}-{self.index}"


@dataclass(frozen=True)
class Load:
    """What is run at a point of a curve."""

    series: str
    x: int  # what grows; 0 of the base where what grows is of adapters
    streams: int
    requests: int  # of each stream
    prompt_tokens: int
    max_tokens: int
    adapters: tuple[Adapter, ...] = ()  # that requests may name, the most popular first
    popularity: tuple[float, ...] = ()  # of each, where requests draw theirs; else every stream has its own
    blend: int = 1  # adapters of a request
    is_cached: bool = False  # prompts are sent for one token before, for TTFT, and are then in the prefix cache

    def parts(self, stream: int, draw: Random) -> tuple[Part, ...]:
        """Of a request of the stream, counted from 0."""
        if not self.adapters:
            return ()
        if self.popularity:
            (drawn,) = draw.choices(self.adapters, self.popularity)
            return (Part(drawn.name),)
        indices = range(stream, stream + self.blend)
        return tuple(Part(self.adapters[index % len(self.adapters)].name, 1 / self.blend) for index in indices)


@dataclass(frozen=True)
class Plan:
    """A curve to be measured."""

    name: str
    title: str
    axis: str  # what grows
    work: str  # what every point has in common, for people
    loads: tuple[Load, ...]
    room: int  # the sum of the ranks of adapters that are resident at once
    max_num_seqs: int | None = None  # sequences in one batch; None: the server's default

    @property
    def adapters(self) -> list[Adapter]:
        """All that its loads may name, each once."""
        return list(dict.fromkeys(adapter for load in self.loads for adapter in load.adapters))


@dataclass(frozen=True)
class Scale:
    """How far the curves go. Quick runs differ from full ones here alone."""

    distinct: tuple[int, ...]
    distinct_streams: int
    pool: int  # adapters of the usual rank that have room, of the distinct ones
    ranks: tuple[int, ...]
    blends: tuple[int, ...]
    streams_of_adapters: int  # of the curves of ranks and blends
    contexts: tuple[int, ...]
    context_streams: tuple[int, ...]
    context_tokens: int  # new ones
    streams: tuple[int, ...]
    prompt_tokens: int
    max_tokens: int

    @classmethod
    def full(cls, registered: int, pool: int, max_positions: int) -> "Scale":
        return cls(
            distinct=(*(count for count in (1, 4, 16, 64, 250) if count < registered), registered),
            distinct_streams=32,
            pool=pool,
            ranks=(4, 16, 64, 256, 512),
            blends=(1, 2, 4, 8),
            streams_of_adapters=8,
            contexts=tuple(length for length in (128, 512, 2048, 8192) if length <= max_positions),
            context_streams=(1, 4),
            context_tokens=64,
            streams=(1, 2, 4, 8, 16, 32, 64),
            prompt_tokens=64,
            max_tokens=32,
        )

    @classmethod
    def quick(cls) -> "Scale":
        return cls((1, 6), 4, 4, (4, 8), (1, 2), 2, (64, 128), (1, 2), 8, (1, 2), 24, 4)


def distinct_adapters(scale: Scale) -> Plan:
    def load(series: str, count: int, popularity: Callable[[int], float]) -> Load:
        adapters = tuple(Adapter(RANK, index) for index in range(count))
        weights = tuple(popularity(place) for place in range(1, count + 1))
        sizes = (scale.distinct_streams, 2, scale.prompt_tokens, scale.max_tokens)
        return Load(series, count, *sizes, adapters, weights)

    loads = [load(BASE, 0, lambda place: 1.0)]
    loads += [load(UNIFORM, count, lambda place: 1.0) for count in scale.distinct]
    loads += [load(ZIPF, count, lambda place: 1 / place) for count in scale.distinct if count > 1]
    work = (
        f"{scale.distinct_streams} streams; each request draws an adapter of rank {RANK}, uniformly or by Zipf's "
        f"law (exponent 1); {scale.pool} fit into memory"
    )
    room = scale.pool * RANK
    return Plan("adapters", "Distinct adapters", "adapters that requests draw from", work, tuple(loads), room)


def ranks(scale: Scale) -> Plan:
    streams = scale.streams_of_adapters
    loads = [_even(scale, BASE, 0, streams)]
    for count, series in ((1, "1 adapter"), (streams, f"{streams} adapters")):
        for rank in scale.ranks:
            adapters = tuple(Adapter(rank, index) for index in range(count))
            loads.append(_even(scale, series, rank, streams, adapters))
    work = f"{streams} streams under one adapter, or under {streams} of the same rank"
    return Plan("ranks", "Rank", "rank of every adapter", work, tuple(loads), _room(loads))


def blends(scale: Scale) -> Plan:
    streams = scale.streams_of_adapters
    adapters = tuple(Adapter(RANK, index) for index in range(max(streams, *scale.blends)))
    loads = [_even(scale, BASE, 0, streams)]
    loads += [_even(scale, "blends", size, streams, adapters, size) for size in scale.blends]
    work = f"{streams} streams, each with a blend of its own of adapters of rank {RANK}"
    return Plan("blends", "Blend size", "adapters of each request", work, tuple(loads), _room(loads))


def contexts(scale: Scale) -> Plan:
    loads = []
    for streams in scale.context_streams:
        for length in scale.contexts:
            # one request a stream: memory shows what so many contexts take
            sizes = (streams, 1, length - scale.context_tokens, scale.context_tokens)
            series = "1 stream" if streams == 1 else f"{streams} streams"
            loads.append(Load(series, length, *sizes, is_cached=True))
    work = (
        f"the base; a prompt with {scale.context_tokens} new tokens, sent twice: for TTFT, and with its prefix "
        "cached for tokens/s and ITL"
    )
    return Plan("context", "Context", "tokens of prompt and answer", work, tuple(loads), RANK)


def streams(scale: Scale) -> Plan:
    most = max(scale.streams)
    each = tuple(Adapter(RANK, index) for index in range(most))
    # what is compared is measured one after the other
    both = ((BASE, ()), (EACH, each))
    loads = [_even(scale, kind, count, count, own[:count]) for count in scale.streams for kind, own in both]
    work = f"the base, or as many adapters of rank {RANK} as streams, in one batch (SMOLORA_MAX_NUM_SEQS={most})"
    return Plan("streams", "Streams", "streams at once", work, tuple(loads), _room(loads), most)


CURVES: dict[str, Callable[[Scale], Plan]] = {
    "adapters": distinct_adapters,
    "ranks": ranks,
    "blends": blends,
    "context": contexts,
    "streams": streams,
}
"""By the names that `--only` takes."""


def _even(
    scale: Scale, series: str, x: int, streams: int, adapters: tuple[Adapter, ...] = (), blend: int = 1
) -> Load:
    """Streams that each keep to their adapters. Few streams make several requests: short runs are noisy."""
    requests = max(1, min(4, 16 // streams))
    return Load(series, x, streams, requests, scale.prompt_tokens, scale.max_tokens, adapters, blend=blend)


def _room(loads: Sequence[Load]) -> int:
    """For all adapters of all loads."""
    return sum(adapter.rank for adapter in {adapter for load in loads for adapter in load.adapters})
