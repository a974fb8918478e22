"""Measure serving of larger bases: `python -m benchmarks.shapes`.

SmolLM2's larger sizes with random weights, stored like the embedded base (random_base.py), run loads of
`benchmarks.serve` in turn with its peers. Writes shapes.json; sizes that aren't measured keep their results. The
machine must be otherwise idle.
"""

import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import command, serve
from benchmarks.command import Made, positive
from benchmarks.serving.options import of_loads
from benchmarks.serving.systems.systems import BASE, BLENDS, DISTINCT, ONE, Load
from benchmarks.shapes.random_base import SHAPES, write_random_base
from benchmarks.shapes.report import Results, markdown

LOADS = (Load(1, BASE), Load(1, ONE), Load(1, BLENDS), Load(8, BASE), Load(8, ONE), Load(8, DISTINCT))
QUICK_LOADS = (Load(1, BASE), Load(2, DISTINCT))


def main(arguments: list[str] | None = None) -> Results:
    """Run the benchmark; return, print and write the results."""
    parser = command.parser("benchmarks.shapes", "Measure the server with larger bases.", has_base=False)
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="as for benchmarks.serve")
    parser.add_argument(
        "--rounds", type=positive, default=3, help="number of rounds; each measures everything once"
    )
    parser.add_argument(
        "--shapes", default=",".join(SHAPES), metavar="NAME,...", help=f"sizes to measure: {', '.join(SHAPES)}"
    )
    parser.add_argument("--peers", default="llama.cpp", metavar="PEER,...", help="as for benchmarks.serve")
    given = parser.parse_args(arguments)
    names = given.shapes.split(",")
    if unknown := set(names) - set(SHAPES):
        parser.error(f"--shapes: no {', '.join(sorted(unknown))} among {', '.join(SHAPES)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that children are stopped
    say = command.speaker()
    loads = QUICK_LOADS if given.quick else LOADS
    options = of_loads(given, loads)
    made = Made.by("benchmarks.shapes", arguments, quick=given.quick)
    given.out.mkdir(parents=True, exist_ok=True)
    results = command.read(given.out, "shapes", Results) or Results()
    for name in names:
        say(f"{name}: writing random weights")
        with tempfile.TemporaryDirectory(prefix="shape-", dir=given.out) as scratch:
            file = write_random_base(Path(scratch) / f"smollm2-{name.lower()}-random.gguf", SHAPES[name])
            results.sizes[name] = serve.run(replace(options, model=str(file), home=Path(scratch)), made, say)
        command.write(given.out, "shapes", results)
    say(f"done; {given.out / 'shapes.json'} has the results")
    print(markdown(results))
    return results


if __name__ == "__main__":
    main()
