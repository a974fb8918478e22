"""Measure scaling curves: `python -m benchmarks.scaling`.

Starts the real server, as `benchmarks.serve` does, and drives it over HTTP with more distinct adapters, higher
ranks, larger blends, longer contexts and more streams. Also measures the memory of each point. Writes
scaling.json. The machine must be otherwise idle.
"""

import signal
import sys
import tempfile
from pathlib import Path

from benchmarks import command
from benchmarks.command import Made, positive
from benchmarks.machine import Machine
from benchmarks.prompts import PromptSource
from benchmarks.scaling.loads import CURVES, Scale
from benchmarks.scaling.register import register
from benchmarks.scaling.report import markdown
from benchmarks.scaling.results import Results
from benchmarks.scaling.run import Bench, measure
from benchmarks.serving.adapter_files import Sizes
from benchmarks.serving.systems.server_process import DTYPES, ServerConfig
from server.model.base.source import resolve_base
from server.model.base.weights import load_base


def main(arguments: list[str] | None = None) -> Results:
    """Run the benchmark; return, print and write the results."""
    parser = command.parser("benchmarks.scaling", "Measure the server while one variable grows.")
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    parser.add_argument(
        "--rounds", type=positive, default=3, help="number of rounds; each measures every point once"
    )
    parser.add_argument("--only", default="", metavar="NAME,...", help=f"curves to measure: {', '.join(CURVES)}")
    parser.add_argument(
        "--registered", type=positive, default=1000, help="largest number of distinct adapters (10 MB each)"
    )
    parser.add_argument("--pool", type=positive, default=256, help="number of these that fit into memory")
    options = parser.parse_args(arguments)
    names = [name for name in options.only.split(",") if name] or list(CURVES)
    if unknown := set(names) - set(CURVES):
        parser.error(f"--only: no {', '.join(sorted(unknown))} among {', '.join(CURVES)}")
    say = command.speaker()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that children are stopped
    options.out.mkdir(parents=True, exist_ok=True)
    converted = resolve_base(options.model, options.home, progress=say)
    base, sizes = load_base(converted), Sizes.read(converted)
    quick: bool = options.quick
    scale = Scale.quick() if quick else Scale.full(options.registered, options.pool, sizes.max_positions)
    rounds = 1 if quick else options.rounds
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=options.out) as scratch:
        home, log = Path(scratch) / "home", options.out / "scaling.log"
        plans = [CURVES[name](scale) for name in names]
        adapters = list(dict.fromkeys(adapter for plan in plans for adapter in plan.adapters))
        register(adapters, home, base, sizes, Path(scratch), say)
        config = ServerConfig(home, converted.parent, options.model, options.dtype, "cpu", options.threads, log)
        prompts = PromptSource(base.tokenizer, many=True)
        bench = Bench(config, base.config.shape, prompts, rounds, say)
        curves = tuple(measure(plan, bench) for plan in plans)
    results = Results(
        Made.by("benchmarks.scaling", arguments, quick=quick),
        Machine.this(options.threads),
        *(Path(options.model).name, options.dtype, rounds, scale.prompt_tokens, scale.max_tokens),
        curves,
    )
    command.write(options.out, "scaling", results)
    say(f"done; {options.out / 'scaling.json'} has the results")
    print(markdown(results))
    return results


if __name__ == "__main__":
    main()
