"""Write docs/decisions.md from the results."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import command
from benchmarks.command import QUICK, Made
from benchmarks.decisions.calibration import Outcome, Quality
from benchmarks.decisions.methods import ADAPTER
from benchmarks.decisions.speed import FURTHER_TARGET, NUM_QUESTIONS, OURS, Cost, Row, further_shares
from benchmarks.machine import Machine
from benchmarks.measure import median_ratio
from benchmarks.tables import number, rounds, spread, table, with_range
from server.decisions.quality import Estimate

INTRODUCTION = """# How good and how fast decisions are

`python -m benchmarks.decisions` measures, and writes this page. Don't edit it by hand. Results are in
`benchmarks/results/decisions/`.
"""


@dataclass(frozen=True)
class Calibration:
    """The quality of all methods, by data set."""

    made: Made
    machine: Machine
    model: str
    scikit_learn: str
    outcomes: dict[str, Outcome]


@dataclass(frozen=True)
class Speed:
    """The costs of all systems."""

    made: Made
    machine: Machine
    model: str
    rows: tuple[Row, ...]


def write(folder: Path, page: Path) -> None:
    """Write the page. Name what wasn't measured."""
    calibration = command.read(folder, "calibration", Calibration)
    speed = command.read(folder, "speed", Speed)
    page.write_text(text(calibration, speed), encoding="utf-8")


def text(calibration: Calibration | None, speed: Speed | None) -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    parts += ["Quality isn't measured yet.\n"] if calibration is None else _calibration(calibration)
    parts += ["Speed isn't measured yet.\n"] if speed is None else _speed(speed)
    return "\n".join(parts)


def _calibration(found: Calibration) -> list[str]:
    outcomes = list(found.outcomes.values())
    sizes = {(one.num_train, one.num_validation, one.num_test) for one in outcomes}
    counts = "; ".join("{} rows to train on, {} to validate, {} to test".format(*one) for one in sizes)
    notes = f"""## Quality

{_made(found.made, found.machine)}, {found.model}, {found.scikit_learn}. {counts}.

- **{ADAPTER}**: a job with the service's defaults, asked by `/decide`. T is the temperature that the job fitted.
- **PEFT**: a LoRA adapter of the same shape and a new head, for as many steps over the same rows; the better of
  two rates by validation rows. **TF-IDF**: words, pairs and letters; the best regularization by validation rows. T
  is fitted to the same rows for both.
- Intervals are of 95 %, by a bootstrap over the sources of the test rows, and differences are paired. Brier scores
  sum over the options. A method wins if it is more often right than the adapter, or the adapter than every other,
  beyond chance.
"""
    head = ["data", "options", *outcomes[0].methods, "wins"]
    cells = [
        [
            outcome.title,
            str(outcome.num_options),
            *(_estimate(one.accuracy, _percent) for one in outcome.methods.values()),
            winner(outcome.methods),
        ]
        for outcome in outcomes
    ]
    parts = [QUICK, ""] if found.made.quick else []
    parts += [notes, "Share of right test rows:\n", table(head, cells), ""]
    head = ["data", "method", "T", "Brier score", "with T", "change", "calibration error", "with T", "change"]
    cells = [
        [
            outcome.title,
            name,
            f"{one.temperature:.2f}",
            f"{one.brier.value:.3f}",
            f"{one.brier_fitted.value:.3f}",
            _estimate(one.brier_change, _signed),
            f"{one.calibration_error.value:.3f}",
            f"{one.calibration_error_fitted.value:.3f}",
            _estimate(one.calibration_error_change, _signed),
        ]
        for outcome in outcomes
        for name, one in outcome.methods.items()
    ]
    return [*parts, table(head, cells), ""]


def winner(methods: Mapping[str, Quality]) -> str:
    """Return the method that is most often right, or "can't tell"."""
    others = {name: one.accuracy_difference for name, one in methods.items() if name != ADAPTER}
    if all(one.high < 0 for one in others.values()):
        return ADAPTER
    best = max(others, key=lambda name: others[name].value)
    return best if others[best].low > 0 else "can't tell"


def _speed(found: Speed) -> list[str]:
    works = [row.work for row in found.rows]
    num_rounds = len(next(iter(found.rows[0].costs.values())))
    notes = f"""## Speed

{_made(found.made, found.machine)}, {found.model} with an adapter of rank 16. Five options a question. Decisions
per second, {rounds(num_rounds)}, all systems in turn; `/decide` and `/generate` over HTTP, the peer without it.
`/generate` draws one of the options, and gives no probabilities. *Whole rows*: a batch of prompts and options.
*Prompts first*: their keys and values are repeated for the options, and the input's are computed once.
"""
    head = ["system", *(work.title for work in works)]
    cells = []
    for name in found.rows[0].costs:
        cell = []
        for row in found.rows:
            speeds = _speeds(row, name)
            ratio = "" if name == OURS else f"; {spread(median_ratio(_speeds(row, OURS), speeds), '×')}"
            cell.append(with_range(speeds, number) + ratio)
        cells.append([name, *cell])
    parts = [QUICK, ""] if found.made.quick else []
    parts += [notes, table(head, cells), "", "A ratio is our speed divided by the system's.", ""]
    lengths = [work.input_tokens for work in works if work.num_questions == NUM_QUESTIONS]
    head = ["a further question's cost, as a share of the first's", *(f"input of {one} tokens" for one in lengths)]
    cells = []
    for label, is_cpu in (("time", False), ("processor time", True)):
        shares = [further_shares(found.rows, one, processor=is_cpu) for one in lengths]
        cells.append([label, *(with_range(one, "{:.3f}".format) for one in shares)])
    why = "The share is about that of the question's tokens in all, so it is smaller for a longer input."
    return [*parts, table(head, cells), "", f"The target is {FURTHER_TARGET}. {why}", ""]


def _speeds(row: Row, name: str) -> list[float]:
    costs: tuple[Cost, ...] = row.costs[name]
    return [row.work.num_decisions / cost.seconds for cost in costs]


def _made(made: Made, machine: Machine) -> str:
    return f"`{made.command}`, {made.day}, {machine}"


def _estimate(one: Estimate, form: Callable[[float], str]) -> str:
    return f"{form(one.value)} ({form(one.low)} to {form(one.high)})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _signed(value: float) -> str:
    return f"{value:+.3f}"
