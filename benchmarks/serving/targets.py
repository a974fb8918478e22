"""Targets of serving, each a ratio to a peer or to ourselves in the same run."""

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.measure import Spread, median_ratio, percentile
from benchmarks.peers.openvino import NAME as OPENVINO
from benchmarks.peers.venvs import LLAMA_CPP
from benchmarks.serving.results import Results
from benchmarks.serving.systems.systems import BASE, BLENDS, DISTINCT, ONE, OURS, WIDE, Load
from benchmarks.tables import milliseconds, spread, with_range
from benchmarks.targets import NOT_MEASURED, Target, at_least, at_most, unmeasured

FULL_REGISTERED, FULL_POOL = 1000, 64
MAX_START = 3.0  # seconds
MAX_LONG_FIRST_TOKEN = 0.52  # seconds
OF_BASE, OF_BOUND, OF_GREEDY = "of own base", "of the memory bound", "of greedy"

AGAINST_PEERS = (
    (1, BASE, 1.6, LLAMA_CPP),
    (32, BASE, 1.3, OPENVINO),
    (32, BASE, 2.4, LLAMA_CPP),
    (32, DISTINCT, 10.0, LLAMA_CPP),
)
AGAINST_BASE = ((1, ONE, 0.95), (1, BLENDS, 0.92), (32, DISTINCT, 0.88), (32, BLENDS, 0.82))
WAYS = (("sampled", "sampled (temperature 0.7, top_p 0.9)", 0.95), ("logprobs", "logprobs 5", 0.97))


def evaluate(results: Results) -> list[Target]:
    """Return every target, reached or not. A quick run reaches and misses none."""
    targets = [
        *_against_peers(results),
        *_wide(results),
        _at_any_width(results),
        at_least("1 stream, base: between tokens", _of_bound(results, OURS), 0.95, OF_BOUND),
        *_against_base(results),
        _overload(results),
        *_many(results),
        *_ways(results),
        _first_token(results),
        *_long_prompts(results),
        _cold(results),
        _start(results),
    ]
    return unmeasured(targets) if results.made.quick else targets


def _speed(results: Results, streams: int, kind: str, system: str = OURS) -> list[float]:
    row = results.row(streams, kind)
    return [] if row is None else row.speed(system)


def _against_peers(results: Results) -> Iterator[Target]:
    for streams, kind, least, peer in AGAINST_PEERS:
        ratio = median_ratio(_speed(results, streams, kind), _speed(results, streams, kind, peer))
        yield at_least(Load(streams, kind).title, ratio, least, f"× {peer}")


def _at_any_width(results: Results) -> Target:
    """Compare our weights as stored with llama.cpp's fastest width. ik_llama.cpp has no package to compare
    with."""
    names = [facts.name for facts in results.systems if facts.name.startswith(LLAMA_CPP)]
    columns = [speeds for name in names if (speeds := _speed(results, 1, BASE, name))]
    best = [max(values) for values in zip(*columns, strict=True)]
    ratio = median_ratio(_speed(results, 1, BASE), best)
    return at_least("1 stream, base, weights as stored", ratio, 1.6, f"× {LLAMA_CPP} at its best width")


def _wide(results: Results) -> Iterator[Target]:
    """Yield the targets for 16-bit weights, if ours are stored in fewer bits."""
    if results.settings.weight_bytes >= results.settings.wide_bytes:
        return
    load = "1 stream, base, 16-bit weights"
    ratio = median_ratio(_speed(results, 1, BASE, WIDE), _speed(results, 1, BASE, LLAMA_CPP))
    yield at_least(load, ratio, 1.6, f"× {LLAMA_CPP}")
    yield at_least(f"{load}: between tokens", _of_bound(results, WIDE), 0.95, OF_BOUND)


def _of_bound(results: Results, name: str) -> Spread | None:
    """Compare a stream's speed with the memory bandwidth: each token reads every weight once."""
    row, settings = results.row(1, BASE), results.settings
    size = settings.wide_bytes if name == WIDE else settings.weight_bytes
    gaps = [] if row is None else [figures.itl_p50 for figures in row.figures.get(name, ())]
    return median_ratio([size / speed for speed in results.bandwidth], gaps)


def _against_base(results: Results) -> Iterator[Target]:
    for streams, kind, least in AGAINST_BASE:
        ratio = median_ratio(_speed(results, streams, kind), _speed(results, streams, BASE))
        yield at_least(Load(streams, kind).title, ratio, least, OF_BASE)


def _overload(results: Results) -> Target:
    found = results.overload
    ratio = None if found is None else median_ratio(found.goodput, found.peak)
    return at_least("5 × capacity, open loop, a minute: goodput", ratio, 0.95, "of the peak")


def _many(results: Results) -> Iterator[Target]:
    many = results.many
    if many is None:
        yield at_least(f"{FULL_REGISTERED:,} registered, Zipf, pool of {FULL_POOL}", None, 0.85, OF_BASE)
        return
    mixed, base = ([figures.tokens_per_second for figures in rounds] for rounds in (many.mixed, many.base))
    target = at_least(many.load, median_ratio(mixed, base), 0.85, OF_BASE)
    full = many.config.num_registered >= FULL_REGISTERED and many.config.num_pooled <= FULL_POOL
    yield target if full else replace(target, reached=None)
    wrong, total = many.verdicts["wrong"], sum(many.verdicts.values())
    yield Target("its answers", "none wrong", f"{wrong} of {total}", wrong == 0)


def _ways(results: Results) -> Iterator[Target]:
    for field, title, least in WAYS:
        for streams in (1, 32):
            found = next((ways for ways in results.ways if ways.streams == streams), None)
            ratio = None if found is None else median_ratio(getattr(found, field), found.greedy)
            streamed = f"{streams} stream{'s' if streams > 1 else ''}"
            yield at_least(f"{title}, {streamed}", ratio, least, OF_GREEDY)


def _first_token(results: Results) -> Target:
    ours, theirs = (results.first_token.get(name, ()) for name in (OURS, LLAMA_CPP))
    return at_most("1 stream, time to first token", median_ratio(ours, theirs), 0.5, f"of {LLAMA_CPP}'s")


def _long_prompts(results: Results) -> Iterator[Target]:
    found = results.long_prompts
    gaps = "ITL p99 while a long prompt arrives each second"
    wanted = f"≤ {MAX_LONG_FIRST_TOKEN:g} s"
    if found is None:
        yield at_most(gaps, None, 2, "× quiet p50")
        yield Target("the long prompts' first token", wanted, NOT_MEASURED, None)
        return
    yield at_most(gaps, median_ratio(found.itl_p99, found.quiet_p50), 2, "× quiet p50")
    median = percentile(found.first_token, 50)
    measured = f"{with_range(found.first_token, '{:.2f}'.format)} s"
    yield Target("the long prompts' first token", wanted, measured, median <= MAX_LONG_FIRST_TOKEN)


def _cold(results: Results) -> Target:
    load, most, unit = "a cold adapter, just uploaded", 2, "× reading its bytes from the page cache"
    cold = results.cold
    if cold is None:
        return at_most(load, None, most, unit)
    ratio = median_ratio(cold.uploaded, cold.read_cached)
    target = at_most(load, ratio, most, unit)
    ours, reading = (milliseconds(percentile(values, 50)) for values in (cold.uploaded, cold.read_cached))
    return replace(target, measured=f"{spread(ratio, '×')}: {ours} against {reading} ms")


def _start(results: Results) -> Target:
    load, wanted = "start to ready, converted base", f"< {MAX_START:.0f} s in all"
    if results.start is None:
        return Target(load, wanted, NOT_MEASURED, None)
    measured = f"{with_range(results.start.ready, '{:.1f}'.format)} s"
    return Target(load, wanted, measured, percentile(results.start.ready, 50) < MAX_START)
