"""The ratios of a quick run of the serving benchmark, and whether they are what they were when last recorded.

A quick run measures too little for its figures to be published. What became twice as slow shows in it all the
same: in what each load takes beside the base, and the base beside PEFT and our own torch path. Ratios are recorded
for each kind of processor and base; a run on another one is compared with nothing, and says so.
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
"""Of a recorded ratio, what the same one is at least where nothing became slow: quick runs differ by so much."""


@dataclass(frozen=True)
class Compared:
    """A ratio of the run, and the recorded one."""

    name: str
    found: float
    recorded: float

    @property
    def holds(self) -> bool:
        return self.found >= LEAST * self.recorded


def ratios_of(results: Results) -> dict[str, float]:
    """Each load's speed as a share of the base's with as many streams, and the base's in that of each peer."""
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
    """Those that were recorded and found; None where nothing is recorded of this processor and base."""
    known = _read(recorded).get(_key(results))
    if known is None:
        return None
    found = ratios_of(results)
    return [Compared(name, found[name], ratio) for name, ratio in known.items() if name in found]


def record(results: Results, recorded: Path = RECORDED) -> None:
    """Keep the run's ratios, in the place of those of the same processor and base."""
    every = {**_read(recorded), _key(results): ratios_of(results)}
    with new_file(recorded) as unfinished:
        unfinished.write_text(json.dumps(every, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def markdown(compared: list[Compared] | None, results: Results) -> str:
    """What is printed behind a quick run."""
    if compared is None:
        return f"No ratios are recorded of {_key(results)}: --record keeps these."
    cells = [
        (each.name, f"{each.recorded:.2f}", f"{each.found:.2f}", "yes" if each.holds else "**no**")
        for each in compared
    ]
    return f"Beside the ratios recorded last, of which {LEAST:.0%} must be reached:\n\n" + table(
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
