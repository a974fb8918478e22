"""Scaling curves: `python -m benchmarks.curves`.

Starts the real server, as `benchmarks.serve` does, and drives it over HTTP: more distinct adapters, higher ranks,
larger blends, longer contexts and more streams, with what each holds in memory. Writes curves.json. For figures
that mean something the machine must be otherwise idle.
"""

import signal
import sys
import tempfile
from pathlib import Path

from benchmarks import command
from benchmarks.command import Made, positive
from benchmarks.curves.loads import CURVES, Scale
from benchmarks.curves.register import register
from benchmarks.curves.report import markdown
from benchmarks.curves.results import Results
from benchmarks.curves.run import Bench, measure
from benchmarks.machine import Machine
from benchmarks.prompts import PromptSource
from benchmarks.serving.adapter_files import Sizes
from benchmarks.serving.systems.server_process import DTYPES, ServerConfig
from server.model.base.source import resolve_base
from server.model.base.weights import load_base


def main(arguments: list[str] | None = None) -> Results:
    """Run it all; the results, which are printed and written too."""
    parser = command.parser("benchmarks.curves", "Measures the server as one thing grows at a time.")
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    parser.add_argument("--rounds", type=positive, default=3, help="each measures every point once")
    parser.add_argument("--only", default="", metavar="NAME,...", help=f"of {', '.join(CURVES)}")
    parser.add_argument(
        "--registered", type=positive, default=1000, help="the most distinct adapters (10 MB each)"
    )
    parser.add_argument("--pool", type=positive, default=256, help="of those, how many have room")
    options = parser.parse_args(arguments)
    names = [name for name in options.only.split(",") if name] or list(CURVES)
    if unknown := set(names) - set(CURVES):
        parser.error(f"--only: no {', '.join(sorted(unknown))} among {', '.join(CURVES)}")
    say = command.speaker()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that nothing is left running
    options.out.mkdir(parents=True, exist_ok=True)
    converted = resolve_base(options.model, options.home, progress=say)
    base, sizes = load_base(converted), Sizes.read(converted)
    quick: bool = options.quick
    scale = Scale.quick() if quick else Scale.full(options.registered, options.pool, sizes.max_positions)
    rounds = 1 if quick else options.rounds
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=options.out) as scratch:
        home, log = Path(scratch) / "home", options.out / "curves.log"
        plans = [CURVES[name](scale) for name in names]
        adapters = list(dict.fromkeys(adapter for plan in plans for adapter in plan.adapters))
        register(adapters, home, base, sizes, Path(scratch), say)
        config = ServerConfig(home, converted.parent, options.model, options.dtype, "cpu", options.threads, log)
        prompts = PromptSource(base.tokenizer, many=True)
        bench = Bench(config, base.config.shape, prompts, rounds, say)
        curves = tuple(measure(plan, bench) for plan in plans)
    results = Results(
        Made.by("benchmarks.curves", arguments, quick=quick),
        Machine.this(options.threads),
        *(Path(options.model).name, options.dtype, rounds, scale.prompt_tokens, scale.max_tokens),
        curves,
    )
    command.write(options.out, "curves", results)
    say(f"done; {options.out / 'curves.json'} holds what was found")
    print(markdown(results))
    return results


if __name__ == "__main__":
    main()
