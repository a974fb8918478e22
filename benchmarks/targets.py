"""What the torch path is meant to reach, each a ratio of figures of one run, and whether it does."""
# ruff: noqa: RUF001

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.measure import Spread, median_ratio, percentile
from benchmarks.results import BASE, BLENDS, DISTINCT, ONE, Load, Results

FULL_REGISTERED, FULL_POOL = 1000, 64
MAX_START = 3.0  # seconds
TIMES_PEER, OF_BASE, TIMES_P50 = "× PEFT", "of own base", "× p50"

AGAINST_PEER = ((1, BASE, 1.5), (1, ONE, 1.3), (32, BASE, 2.0), (32, ONE, 2.0), (32, DISTINCT, 8.0))
AGAINST_BASE = ((32, DISTINCT, 0.6), (32, BLENDS, 0.5))


@dataclass(frozen=True)
class Target:
    """One wish. `reached` is None where it was not measured, or not at the size that it is about."""

    load: str
    wanted: str
    measured: str
    reached: bool | None


def evaluate(results: Results) -> list[Target]:
    """Every target, in the order of the plan; a quick run reaches none and misses none."""
    targets = [
        *_against_peer(results),
        *_against_base(results),
        _many(results),
        _wrong_answers(results),
        _cold(results),
        _first_token(results),
        _long_prompts(results),
        _start(results),
    ]
    return [replace(target, reached=None) for target in targets] if results.settings.quick else targets


def spread(value: Spread | None, unit: str) -> str:
    """A ratio with its range over the rounds."""
    if value is None:
        return "–"
    text = f"{value.median:.2f} {unit}"
    return text if value.low == value.high else f"{text} ({value.low:.2f}–{value.high:.2f})"


def _against_peer(results: Results) -> Iterator[Target]:
    for streams, kind, least in AGAINST_PEER:
        row = results.row(streams, kind)
        ratio = None if row is None else median_ratio(row.our_speed, row.peer_speed)
        yield at_least(Load(streams, kind).title, ratio, least, TIMES_PEER)


def _against_base(results: Results) -> Iterator[Target]:
    for streams, kind, least in AGAINST_BASE:
        row, base = results.row(streams, kind), results.row(streams, BASE)
        ratio = None if row is None or base is None else median_ratio(row.our_speed, base.our_speed)
        yield at_least(Load(streams, kind).title, ratio, least, OF_BASE)


def _many(results: Results) -> Target:
    many = results.many
    if many is None:
        return at_least(f"{FULL_REGISTERED:,} registered, Zipf, pool of {FULL_POOL}", None, 0.4, OF_BASE)
    ratio = median_ratio(
        [figures.tokens_per_second for figures in many.mixed], [figures.tokens_per_second for figures in many.base]
    )
    full = many.config.num_registered >= FULL_REGISTERED and many.config.num_pooled <= FULL_POOL
    target = at_least(many.load, ratio, 0.4, OF_BASE)
    return target if full else replace(target, reached=None)


def _wrong_answers(results: Results) -> Target:
    if results.many is None:
        return Target("its answers", "none wrong", "–", None)
    verdicts = results.many.verdicts
    return Target(
        "its answers", "none wrong", f"{verdicts['wrong']} of {sum(verdicts.values())}", verdicts["wrong"] == 0
    )


def _cold(results: Results) -> Target:
    load, wanted = "a cold adapter", "≥ 5 × faster than load_adapter"
    cold = results.cold
    if cold is None or not cold.load_adapter:
        return Target(load, wanted, "–", None)
    ours, theirs = percentile(cold.ours, 50), percentile(cold.load_adapter, 50)
    if ours <= 0:  # less than what one first token differs from another
        return Target(load, wanted, f"not seen against {theirs * 1e3:.0f} ms", True)
    times = f"{theirs / ours:.1f} × ({ours * 1e3:.0f} against {theirs * 1e3:.0f} ms)"
    return Target(load, wanted, times, theirs / ours >= 5)


def _first_token(results: Results) -> Target:
    load, wanted = "1 stream, time to first token", "below PEFT's"
    found = results.first_token
    if found is None or not found.peer:
        return Target(load, wanted, "–", None)
    ours, theirs = percentile(found.ours, 50), percentile(found.peer, 50)
    return Target(load, wanted, f"{ours * 1e3:.0f} against {theirs * 1e3:.0f} ms", ours < theirs)


def _long_prompts(results: Results) -> Target:
    found = results.long_prompts
    if found is None:
        return Target("ITL p99 while prompts of 1,024 tokens arrive", f"≤ 4 {TIMES_P50}", "–", None)
    load = f"ITL p99 while prompts of {found.prompt_tokens:,} tokens arrive"
    ratio = median_ratio(found.itl_p99, found.itl_p50)
    reached = None if ratio is None else ratio.median <= 4
    return Target(load, f"≤ 4 {TIMES_P50}", spread(ratio, TIMES_P50), reached)


def _start(results: Results) -> Target:
    load, wanted = "start to ready, converted base", f"< {MAX_START:.0f} s after imports"
    if results.start is None:
        return Target(load, wanted, "–", None)
    ready, imports = percentile(results.start.ready, 50), percentile(results.start.imports, 50)
    return Target(load, wanted, f"{ready - imports:.1f} s ({ready:.1f} s in all)", ready - imports < MAX_START)


def at_least(load: str, ratio: Spread | None, least: float, unit: str) -> Target:
    """Reached where the median is `least` or more."""
    reached = None if ratio is None else ratio.median >= least
    return Target(load, f"≥ {least:g} {unit}", spread(ratio, unit), reached)
