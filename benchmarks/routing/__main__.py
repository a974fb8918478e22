"""Simulate every policy in every world; write routing.json, routing.md and the chart, routing.svg.

`--quick` runs a small part, for tests. `--report` only rewrites the page from existing results. docs/cluster.md
shows the results in benchmarks/results.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from benchmarks import command
from benchmarks.command import Made
from benchmarks.routing import report
from benchmarks.routing.policies import POLICIES
from benchmarks.routing.report import Results
from benchmarks.routing.simulate import simulate
from benchmarks.routing.world import World

WORLDS = [
    World("Zipf 1.0, 70 % load"),
    World("Zipf 0.8, 70 % load", zipf=0.8),
    World("Zipf 1.2, 70 % load", zipf=1.2),
    World("Zipf 1.0, 50 % load", load=0.5),
    World("Zipf 1.0, 90 % load", load=0.9),
    World("Zipf 1.0, 90 % load, routers that count only their own", load=0.9, own_counts=1),
]


def quick(world: World) -> World:
    """Return the same world at a fiftieth of its size."""
    return replace(
        world,
        num_replicas=20,
        num_adapters=2000,
        num_requests=2400,
        warm_up=1200,
        failures=world.failures / 50,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="where the results are written")
    parser.add_argument("--processes", type=command.positive, default=command.cores())
    parser.add_argument("--quick", action="store_true", help="a reduced run that only shows that everything works")
    parser.add_argument("--report", action="store_true", help="write the page again without simulating")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.report:
        results = command.read(options.out, "routing", Results)
        if results is None:
            raise SystemExit(f"there is no routing.json in {options.out}: run it without --report first")
    else:
        made = Made.by("benchmarks.routing", arguments, quick=options.quick)
        worlds = [quick(world) for world in WORLDS] if options.quick else WORLDS
        say = command.speaker()
        outcomes = []
        with ProcessPoolExecutor(options.processes) as pool:
            jobs = [(name, world) for name in POLICIES for world in worlds]
            for (name, world), outcome in zip(jobs, pool.map(simulate, jobs), strict=True):
                say(f"{name} in {world.title}: {outcome.cold_share:.1%} cold, {outcome.wait_p99:.3f} s p99")
                outcomes.append(outcome)
        results = Results(made, worlds, outcomes)
        command.write(options.out, "routing", results)
    (options.out / "routing.md").write_text(report.markdown(results), encoding="utf-8")
    report.chart(results, options.out / "routing.svg")


if __name__ == "__main__":
    main()
