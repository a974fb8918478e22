"""Serving benchmark: `python -m benchmarks.serve`, or `make bench`.

Starts the real server, drives it over HTTP from this process, and runs the peers on the same weights, prompts and
threads in turn with it, never at once. Prints Markdown tables and whether targets are reached; writes serve.json.
The machine must be otherwise idle.
"""

import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

if not __package__:  # run by its path: Python put this folder first, not the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from transformers import AutoTokenizer

from benchmarks import command
from benchmarks.command import Made, Say
from benchmarks.machine import Machine
from benchmarks.peers.transformers_peft import TransformersPeft
from benchmarks.prompts import PromptSource
from benchmarks.serving import many_adapters, report
from benchmarks.serving.adapter_files import RANK, Sizes, write_adapter
from benchmarks.serving.many_adapters import Many, ManyConfig
from benchmarks.serving.options import Options, parse
from benchmarks.serving.own_parts import OwnParts
from benchmarks.serving.phases import bytes_of, keeps_stored
from benchmarks.serving.results import Results, Settings, Start
from benchmarks.serving.rounds import Rounds
from benchmarks.serving.systems.line_up import Inputs, line_up
from benchmarks.serving.systems.server_process import DTYPES, Server, ServerConfig, adapter_room, import_seconds
from benchmarks.serving.systems.systems import OurServer
from server.model.base.export import export_hugging_face
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, BaseWeights, load_base
from server.model.native.build import NativeUnavailable
from server.model.native.library import instructions

LOG = "serve.log"


@dataclass(frozen=True)
class Bases:
    """The base in two formats."""

    converted: Path  # for our server
    hugging_face: Path  # the same weights, for the peers
    base: BaseModel


def main(arguments: list[str] | None = None) -> Results:
    """Run the benchmark; return, print and write the results."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that children are stopped
    say = command.speaker()
    results = run(options, Made.by("benchmarks.serve", arguments, quick=options.quick), say)
    command.write(options.out, "serve", results)
    say(f"done; {options.out / 'serve.json'} has the results")
    print(report.markdown(results), report.details(results), sep="\n")
    return results


def run(options: Options, made: Made, say: Say) -> Results:
    """Measure everything. The systems' output goes to files under `options.out`."""
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / LOG).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=options.out) as scratch:
        return _measure(options, Path(scratch), made, say)


def _measure(options: Options, scratch: Path, made: Made, say: Say) -> Results:
    bases = _prepare(options, scratch, say)
    sizes = Sizes.read(bases.hugging_face)
    tokenizer = AutoTokenizer.from_pretrained(bases.hugging_face, model_max_length=1 << 30)
    prompts = PromptSource(tokenizer)
    settings = Settings(
        *(Path(options.model).name, options.dtype, options.device, options.rounds),
        *(options.prompt_tokens, options.max_tokens),
        *_weight_bytes(bases.base.weights, options),
    )
    results = Results(made, Machine.this(options.threads), settings)
    # All adapters have room: measuring cold adapters must not evict those of the loads.
    num_resident = options.num_adapters + options.num_cold
    server_config = _server_config(options, bases, scratch / "home", num_resident)
    if options.wants("start"):
        results.start = _starts(options, server_config, say)
    if options.in_rounds:
        say("writing adapters")
        directories = [
            write_adapter(scratch / f"adapter-{index}", sizes, seed=index)
            for index in range(options.num_adapters + options.num_cold)
        ]
        adapters = {directory.name: directory for directory in directories[: options.num_adapters]}
        inputs = Inputs(bases.hugging_face, DTYPES[options.dtype], adapters, prompts, scratch, options.out / LOG)
        with ExitStack() as stack:
            server = stack.enter_context(Server(server_config))
            ours = OurServer(server, f"smolora {version('smolora')}")
            stack.callback(ours.stop)
            torch_config = _server_config(options, bases, scratch / "torch-home", num_resident, native=False)
            wide_config = None
            if settings.weight_bytes < settings.wide_bytes:
                wide_config = replace(
                    server_config,
                    home=scratch / "wide-home",
                    base_dir=scratch / "wide-base",
                    model=str(bases.hugging_face),
                )
            peers, results.missing = line_up(options, inputs, torch_config, wide_config, stack, say)
            systems = [ours, *peers]
            for system in systems:
                if isinstance(system, OurServer):
                    for name, directory in adapters.items():
                        system.server.upload(name, directory)
            peft = next((peer for peer in peers if isinstance(peer, TransformersPeft)), None)
            own = OwnParts(
                options,
                sizes.max_positions,
                prompts,
                PromptSource(tokenizer, many=True),
                directories[options.num_adapters :],
                ours,
                peft,
                say,
            )
            Rounds(options, prompts, list(adapters), systems, own, say).run(results)
            results.systems = [system.facts for system in systems]
            results.peak_rss = {system.facts.name: system.peak_rss for system in systems}
    if options.wants("many"):
        results.many = _many(options, bases, sizes, prompts, scratch, say)
    return results


def _prepare(options: Options, scratch: Path, say: Say) -> Bases:
    """Convert the base if needed, and export the same weights as a Hugging Face directory."""
    converted = resolve_base(options.model, options.home, progress=say)
    base = load_base(converted)
    say("exporting the base for the peers")
    export_hugging_face(base, scratch / "base", DTYPES[options.dtype])
    return Bases(converted, scratch / "base", base)


def _server_config(
    options: Options, bases: Bases, home: Path, num_resident: int, *, native: bool = True
) -> ServerConfig:
    """Return the configuration of a server with room for `num_resident` adapters."""
    shape = bases.base.config.shape
    return ServerConfig(
        home=home,
        base_dir=bases.converted.parent,
        model=options.model,
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        log=options.out / LOG,
        native=native,
        adapter_cache_bytes=adapter_room(shape, options.dtype, options.device, num_resident * RANK, native=native),
        instructions=options.instructions,
    )


def _weight_bytes(weights: BaseWeights, options: Options) -> tuple[int, int]:
    """Return the bytes that a step of one stream reads, and the bytes if all weights had `dtype`. In bf16, native
    code may keep weights as they are stored."""
    dtype = DTYPES[options.dtype]
    if dtype is not torch.bfloat16 or options.device != "cpu":
        size = weights.num_parameters * dtype.itemsize
        return size, size
    try:
        are_stored = keeps_stored(options.instructions or instructions(), options.threads)
    except NativeUnavailable:
        are_stored = False
    stored, wide = (sum(bytes_of(weights, are_stored=are).values()) for are in (are_stored, False))
    return stored, wide


def _starts(options: Options, config: ServerConfig, say: Say) -> Start:
    ready, imports = [], []
    for index in range(options.starts):
        say(f"start {index + 1} of {options.starts}")
        imports.append(import_seconds(options.threads))
        with Server(config) as server:
            server.stop()
            ready.append(server.start_seconds)
    return Start(tuple(ready), tuple(imports))


def _many(options: Options, bases: Bases, sizes: Sizes, prompts: PromptSource, scratch: Path, say: Say) -> Many:
    config = ManyConfig(
        *(options.registered, options.pool, options.zipf),
        *(options.many_streams, options.many_requests, options.many_rounds),
        *(options.prompt_tokens, options.max_tokens),
    )
    server_config = _server_config(options, bases, scratch / "many-home", options.pool)
    return many_adapters.measure(config, server_config, sizes, prompts, scratch, say)


if __name__ == "__main__":
    main()
