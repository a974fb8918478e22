"""Measurement of a scaling curve on our own server, over HTTP.

The first round starts a server for each point, so that the memory measured is the point's alone. Later rounds run
all points on one server, alternately upwards and downwards, so that a machine that slows down or speeds up favours
neither end.
"""

from dataclasses import dataclass, replace
from random import Random

from adapters.lora import BaseShape
from benchmarks.command import Say
from benchmarks.measure import Figures
from benchmarks.prompts import PromptSource
from benchmarks.scaling.loads import Load, Plan
from benchmarks.scaling.results import Curve, Point
from benchmarks.serving.load import drive, summarize
from benchmarks.serving.systems.server_process import Server, ServerConfig, adapter_room
from benchmarks.serving.systems.systems import Streams
from benchmarks.serving.systems.wires import Part, Request, Smolora

WARM_PROMPT_TOKENS, WARM_TOKENS = 16, 4
MAX_WARMING = 32  # streams
READ = "smolora_adapter_loads_total"


@dataclass(frozen=True)
class Bench:
    """The context in which all curves are measured."""

    config: ServerConfig  # except the sizes that a curve sets
    shape: BaseShape  # of the base
    prompts: PromptSource
    rounds: int
    say: Say


@dataclass(frozen=True)
class _Measured:
    figures: Figures
    adapters_read: int


def measure(plan: Plan, bench: Bench) -> Curve:
    """Measure all rounds of a curve. Its adapters must be registered."""
    room = adapter_room(bench.shape, bench.config.dtype, bench.config.device, plan.room)
    config = replace(bench.config, adapter_cache_bytes=room, max_num_seqs=plan.max_num_seqs)
    found: dict[int, list[_Measured]] = {index: [] for index in range(len(plan.loads))}
    memory: dict[int, int] = {}
    for index, load in enumerate(plan.loads):
        with Server(config) as server:
            found[index].append(_measure(server, plan, load, bench, 0))
            memory[index] = server.rss
            server.stop()
    if bench.rounds > 1:
        with Server(config) as server:
            for number in range(1, bench.rounds):
                for index in found if number % 2 == 0 else reversed(found):
                    found[index].append(_measure(server, plan, plan.loads[index], bench, number))
            server.stop()
    points = tuple(
        Point(
            load.series,
            load.x,
            tuple(one.figures for one in found[index]),
            tuple(one.adapters_read for one in found[index]),
            memory[index],
        )
        for index, load in enumerate(plan.loads)
    )
    return Curve(plan.name, plan.title, plan.axis, plan.work, points)


def _measure(server: Server, plan: Plan, load: Load, bench: Bench, number: int) -> _Measured:
    """Measure one point in round `number`, counted from 0, after loading the resident adapters and warming up."""
    draw = Random(f"{load.series} {load.x} {number}")
    _warm_up(server, plan, load, bench, draw)
    texts = bench.prompts.take(load.streams * load.requests, load.prompt_tokens)
    requests = [
        [Request(text, load.parts(stream, draw), load.max_tokens) for text in texts[stream :: load.streams]]
        for stream in range(load.streams)
    ]
    before = server.metrics()[READ]
    figures = _cached(server, load, requests) if load.is_cached else _figures(server, requests)
    read = int(server.metrics()[READ] - before)
    speed = f"{figures.tokens_per_second:.1f} tokens/s"
    bench.say(f"{plan.name}, round {number + 1} of {bench.rounds}: {load.series}, {load.x}: {speed}")
    return _Measured(figures, read)


def _cached(server: Server, load: Load, requests: Streams) -> Figures:
    """Take TTFT from new prompts and everything else from cached prefixes. Raise RuntimeError if prefixes aren't
    cached."""
    new = _figures(server, [[replace(request, max_tokens=1) for request in stream] for stream in requests])
    run = summarize(drive(server.url, Smolora(), requests))
    if run.num_cached_tokens < load.prompt_tokens * load.streams * load.requests / 2:
        raise RuntimeError(
            f"the server has no room to keep {load.streams * load.requests} prompts of {load.prompt_tokens} tokens"
        )
    num_resent = new.num_resent + run.num_resent
    return replace(Figures.of(run), ttft_p50=new.ttft_p50, ttft_p99=new.ttft_p99, num_resent=num_resent)


def _warm_up(server: Server, plan: Plan, load: Load, bench: Bench, draw: Random) -> None:
    fitting = [adapter for adapter in load.adapters if adapter.rank * (adapter.index + 1) <= plan.room]
    if fitting:
        # Popular adapters come last: the least recently used are evicted first.
        touches = [Request("A", (Part(adapter.name),), 1) for adapter in reversed(fitting)]
        num_streams = min(MAX_WARMING, len(touches))
        _figures(server, [touches[stream::num_streams] for stream in range(num_streams)])
    texts = bench.prompts.take(load.streams, WARM_PROMPT_TOKENS)
    _figures(
        server,
        [[Request(text, load.parts(stream, draw), WARM_TOKENS)] for stream, text in enumerate(texts)],
    )


def _figures(server: Server, requests: Streams) -> Figures:
    return Figures.of(summarize(drive(server.url, Smolora(), requests)))
