"""Measure the overhead of a cluster by process: `python -m benchmarks.cluster`; needs the extra `cluster`.

The single process, a cluster with one replica and a cluster with several replicas answer the same prompts over
HTTP, in turn and never at once. Writes cluster.json. The machine must be otherwise idle.
"""

import signal
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

from benchmarks import command
from benchmarks.cluster.report import Results, Row, markdown
from benchmarks.cluster.systems import SINGLE, Measured, Served, at
from benchmarks.command import Made, positive
from benchmarks.machine import Machine
from benchmarks.measure import Figures
from benchmarks.prompts import PromptSource
from benchmarks.serving.systems.server_process import ServerConfig
from benchmarks.serving.systems.systems import Streams
from benchmarks.serving.systems.wires import Request
from server.model.base.source import resolve_base
from server.model.base.weights import load_base


def main(arguments: list[str] | None = None) -> Results:
    """Run the benchmark; return, print and write the results."""
    parser = command.parser("benchmarks.cluster", "Compare engine replicas with the single process.")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument(
        "--rounds", type=positive, default=5, help="number of rounds; each measures every system once"
    )
    parser.add_argument("--streams", type=positive, default=32)
    parser.add_argument("--requests", type=positive, default=2, help="requests per stream and round")
    parser.add_argument("--prompt-tokens", type=positive, default=120)
    parser.add_argument("--max-tokens", type=positive, default=64)
    parser.add_argument("--replicas", type=positive, default=2, help="replicas of the larger cluster; 1: none")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.requests, options.prompt_tokens, options.max_tokens = 1, 1, 24, 8
    say = command.speaker()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that children are stopped
    options.out.mkdir(parents=True, exist_ok=True)
    converted = resolve_base(options.model, options.home, progress=say)
    prompts = PromptSource(load_base(converted).tokenizer, many=True)
    found: dict[str, list[Measured]] = defaultdict(list)

    def streams(max_tokens: int) -> Streams:
        texts = prompts.take(options.streams * options.requests, options.prompt_tokens)
        return [
            [Request(text, (), max_tokens) for text in texts[stream :: options.streams]]
            for stream in range(options.streams)
        ]

    with tempfile.TemporaryDirectory(prefix="scratch-", dir=options.out) as scratch, ExitStack() as stack:
        log = options.out / "cluster.log"
        config = ServerConfig(
            *(Path(scratch) / "home", converted.parent, options.model, options.dtype, "cpu", options.threads, log)
        )
        systems = []
        counts = {SINGLE: 0, "1 replica": 1}
        if options.replicas > 1:
            counts[f"{options.replicas} replicas"] = options.replicas
        for index, (name, num_replicas) in enumerate(counts.items()):
            say(f"starting: {name}")
            systems.append(Served(name, at(config, Path(scratch) / f"home-{index}"), num_replicas))
            stack.callback(systems[-1].kill)
        for system in systems:
            system.measure(streams(4))  # warm up
        for number in range(options.rounds):
            say(f"round {number + 1} of {options.rounds}")
            work = streams(options.max_tokens)
            shift = number % len(systems)
            for system in [*systems[shift:], *systems[:shift]]:
                found[system.name].append(system.measure(work))
                figures = Figures.of(found[system.name][-1].run)
                say(f"  {system.name}: {figures.tokens_per_second:.1f} tokens/s")
        for system in systems:
            system.stop()
    work_text = (
        f"{Path(options.model).name} in {options.dtype}; {options.streams} streams of the base, prompts of "
        f"{options.prompt_tokens} tokens, {options.max_tokens} new ones"
    )
    made = Made.by("benchmarks.cluster", arguments, quick=options.quick)
    rows = tuple(_row(name, found[name]) for name in counts)
    results = Results(made, Machine.this(options.threads), work_text, _same(found), rows)
    command.write(options.out, "cluster", results)
    print(markdown(results))
    return results


def _row(name: str, measured: list[Measured]) -> Row:
    per_token = [
        {kind: seconds * 1e3 / each.run.num_tokens for kind, seconds in each.processor_seconds.items()}
        for each in measured
    ]
    return Row(name, tuple(Figures.of(each.run) for each in measured), tuple(per_token))


def _same(found: dict[str, list[Measured]]) -> float:
    pairs = [
        theirs == ours
        for name, measured in found.items()
        if name != SINGLE
        for single, each in zip(found[SINGLE], measured, strict=True)
        for ours, theirs in zip(single.run.texts, each.run.texts, strict=True)
    ]
    return sum(pairs) / len(pairs)


if __name__ == "__main__":
    main()
