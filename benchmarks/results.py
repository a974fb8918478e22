"""Everything that a benchmark found, as plain values: what the report is made from and the JSON holds."""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from benchmarks.many_adapters import Many
from benchmarks.measure import Figures

BASE, ONE, DISTINCT, BLENDS = "base", "one", "distinct", "blends"
KINDS = (BASE, ONE, DISTINCT, BLENDS)


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


@dataclass(frozen=True)
class Row:
    """One load's figures, an entry for each round; the peer's are empty where it can't or wasn't asked."""

    load: Load
    ours: tuple[Figures, ...]
    peer: tuple[Figures, ...]
    cached_tokens: int  # prompt tokens that our prefix cache knew, which should be none
    same_start: float | None  # share of answers that begin as the peer's do

    @property
    def our_speed(self) -> list[float]:
        return [figures.tokens_per_second for figures in self.ours]

    @property
    def peer_speed(self) -> list[float]:
        return [figures.tokens_per_second for figures in self.peer]


@dataclass(frozen=True)
class FirstToken:
    """Seconds to the first token of one stream under the base."""

    ours: tuple[float, ...]
    peer: tuple[float, ...]


@dataclass(frozen=True)
class Cold:
    """Seconds that an adapter costs when it is registered and not resident, an entry for each adapter."""

    ours: tuple[float, ...]  # time to first token less that of the same request when it is resident
    queue: tuple[float, ...]  # the same of the server's own queue_ms: reading and placing
    load_adapter: tuple[float, ...]  # PEFT's
    load_adapter_low_memory: tuple[float, ...]  # with low_cpu_mem_usage=True


@dataclass(frozen=True)
class Start:
    """Seconds, an entry for each start."""

    ready: tuple[float, ...]  # from the process' start to /ready
    imports: tuple[float, ...]  # of those, what a bare interpreter needs to import the same


@dataclass(frozen=True)
class LongPrompts:
    """Gaps between the tokens of running streams, in seconds, an entry for each round."""

    streams: int
    prompt_tokens: int
    every: float
    quiet_p50: tuple[float, ...]
    quiet_p99: tuple[float, ...]
    itl_p50: tuple[float, ...]  # while long prompts arrive
    itl_p99: tuple[float, ...]


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    threads: int
    memory: int  # bytes
    python: str
    packages: dict[str, str]

    @classmethod
    def this(cls, threads: int) -> "Machine":
        packages = {name: version(name) for name in ("torch", "transformers", "peft", "smolora")}
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(cpu_name(), os.cpu_count() or 1, threads, memory, platform.python_version(), packages)

    def __str__(self) -> str:
        packages = ", ".join(f"{name} {number}" for name, number in self.packages.items())
        memory = f"{self.memory / 2**30:.0f} GiB"
        return (
            f"{self.cpu}, {self.cores} cores, {memory}; {self.threads} threads; Python {self.python}, {packages}"
        )


@dataclass(frozen=True)
class Settings:
    """What was run."""

    model: str
    dtype: str
    device: str
    rounds: int
    prompt_tokens: int
    max_tokens: int
    quick: bool


@dataclass
class Results:
    """Filled as the benchmark goes on; a part that was not run is None or empty."""

    machine: Machine
    settings: Settings
    rows: list[Row] = field(default_factory=list)
    first_token: FirstToken | None = None
    cold: Cold | None = None
    start: Start | None = None
    long_prompts: LongPrompts | None = None
    many: Many | None = None
    server_peak_rss: int | None = None  # bytes
    peer_peak_rss: int | None = None

    def row(self, streams: int, kind: str) -> Row | None:
        return next((row for row in self.rows if row.load == Load(streams, kind)), None)

    def write(self, path: Path, targets: Sequence[Mapping[str, object]]) -> None:
        """As JSON; a figure that could not be taken is null."""
        document = {**asdict(self), "targets": targets}
        path.write_text(json.dumps(finite(document), indent=2) + "\n", encoding="utf-8")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def finite(value: object) -> object:
    """The value as JSON can hold it: what is no number is None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
