"""Serving on lesser processors: `python -m benchmarks.held`.

Our server and llama.cpp, each compiled for fewer instructions than this processor has, in turn under loads of
`benchmarks.serve`. Writes held.json, in which what isn't measured stays as it is. For figures that mean something
the machine must be otherwise idle; what has fewer instructions may differ from this processor in much else.
"""

import signal
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import command, serve
from benchmarks.command import Made, positive
from benchmarks.held.report import LOADS, Results, markdown
from benchmarks.peers.venvs import HELD_FLAGS
from benchmarks.serving.options import of_loads
from benchmarks.serving.systems.systems import BASE, DISTINCT, Load

QUICK_LOADS = (Load(1, BASE), Load(2, DISTINCT))


def main(arguments: list[str] | None = None) -> Results:
    """Run it all; the results, which are printed and written too."""
    parser = command.parser("benchmarks.held", "Measures the server held to fewer instructions.")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="as of benchmarks.serve")
    parser.add_argument("--rounds", type=positive, default=3, help="each measures everything once")
    parser.add_argument(
        "--to", default=",".join(HELD_FLAGS), metavar="NAME,...", help=f"of {', '.join(HELD_FLAGS)}"
    )
    parser.add_argument("--peers", default="llama.cpp", metavar="PEER,...", help="or none")
    given = parser.parse_args(arguments)
    names = given.to.split(",")
    if unknown := set(names) - set(HELD_FLAGS):
        parser.error(f"--to: no {', '.join(sorted(unknown))} among {', '.join(HELD_FLAGS)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that nothing is left running
    say = command.speaker()
    loads = QUICK_LOADS if given.quick else LOADS
    options = replace(of_loads(given, loads), model=given.model, home=given.home)
    made = Made.by("benchmarks.held", arguments, quick=given.quick)
    given.out.mkdir(parents=True, exist_ok=True)
    results = command.read(given.out, "held", Results) or Results()
    for name in names:
        say(f"held to {name}")
        results.held[name] = serve.run(replace(options, instructions=name), made, say)
        command.write(given.out, "held", results)
    say(f"done; {given.out / 'held.json'} holds what was found")
    print(markdown(results))
    return results


if __name__ == "__main__":
    main()
