"""Command line of the serving benchmark."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import command
from benchmarks.command import positive
from benchmarks.peers.venvs import LLAMA_CPP, OPENVINO
from benchmarks.serving.systems.systems import BASE, BLENDS, DISTINCT, KINDS, ONE, Load

PARTS = ("loads", "ttft", "ways", "cold", "long", "overload", "many", "start")
"""Names that `--only` takes, in addition to single loads such as 32-distinct."""
PEFT, TORCH, BITS_16, VLLM = "peft", "torch", "16-bit", "vllm"
PEERS = (LLAMA_CPP, OPENVINO, VLLM, PEFT, TORCH, BITS_16)
"""Names that `--peers` takes; torch is our own server without native code, 16-bit our server with 16-bit weights.
"""


@dataclass(frozen=True)
class Options:
    """All parameters of a run. A quick run differs from a full run only in these."""

    model: str
    home: Path  # holds the converted base; converted if missing
    out: Path
    cache: Path  # holds the installed peers
    dtype: str
    device: str
    threads: int
    rounds: int
    quick: bool
    only: frozenset[str]
    peers: tuple[str, ...]
    streams: tuple[int, ...]
    prompt_tokens: int
    max_tokens: int
    starts: int
    first_tokens: int  # requests per round for the time to first token
    cold: int  # pairs of adapters per round
    long_prompts: int  # per round
    long_every: float  # seconds
    long_streams: int
    long_tokens: int
    overload_seconds: float
    registered: int
    pool: int
    zipf: float
    many_rounds: int
    many_streams: int
    many_requests: int  # per stream
    instructions: str | None = None  # restricts our server and llama.cpp: a key of INSTRUCTION_FLAGS

    @property
    def loads(self) -> list[Load]:
        """The loads to run. With one stream, distinct adapters are the same as one adapter."""
        every = [Load(streams, kind) for streams in self.streams for kind in KINDS]
        return [
            load for load in every if load != Load(1, DISTINCT) and (self.wants("loads") or load.key in self.only)
        ]

    @property
    def in_rounds(self) -> bool:
        """Whether any part is wanted that the rounds measure."""
        return bool(self.loads) or any(map(self.wants, ("ttft", "ways", "cold", "long", "overload")))

    @property
    def num_adapters(self) -> int:
        """Number of adapters that the loads need."""
        return max([2, *(load.streams for load in self.loads if load.kind in (DISTINCT, BLENDS))])

    @property
    def num_cold(self) -> int:
        return 2 * self.cold * self.rounds if self.wants("cold") else 0

    def wants(self, part: str) -> bool:
        return not self.only or part in self.only

    @staticmethod
    def requests_of(streams: int) -> int:
        """Return the number of sequential requests of each stream: few streams send several, as short runs are
        noisy."""
        return 4 if streams == 1 else 2 if streams < 16 else 1


def parse(arguments: list[str] | None = None) -> Options:
    """Parse the arguments; exit with an error message or the help if asked."""
    parser = command.parser(
        "benchmarks.serve", "Measures the server over HTTP, and what users would pick instead in turn with it."
    )
    add = parser.add_argument
    add("--cache", type=Path, default=Path(".cache"), help="where `python -m benchmarks.peers` made the peers")
    add("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="dtype of the server and of the peers")
    add("--device", default="cpu", help="device of the server and of transformers")
    add(
        "--rounds",
        type=positive,
        default=3,
        help="number of rounds; each measures everything once, all systems in turn",
    )
    add(
        "--only",
        default="",
        metavar="PART,...",
        help=f"parts to measure: {', '.join(PARTS)}, or loads such as 32-{DISTINCT}",
    )
    add("--peers", default=",".join(PEERS), metavar="PEER,...", help="peers, or none")
    add("--registered", type=positive, default=1000, help="adapters of the Zipf load (10 MB each)")
    add("--pool", type=positive, default=64, help="number of these that fit into memory")
    add("--zipf", type=float, default=1.0, help="exponent of the Zipf load")
    given = parser.parse_args(arguments)
    quick: bool = given.quick
    streams = (1, 2, 4) if quick else (1, 8, 32)
    only = frozenset(part for part in given.only.split(",") if part)
    known = {*PARTS, *(Load(count, kind).key for count in streams for kind in (BASE, ONE, DISTINCT, BLENDS))}
    if unknown := only - known:
        parser.error(f"--only: no {', '.join(sorted(unknown))} among {', '.join(sorted(known))}")
    peers = tuple(peer for peer in given.peers.split(",") if peer not in ("", "none"))
    if strange := set(peers) - set(PEERS):
        parser.error(f"--peers: no {', '.join(sorted(strange))} among {', '.join(PEERS)}")
    return Options(
        model=given.model,
        home=given.home,
        out=given.out,
        cache=given.cache,
        dtype=given.dtype,
        device=given.device,
        threads=given.threads,
        rounds=1 if quick else given.rounds,
        quick=quick,
        only=only,
        peers=peers,
        streams=streams,
        prompt_tokens=32 if quick else 120,
        max_tokens=8 if quick else 64,
        starts=1 if quick else 3,
        first_tokens=2 if quick else 5,
        cold=1 if quick else 5,
        long_prompts=2 if quick else 8,
        long_every=0.3 if quick else 1.0,
        long_streams=2 if quick else 4,
        long_tokens=256 if quick else 1000,
        overload_seconds=1.5 if quick else 60.0,
        registered=min(given.registered, 12) if quick else given.registered,
        pool=min(given.pool, 4) if quick else given.pool,
        zipf=given.zipf,
        many_rounds=1 if quick else min(given.rounds, 3),
        many_streams=4 if quick else 32,
        many_requests=3 if quick else 4,
    )


def of_loads(given: Namespace, loads: Sequence[Load]) -> Options:
    """Return the options of a run of these loads alone, for commands with other flags."""
    return replace(
        parse(["--peers", given.peers, *(["--quick"] if given.quick else [])]),
        out=given.out,
        cache=given.cache,
        threads=given.threads,
        streams=tuple(sorted({load.streams for load in loads})),
        only=frozenset(load.key for load in loads),
        rounds=1 if given.quick else given.rounds,
    )
