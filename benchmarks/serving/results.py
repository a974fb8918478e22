"""Results of the serving benchmark as plain values, as stored in JSON and used by the report.

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
    """Figures of one load by the name of the system. Systems that don't support the load have none."""

    load: Load
    figures: dict[str, tuple[Figures, ...]]
    cached_tokens: int  # prompt tokens served by our prefix cache; expected to be 0
    same_start: dict[str, Figure]  # by peer: the share of answers that begin like ours

    def speed(self, system: str = OURS) -> list[float]:
        """Tokens per second of each round; empty if the system doesn't support the load."""
        return [figures.tokens_per_second for figures in self.figures.get(system, ())]


@dataclass(frozen=True)
class Cold:
    """Extra seconds of a registered adapter that isn't resident: medians over several adapters."""

    uploaded: tuple[Figure, ...]  # just uploaded: in the page cache
    dropped: tuple[Figure, ...]  # evicted from the page cache, with its packed copy
    queue: tuple[Figure, ...]  # of `uploaded`, the part that the server counts as queue time: reading and placing
    read_cached: tuple[Figure, ...]  # reading the published file from the page cache
    read_disk: tuple[Figure, ...]  # reading the published file from disk
    load_adapter: tuple[Figure, ...]  # by PEFT
    read_packed: tuple[Figure, ...] = ()  # reading the file that the server reads, from the page cache


@dataclass(frozen=True)
class Start:
    """Seconds, with an entry for each start."""

    ready: tuple[Figure, ...]  # from process start until /ready
    imports: tuple[Figure, ...]  # of these, a bare interpreter's for the same imports


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
    """Tokens per second of the same load with different sampling options."""

    streams: int
    greedy: tuple[Figure, ...]
    sampled: tuple[Figure, ...]  # temperature 0.7, top_p 0.9
    logprobs: tuple[Figure, ...]  # greedy, with the 5 likeliest alternatives of each token


@dataclass(frozen=True)
class Settings:
    """Parameters of the run."""

    model: str
    dtype: str
    device: str
    rounds: int
    prompt_tokens: int
    max_tokens: int
    weight_bytes: int  # read by a step of one stream, as held in memory
    wide_bytes: int = 0  # the same if all weights had `dtype`


@dataclass
class Results:
    """Results, filled in as the benchmark proceeds; parts that weren't run are None or empty."""

    made: Made
    machine: Machine
    settings: Settings
    systems: list[Facts] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # reason, by peer left out
    rows: list[Row] = field(default_factory=list)
    first_token: dict[str, tuple[Figure, ...]] = field(default_factory=dict)  # seconds, 1 stream, base
    bandwidth: tuple[Figure, ...] = ()  # bytes per second read by all threads together
    ways: list[Ways] = field(default_factory=list)
    cold: Cold | None = None
    start: Start | None = None
    long_prompts: LongPrompts | None = None
    overload: Overload | None = None
    many: Many | None = None
    peak_rss: dict[str, int] = field(default_factory=dict)  # bytes
    resent: dict[str, int] = field(default_factory=dict)  # resent requests by system, over all rounds

    def row(self, streams: int, kind: str) -> Row | None:
        return next((row for row in self.rows if row.load == Load(streams, kind)), None)
