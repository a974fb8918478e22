"""`make fairness`: one project asks for everything at once, and another must hardly notice.

    python -m tests.stress.fairness --minutes 10   the verdict; exits with 1 if the modest project had to suffer
    python -m tests.stress.fairness --each            a table of single faults, without a verdict

A real server serves two projects on the real base. `modest` asks a short question and an adapter's answer each
second, and submits a one-step training job each minute: for a third of the time alone, then alongside `greedy`,
which does everything of `tests.stress.fairness.greedy` at once. The run fails if

* a request of `modest` fails, alone or not,
* the p99 of a kind of request, from its due time to the last token, is over 3 times the p99 alone. With fewer than
  100 samples in a phase p95 is compared instead, as p99 would be the maximum; the output says which,
* a job of `modest` waits for a worker for longer than one time slice (and the seconds that giving way takes),
* an activity of `greedy` had no effect: the run shows nothing,
* the machine is so busy that requests of `modest` overlap even alone: the ratios show nothing.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.stress.fairness.faults import FAULTS, measured, measured_bodies, measured_job
from tests.stress.fairness.greedy import ACTIVITIES, running
from tests.stress.fairness.modest import JOB_PATIENCE, KINDS
from tests.stress.fairness.report import (
    MAX_RATIO,
    Phase,
    busy_faults,
    effect_faults,
    job_faults,
    latency_faults,
    table,
)
from tests.stress.fairness.served import modest_client, set_up, use_code

MINUTES = 10.0
ALONE = 1 / 3
"""Share of the time in which the modest project is alone."""
SLICE_SHARE, LEAST_SLICE = 0.1, 20.0
"""Time slice of jobs: a share of the run, and its least value in seconds."""


def verdict(alone: Phase, beside: Phase, time_slice: float, max_ratio: float) -> tuple[list[str], list[str]]:
    """Return what fails the run, and lines that say what was compared."""
    judged = [latency_faults(kind, alone.of(kind), beside.of(kind), max_ratio) for kind in KINDS]
    judged.append(job_faults(alone.jobs, beside.jobs, time_slice))
    found = [fault for kind in KINDS for fault in busy_faults(kind, alone.of(kind))]
    return [*found, *(fault for faults, _ in judged for fault in faults)], [line for _, line in judged]


def run(home: Path, minutes: float, time_slice: float, max_ratio: float, names: Sequence[str]) -> int:
    """Run both phases and print the report. Return the exit code."""
    server, projects = set_up(home, time_slice)
    try:
        say(f"{minutes:g} minutes, {ALONE:.0%} of them alone; time slice {time_slice:g} s; {', '.join(names)}")
        with modest_client(server, projects) as modest:
            alone = modest.phase(60 * minutes * ALONE, JOB_PATIENCE)
            with running(projects.target, {name: ACTIVITIES[name].num_clients for name in names}) as greedy:
                beside = modest.phase(60 * minutes * (1 - ALONE), JOB_PATIENCE + time_slice)
    finally:
        server.close()
    found, compared = verdict(alone, beside, time_slice, max_ratio)
    found += effect_faults(
        greedy.counts, {name: (ACTIVITIES[name].wanted, ACTIVITIES[name].least) for name in names}
    )
    if "Traceback" in server.log():
        found.append(server.log()[-2000:])
    say(*table(KINDS, alone, beside), *achieved(greedy.counts), *compared)
    say(*(f"FAILED {fault}" for fault in found) if found else ["every project had its share"])
    return 1 if found else 0


def each(home: Path, time_slice: float, names: Sequence[str]) -> int:
    """Measure single faults and print a line for each."""
    server, projects = set_up(home, time_slice)
    server.close()
    say(
        "| fault | victim waits for; greedy does | alone | with greedy | greedy's requests |",
        "|---|---|---|---|---|",
    )
    for fault in FAULTS:
        if not names or fault.name in names:
            say(measured(fault, home, projects, time_slice))
    for name, measure in (("M3", measured_bodies), ("H5", measured_job)):
        if not names or name in names:
            say(measure(home, projects, time_slice))
    return 0


def achieved(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return a line for each activity of the greedy project: its outcomes."""
    return [f"greedy's {name}: {json.dumps(outcomes)}" for name, outcomes in counts.items()]


def say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress.fairness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument(
        "--ratio", type=float, default=MAX_RATIO, help="how much latencies may grow (default: %(default)s)"
    )
    parser.add_argument("--slice", type=float, help="seconds of a job's time slice; default: a tenth of the run")
    parser.add_argument("--each", action="store_true", help="measure single faults instead")
    parser.add_argument(
        "--only",
        default="",
        metavar="NAMES",
        help=f"comma-separated, of {', '.join(ACTIVITIES)}; with --each, of the first column of its table",
    )
    parser.add_argument("--code", type=Path, help="a checkout whose server to run, to compare versions")
    options = parser.parse_args(arguments)
    names = [name for name in options.only.split(",") if name]
    known = {fault.name for fault in FAULTS} | {"M3", "H5"} if options.each else set(ACTIVITIES)
    if unknown := set(names) - known:
        parser.error(f"no such name: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    if options.code is not None:
        use_code(options.code)
    time_slice = max(60 * options.minutes * SLICE_SHARE, LEAST_SLICE) if options.slice is None else options.slice
    with tempfile.TemporaryDirectory(prefix="fairness-") as scratch:
        home = Path(scratch) / "home"
        if options.each:
            return each(home, options.slice or LEAST_SLICE, names)
        return run(home, options.minutes, time_slice, options.ratio, names or list(ACTIVITIES))


if __name__ == "__main__":
    sys.exit(main())
