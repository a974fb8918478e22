"""Comparison of the ratios of a quick serving run with recorded ratios.

A quick run is too short for its figures to be published, but a twofold slowdown shows in its ratios: each load
against the base, and the base against PEFT and our own torch path. Ratios are recorded for each processor and
base. Without recorded ratios for this processor and base, nothing is compared, and the report says so.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.storage.durable import new_file
from benchmarks.measure import median_ratio
from benchmarks.serving.results import Results
from benchmarks.serving.systems.systems import BASE, OURS
from benchmarks.tables import table

RECORDED = Path(__file__).with_name("recorded.json")
LEAST = 0.5
"""Lowest share of a recorded ratio that counts as unchanged: quick runs vary this much."""


@dataclass(frozen=True)
class Compared:
    """A ratio of this run and the recorded one."""

    name: str
    found: float
    recorded: float

    @property
    def holds(self) -> bool:
        return self.found >= LEAST * self.recorded


def ratios_of(results: Results) -> dict[str, float]:
    """Return each load's speed relative to the base at the same number of streams, and the base's relative to each
    peer."""
    found = {}
    for row in results.rows:
        if row.load.kind != BASE:
            base = results.row(row.load.streams, BASE)
            others = {"of own base": [] if base is None else base.speed()}
        else:
            others = {f"of {system}": row.speed(system) for system in row.figures if system != OURS}
        for name, speeds in others.items():
            if ratio := median_ratio(row.speed(), speeds):
                found[f"{row.load.title}: {name}"] = round(ratio.median, 3)
    return found


def compare(results: Results, recorded: Path = RECORDED) -> list[Compared] | None:
    """Compare ratios that were both recorded and measured. Return None if none is recorded for this processor and
    base."""
    known = _read(recorded).get(_key(results))
    if known is None:
        return None
    found = ratios_of(results)
    return [Compared(name, found[name], ratio) for name, ratio in known.items() if name in found]


def record(results: Results, recorded: Path = RECORDED) -> None:
    """Record the run's ratios; they replace those of the same processor and base."""
    every = {**_read(recorded), _key(results): ratios_of(results)}
    with new_file(recorded) as unfinished:
        unfinished.write_text(json.dumps(every, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def markdown(compared: list[Compared] | None, results: Results) -> str:
    """Return the text printed after a quick run."""
    if compared is None:
        return f"No ratios are recorded for {_key(results)}: use --record to record these."
    cells = [
        (each.name, f"{each.recorded:.2f}", f"{each.found:.2f}", "yes" if each.holds else "**no**")
        for each in compared
    ]
    return f"Compared with the recorded ratios, of which {LEAST:.0%} must be reached:\n\n" + table(
        ("ratio", "recorded", "now", "reached"), cells
    )


def _key(results: Results) -> str:
    machine, settings = results.machine, results.settings
    return f"{settings.model} in {settings.dtype}, {machine.cpu}, {machine.threads} threads"


def _read(recorded: Path) -> Mapping[str, Mapping[str, float]]:
    if not recorded.exists():
        return {}
    document: dict[str, dict[str, float]] = json.loads(recorded.read_text(encoding="utf-8"))
    return document
