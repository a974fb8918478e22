"""Measure serving with restricted instruction sets: `python -m benchmarks.instruction_sets`.

Our server and llama.cpp, each compiled for fewer instructions than this processor has, run loads of
`benchmarks.serve` in turn. Writes instruction_sets.json; instruction sets that aren't measured keep their results.
The machine must be otherwise idle. A real processor without these instructions may differ in other ways.
"""

import signal
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import command, serve
from benchmarks.command import Made, positive
from benchmarks.instruction_sets.report import LOADS, Results, markdown
from benchmarks.peers.venvs import INSTRUCTION_FLAGS
from benchmarks.serving.options import of_loads
from benchmarks.serving.systems.systems import BASE, DISTINCT, Load

QUICK_LOADS = (Load(1, BASE), Load(2, DISTINCT))


def main(arguments: list[str] | None = None) -> Results:
    """Run the benchmark; return, print and write the results."""
    parser = command.parser("benchmarks.instruction_sets", "Measure the server with restricted instruction sets.")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="as for benchmarks.serve")
    parser.add_argument(
        "--rounds", type=positive, default=3, help="number of rounds; each measures everything once"
    )
    parser.add_argument(
        "--to",
        default=",".join(INSTRUCTION_FLAGS),
        metavar="NAME,...",
        help=f"instruction sets: {', '.join(INSTRUCTION_FLAGS)}",
    )
    parser.add_argument("--peers", default="llama.cpp", metavar="PEER,...", help="peers, or none")
    given = parser.parse_args(arguments)
    names = given.to.split(",")
    if unknown := set(names) - set(INSTRUCTION_FLAGS):
        parser.error(f"--to: no {', '.join(sorted(unknown))} among {', '.join(INSTRUCTION_FLAGS)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that children are stopped
    say = command.speaker()
    loads = QUICK_LOADS if given.quick else LOADS
    options = replace(of_loads(given, loads), model=given.model, home=given.home)
    made = Made.by("benchmarks.instruction_sets", arguments, quick=given.quick)
    given.out.mkdir(parents=True, exist_ok=True)
    results = command.read(given.out, "instruction_sets", Results) or Results()
    for name in names:
        say(f"restricted to {name}")
        results.sets[name] = serve.run(replace(options, instructions=name), made, say)
        command.write(given.out, "instruction_sets", results)
    say(f"done; {given.out / 'instruction_sets.json'} has the results")
    print(markdown(results))
    return results


if __name__ == "__main__":
    main()
