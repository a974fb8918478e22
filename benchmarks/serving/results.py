"""Everything that the serving benchmark found, as plain values: what the report is made from and the JSON holds.

Tuples have an entry for each round.
"""

from dataclasses import dataclass, field

from benchmarks.command import Made
from benchmarks.machine import Machine
from benchmarks.measure import Figure, Figures
from benchmarks.serving.many_adapters import Many
from benchmarks.serving.overload import Overload
from benchmarks.serving.systems.systems import OURS, Facts, Load


@dataclass(frozen=True)
class Row:
    """One load's figures by the system's name; of those that can't do it there are none."""

    load: Load
    figures: dict[str, tuple[Figures, ...]]
    cached_tokens: int  # prompt tokens that our prefix cache knew, which should be none
    same_start: dict[str, Figure]  # of each peer: the share of answers that begin as ours do

    def speed(self, system: str = OURS) -> list[float]:
        """Tokens per second of each round; empty of a system that can't do it."""
        return [figures.tokens_per_second for figures in self.figures.get(system, ())]


@dataclass(frozen=True)
class Cold:
    """Seconds that an adapter costs when it is registered and not resident: medians over some adapters."""

    uploaded: tuple[Figure, ...]  # just uploaded: its bytes are still in the page cache
    dropped: tuple[Figure, ...]  # not there any more, nor what the server keeps of it packed
    queue: tuple[Figure, ...]  # of `uploaded`, what the server calls the queue: reading and placing
    read_cached: tuple[Figure, ...]  # reading the file that was published from the page cache
    read_disk: tuple[Figure, ...]  # and from the disk
    load_adapter: tuple[Figure, ...]  # PEFT's
    read_packed: tuple[Figure, ...] = ()  # reading what the server reads, from the page cache


@dataclass(frozen=True)
class Start:
    """Seconds, an entry for each start."""

    ready: tuple[Figure, ...]  # from the process' start to /ready
    imports: tuple[Figure, ...]  # of those, what a bare interpreter needs to import the same


@dataclass(frozen=True)
class LongPrompts:
    """Gaps between the tokens of running streams, in seconds."""

    streams: int
    prompt_tokens: int
    every: float
    quiet_p50: tuple[Figure, ...]
    quiet_p99: tuple[Figure, ...]
    itl_p50: tuple[Figure, ...]  # while long prompts arrive
    itl_p99: tuple[Figure, ...]
    first_token: tuple[Figure, ...]  # of the long prompts, the median


@dataclass(frozen=True)
class Ways:
    """Tokens per second of the same load asked for in different ways."""

    streams: int
    greedy: tuple[Figure, ...]
    sampled: tuple[Figure, ...]  # temperature 0.7, top_p 0.9
    logprobs: tuple[Figure, ...]  # greedy, with the 5 likeliest at each token


@dataclass(frozen=True)
class Settings:
    """What was run."""

    model: str
    dtype: str
    device: str
    rounds: int
    prompt_tokens: int
    max_tokens: int
    weight_bytes: int  # that a step of one stream reads, as they lie in memory
    wide_bytes: int = 0  # and where none is stored in fewer bits than `dtype` has


@dataclass
class Results:
    """Filled as the benchmark goes on; a part that was not run is None or empty."""

    made: Made
    machine: Machine
    settings: Settings
    systems: list[Facts] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # why a peer was left out
    rows: list[Row] = field(default_factory=list)
    first_token: dict[str, tuple[Figure, ...]] = field(default_factory=dict)  # seconds, 1 stream, base
    bandwidth: tuple[Figure, ...] = ()  # bytes per second that the threads read from memory together
    ways: list[Ways] = field(default_factory=list)
    cold: Cold | None = None
    start: Start | None = None
    long_prompts: LongPrompts | None = None
    overload: Overload | None = None
    many: Many | None = None
    peak_rss: dict[str, int] = field(default_factory=dict)  # bytes
    resent: dict[str, int] = field(default_factory=dict)  # requests by system, of all that the rounds sent

    def row(self, streams: int, kind: str) -> Row | None:
        return next((row for row in self.rows if row.load == Load(streams, kind)), None)
