"""The serving benchmark: `python -m benchmarks.serve`, or `make bench`.

Starts the real server, drives it over HTTP from this process, and runs transformers and PEFT on the same weights,
prompts and threads in turn with it, never at once. Prints tables in Markdown and whether the targets are reached;
writes serve.json, serve.md and serve.png. For figures that mean something the machine must be otherwise idle.
"""

import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # run by its path: what Python put first is this folder, not the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from transformers import AutoTokenizer

from benchmarks import many_adapters, report
from benchmarks.adapter_files import RANK, Sizes, write_adapter
from benchmarks.many_adapters import Many, ManyConfig
from benchmarks.options import Options, parse
from benchmarks.peers import Peer, PeerConfig
from benchmarks.prompts import PromptSource
from benchmarks.results import Machine, Results, Settings, Start
from benchmarks.rounds import Rounds
from benchmarks.server_process import Server, ServerConfig, import_seconds
from benchmarks.targets import evaluate
from server.model.config import ModelConfig
from server.model.export import export_hugging_face
from server.model.rank_rows import RankRows
from server.model.source import resolve_base
from server.model.weights import load_base

LOG = "server.log"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Bases:
    """One base three ways."""

    converted: Path  # the server's
    hugging_face: Path  # the peer's: the same weights
    config: ModelConfig


def main(arguments: list[str] | None = None) -> Results:
    """Run it all; the results, which are printed and written too."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that nothing is left running
    started = time.perf_counter()
    say = _speaker(started)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / LOG).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=options.out) as scratch:
        results = _measure(options, Path(scratch), say)
    targets = evaluate(results)
    text = report.markdown(results, targets)
    results.write(options.out / "serve.json", [asdict(target) for target in targets])
    (options.out / "serve.md").write_text(text, encoding="utf-8")
    if results.rows:
        report.chart(results, options.out / "serve.png")
    say(f"done; {options.out} holds serve.json, serve.md and serve.png")
    print(text)
    return results


def _measure(options: Options, scratch: Path, say: Callable[[str], None]) -> Results:
    bases = _prepare(options, scratch, say)
    sizes = Sizes.read(bases.hugging_face)
    prompts = PromptSource(AutoTokenizer.from_pretrained(bases.hugging_face, model_max_length=1 << 30))
    name = Path(options.model).name
    settings = Settings(
        *(name, options.dtype, options.device, options.rounds, options.prompt_tokens, options.max_tokens),
        quick=options.quick,
    )
    results = Results(Machine.this(options.threads), settings)
    num_cold = options.cold * options.rounds
    # all have room: what the loads use must not be evicted by those that are measured cold
    server_config = _server_config(options, bases, scratch / "home", options.num_adapters + num_cold)
    if options.wants("start"):
        results.start = _starts(options, server_config, say)
    if options.loads or any(map(options.wants, ("ttft", "cold", "long"))):
        say("writing adapters")
        directories = [
            write_adapter(scratch / f"adapter-{index}", sizes, seed=index)
            for index in range(options.num_adapters + num_cold)
        ]
        with Server(server_config) as server:
            if options.peer:
                say("starting the peer")
                with Peer(
                    PeerConfig(bases.hugging_face, DTYPES[options.dtype], options.device, options.threads)
                ) as peer:
                    Rounds(options, sizes, prompts, directories, server, peer, say).run(results)
                    results.peer_peak_rss = peer.stop()
            else:
                Rounds(options, sizes, prompts, directories, server, None, say).run(results)
            server.stop()
            results.server_peak_rss = server.peak_rss
    if options.wants("many"):
        results.many = _many(options, bases, sizes, prompts, scratch, say)
    return results


def _prepare(options: Options, scratch: Path, say: Callable[[str], None]) -> Bases:
    """The converted base, made the first time, and the same weights as a Hugging Face directory."""
    converted = resolve_base(options.model, options.home, progress=say)
    base = load_base(converted)
    say("exporting the base for the peer")
    export_hugging_face(base, scratch / "base", DTYPES[options.dtype])
    return Bases(converted, scratch / "base", base.config)


def _server_config(options: Options, bases: Bases, home: Path, num_resident: int) -> ServerConfig:
    """Of a server with room for so many adapters."""
    dtype, device = DTYPES[options.dtype], torch.device(options.device)
    is_native = options.native and dtype is torch.bfloat16 and device.type == "cpu"
    per_rank = RankRows.bytes_per_rank(bases.config.shape, dtype, device, is_native)
    return ServerConfig(
        home=home,
        base_dir=bases.converted.parent,
        model=options.model,
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        log=options.out / LOG,
        native=options.native,
        adapter_cache_bytes=max(num_resident * RANK * per_rank, 1 << 20),  # less is refused
    )


def _starts(options: Options, config: ServerConfig, say: Callable[[str], None]) -> Start:
    ready, imports = [], []
    for index in range(options.starts):
        say(f"start {index + 1} of {options.starts}")
        imports.append(import_seconds(options.threads))
        with Server(config) as server:
            server.stop()
            ready.append(server.start_seconds)
    return Start(tuple(ready), tuple(imports))


def _many(
    options: Options,
    bases: Bases,
    sizes: Sizes,
    prompts: PromptSource,
    scratch: Path,
    say: Callable[[str], None],
) -> Many:
    config = ManyConfig(
        *(options.registered, options.pool, options.zipf),
        *(options.many_streams, options.many_requests, options.many_rounds),
        *(options.prompt_tokens, options.max_tokens),
    )
    server_config = _server_config(options, bases, scratch / "many-home", options.pool)
    return many_adapters.measure(config, server_config, sizes, prompts, scratch, say)


def _speaker(started: float) -> Callable[[str], None]:
    def say(line: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {line}", file=sys.stderr, flush=True)

    return say


if __name__ == "__main__":
    main()
