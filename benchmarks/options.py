"""The command line of the benchmark, and what it comes to."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import BASE, BLENDS, DISTINCT, KINDS, ONE, Load

PARTS = ("loads", "ttft", "cold", "long", "many", "start")
"""What `--only` may name, besides single loads such as 32-distinct."""


@dataclass(frozen=True)
class Options:
    """Everything that a run depends on. Quick runs differ from full ones here alone."""

    model: str
    home: Path  # holds the converted base, or will
    out: Path
    dtype: str
    device: str
    threads: int
    rounds: int
    quick: bool
    only: frozenset[str]
    peer: bool
    native: bool  # whether the server may take its native forward
    streams: tuple[int, ...]
    prompt_tokens: int
    max_tokens: int
    starts: int
    first_tokens: int  # requests a round for the time to first token
    cold: int  # adapters a round
    long_prompts: int  # a round
    long_every: float  # seconds
    long_streams: int
    long_tokens: int
    registered: int
    pool: int
    zipf: float
    many_rounds: int
    many_streams: int
    many_requests: int  # of a stream, in a round

    @property
    def loads(self) -> list[Load]:
        """Those to run; with one stream, all-distinct adapters are one adapter."""
        every = [Load(streams, kind) for streams in self.streams for kind in KINDS]
        return [
            load for load in every if load != Load(1, DISTINCT) and (self.wants("loads") or load.key in self.only)
        ]

    @property
    def num_adapters(self) -> int:
        """Adapters that the loads need."""
        return max([2, *(load.streams for load in self.loads if load.kind in (DISTINCT, BLENDS))])

    def wants(self, part: str) -> bool:
        return not self.only or part in self.only

    @staticmethod
    def requests_of(streams: int) -> int:
        """How many requests each stream makes, one after the other: short runs are noisy."""
        return 4 if streams == 1 else 2 if streams < 16 else 1


def parse(arguments: list[str] | None = None) -> Options:
    """Ends the process with a line on what is wrong, or with the help."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        description="Measures the server over HTTP, and transformers and PEFT in turn with it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct", help="as SMOLORA_MODEL")
    add(
        "--home",
        type=Path,
        default=Path("data"),
        help="whose converted base is used; made there if missing",
    )
    add(
        "--out",
        type=Path,
        default=Path("benchmarks/out"),
        help="for serve.json, serve.md, serve.png and the log",
    )
    add("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the server and of the peer")
    add("--device", default="cpu", help="of the server and of the peer")
    add("--threads", type=positive, default=cores(), help="of the server and of the peer")
    add("--rounds", type=positive, default=3, help="each measures everything once, server and peer in turn")
    add("--quick", action="store_true", help="little of everything: shows that it works, measures nothing")
    add("--only", default="", metavar="PART,...", help=f"of {', '.join(PARTS)}, or loads such as 32-{DISTINCT}")
    add("--no-peer", action="store_true", help="leave transformers and PEFT out")
    add("--torch", action="store_true", help="have the server compute in torch, not natively")
    add(
        "--registered",
        type=positive,
        default=100,
        help="adapters of the Zipf load; the target's: 1000 (10 GB)",
    )
    add("--pool", type=positive, default=16, help="of those, how many have room; the target's: 64")
    add("--zipf", type=float, default=1.0, help="the exponent of the Zipf load")
    given = parser.parse_args(arguments)
    quick: bool = given.quick
    streams = (1, 2, 4) if quick else (1, 8, 32)
    only = frozenset(part for part in given.only.split(",") if part)
    known = {*PARTS, *(Load(count, kind).key for count in streams for kind in (BASE, ONE, DISTINCT, BLENDS))}
    if unknown := only - known:
        parser.error(f"--only: no {', '.join(sorted(unknown))} among {', '.join(sorted(known))}")
    return Options(
        model=given.model,
        home=given.home,
        out=given.out,
        dtype=given.dtype,
        device=given.device,
        threads=given.threads,
        rounds=1 if quick else given.rounds,
        quick=quick,
        only=only,
        peer=not given.no_peer,
        native=not given.torch,
        streams=streams,
        prompt_tokens=32 if quick else 120,
        max_tokens=8 if quick else 64,
        starts=1 if quick else 3,
        first_tokens=2 if quick else 5,
        cold=2 if quick else 5,
        long_prompts=2 if quick else 8,
        long_every=0.3 if quick else 1.0,
        long_streams=2 if quick else 4,
        long_tokens=256 if quick else 1024,
        registered=min(given.registered, 12) if quick else given.registered,
        pool=min(given.pool, 4) if quick else given.pool,
        zipf=given.zipf,
        many_rounds=1 if quick else min(given.rounds, 3),
        many_streams=4 if quick else 32,
        many_requests=3 if quick else 4,
    )


def positive(text: str) -> int:
    """A number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
