"""Interface of the systems that run loads: our server and its peers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.command import Say
from benchmarks.measure import Figure, Run
from benchmarks.serving.load import drive, summarize
from benchmarks.serving.systems.server_process import Server
from benchmarks.serving.systems.wires import Part, Request, Smolora

BASE, ONE, DISTINCT, BLENDS = "base", "one", "distinct", "blends"
KINDS = (BASE, ONE, DISTINCT, BLENDS)
OURS = "smolora"
WIDE = "smolora, 16-bit weights"
"""Our server with the peers' base, in which no weight is stored in fewer than 16 bits."""
Streams = Sequence[Sequence[Request]]


@dataclass(frozen=True)
class Load:
    """A number of concurrent streams, with adapters by `kind`."""

    streams: int
    kind: str

    @property
    def key(self) -> str:
        """Its name in `--only`."""
        return f"{self.streams}-{self.kind}"

    @property
    def title(self) -> str:
        what = {
            BASE: "base",
            ONE: "1 adapter",
            DISTINCT: f"{self.streams} adapters",
            BLENDS: f"{self.streams} blends of two" if self.streams > 1 else "blend of two",
        }
        return f"{self.streams} stream{'s' if self.streams > 1 else ''}, {what[self.kind]}"

    def parts(self, names: Sequence[str]) -> list[tuple[Part, ...]]:
        """Return the adapters of each stream."""
        if self.kind == BASE:
            return [()] * self.streams
        if self.kind == ONE:
            return [(Part(names[0]),)] * self.streams
        if self.kind == BLENDS:
            pairs = [(names[i], names[(i + 1) % len(names)]) for i in range(self.streams)]
            return [(Part(first, 0.7), Part(second, 0.3)) for first, second in pairs]
        return [(Part(name),) for name in names[: self.streams]]


@dataclass(frozen=True)
class Facts:
    """A system's description in the report."""

    name: str
    version: str
    over_http: bool  # False: in process, which saves the client's share of the cores
    settings: str  # that differ from the defaults
    trial: dict[str, tuple[Figure, ...]]  # tokens per second of each variant tried, by load
    base_only: bool = False  # not asked for adapters
    max_streams: int | None = None  # not asked for more streams than this

    @property
    def is_partial(self) -> bool:
        """Whether it runs only some of the loads."""
        return self.base_only or self.max_streams is not None


class System(Protocol):
    """A running system."""

    @property
    def facts(self) -> Facts: ...
    @property
    def peak_rss(self) -> int:
        """Peak resident bytes so far, while it runs."""
        ...

    def can(self, load: Load) -> bool:
        """Return whether it supports the load at all, at any speed."""
        ...

    def run(self, streams: Streams) -> Run:
        """Run all streams concurrently, with the requests of each stream in sequence; texts are ordered by
        stream."""
        ...

    def stop(self) -> None:
        """Stop it and wait until it has ended."""
        ...


class OurServer:
    """Our server, over HTTP."""

    def __init__(
        self,
        server: Server,
        version: str,
        name: str = OURS,
        settings: str = "its defaults",
        *,
        max_streams: int | None = None,
    ) -> None:
        self.server = server
        self.facts = Facts(name, version, True, settings, {}, max_streams=max_streams)

    @property
    def peak_rss(self) -> int:
        return self.server.peak_rss

    def can(self, load: Load) -> bool:
        return self.facts.max_streams is None or load.streams <= self.facts.max_streams

    def run(self, streams: Streams) -> Run:
        return summarize(drive(self.server.url, Smolora(), streams))

    def stop(self) -> None:
        self.server.stop()


Variant = Callable[[], System]
"""Start a peer with certain settings."""


def fastest(
    name: str, variants: Mapping[str, Variant], trials: Sequence[Streams], say: Say
) -> tuple[str, dict[str, tuple[float, ...]]]:
    """Return the settings with which a peer is fastest, and the tokens per second of every variant by trial.

    The best settings are measured rather than guessed, by the product of the speeds of all trials.
    """
    speeds: dict[str, tuple[float, ...]] = {}
    for settings, start in variants.items():
        system = start()
        try:
            system.run(trials[-1])  # warm up
            runs = [system.run(streams) for streams in trials]
        finally:
            system.stop()
        speeds[settings] = tuple(run.num_tokens / run.seconds for run in runs)
        say(f"{name}, {settings}: {', '.join(f'{speed:.0f}' for speed in speeds[settings])} tokens/s")

    def product(settings: str) -> float:
        result = 1.0
        for speed in speeds[settings]:
            result *= speed
        return result

    return max(speeds, key=product), speeds
