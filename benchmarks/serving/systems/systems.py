"""What takes the loads: our server and its peers, behind one interface."""

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
"""Our server with the base that the peers have, of which no weight is stored in fewer bits."""
Streams = Sequence[Sequence[Request]]


@dataclass(frozen=True)
class Load:
    """So many streams at once, each under what `kind` says."""

    streams: int
    kind: str

    @property
    def key(self) -> str:
        """As `--only` names it."""
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
        """The adapters of each stream."""
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
    """A system, as the report names it."""

    name: str
    version: str
    over_http: bool  # or in process, which spares it the client's share of the cores
    settings: str  # those that aren't the defaults
    trial: dict[str, tuple[Figure, ...]]  # tokens per second of each variant that was tried, by load
    base_only: bool = False  # it was not asked for adapters
    max_streams: int | None = None  # it was not asked for more at once

    @property
    def is_partial(self) -> bool:
        """Whether it was asked for some of the loads alone."""
        return self.base_only or self.max_streams is not None


class System(Protocol):
    """A running one."""

    @property
    def facts(self) -> Facts: ...
    @property
    def peak_rss(self) -> int:
        """Bytes, until now; while it runs."""
        ...

    def can(self, load: Load) -> bool:
        """Whether it has a way to do it: what it can't is no matter of speed."""
        ...

    def run(self, streams: Streams) -> Run:
        """The streams at once, each one's requests one after the other; texts come stream by stream."""
        ...

    def stop(self) -> None:
        """Let it end by itself."""
        ...


class OurServer:
    """smolora, over HTTP."""

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
"""Starts a peer under certain settings."""


def fastest(
    name: str, variants: Mapping[str, Variant], trials: Sequence[Streams], say: Say
) -> tuple[str, dict[str, tuple[float, ...]]]:
    """The settings under which a peer is fastest, and each one's tokens per second of each trial.

    A peer is given whatever suits it, and it is measured rather than guessed: the product of its speeds decides.
    """
    speeds: dict[str, tuple[float, ...]] = {}
    for settings, start in variants.items():
        system = start()
        try:
            system.run(trials[-1])  # warms it up
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
