"""The scaling curves: the variable of each curve, and the load at each point."""

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
    """The load at one point of a curve."""

    series: str
    x: int  # value of the variable; 0 for the base on a curve of adapters
    streams: int
    requests: int  # per stream
    prompt_tokens: int
    max_tokens: int
    adapters: tuple[Adapter, ...] = ()  # that requests may name, the most popular first
    popularity: tuple[float, ...] = ()  # by adapter, if requests draw adapters; otherwise each stream has its own
    blend: int = 1  # adapters per request
    is_cached: bool = False  # each prompt is sent twice: for TTFT, then with its prefix cached

    def parts(self, stream: int, draw: Random) -> tuple[Part, ...]:
        """Return the adapters of one request of the stream, counted from 0."""
        if not self.adapters:
            return ()
        if self.popularity:
            (drawn,) = draw.choices(self.adapters, self.popularity)
            return (Part(drawn.name),)
        indices = range(stream, stream + self.blend)
        return tuple(Part(self.adapters[index % len(self.adapters)].name, 1 / self.blend) for index in indices)


@dataclass(frozen=True)
class Plan:
    """A curve to measure."""

    name: str
    title: str
    axis: str  # label of the variable
    work: str  # describes what all points have in common
    loads: tuple[Load, ...]
    room: int  # sum of the ranks of the adapters resident at once
    max_num_seqs: int | None = None  # maximum batch size; None: the server's default

    @property
    def adapters(self) -> list[Adapter]:
        """All adapters that the loads may name, without duplicates."""
        return list(dict.fromkeys(adapter for load in self.loads for adapter in load.adapters))


@dataclass(frozen=True)
class Scale:
    """The extent of the curves. A quick run differs from a full run only in its scale."""

    distinct: tuple[int, ...]
    distinct_streams: int
    pool: int  # number of distinct adapters, of the usual rank, that fit into memory
    ranks: tuple[int, ...]
    blends: tuple[int, ...]
    streams_of_adapters: int  # for the curves of ranks and blends
    contexts: tuple[int, ...]
    context_streams: tuple[int, ...]
    context_tokens: int  # new tokens
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
            # One request per stream: the measured memory is that of this many contexts.
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
    # Base and adapters at the same number of streams are measured back to back.
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
"""Plans by the name that `--only` takes."""


def _even(
    scale: Scale, series: str, x: int, streams: int, adapters: tuple[Adapter, ...] = (), blend: int = 1
) -> Load:
    """Return a load whose streams keep their adapters. Few streams send several requests, as short runs are
    noisy."""
    requests = max(1, min(4, 16 // streams))
    return Load(series, x, streams, requests, scale.prompt_tokens, scale.max_tokens, adapters, blend=blend)


def _room(loads: Sequence[Load]) -> int:
    """Return the sum of the ranks of all adapters of all loads."""
    return sum(adapter.rank for adapter in {adapter for load in loads for adapter in load.adapters})
