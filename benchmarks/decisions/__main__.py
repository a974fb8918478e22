"""Measure decisions: `python -m benchmarks.decisions`.

`--parts calibration` trains an adapter for each of four data sets with the server's defaults, and compares its
accuracy and probabilities with PEFT's and scikit-learn's. It installs scikit-learn into an environment of its own
if it is missing. Data sets that are measured are kept, so an interrupted run resumes. `--parts speed` needs an
idle machine. Writes the results and docs/decisions.md.
"""

import argparse
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import command
from benchmarks.command import Made, positive
from benchmarks.decisions import calibration, methods, report, speed
from benchmarks.decisions.data import DATA_SETS
from benchmarks.machine import Machine
from benchmarks.peers import venvs
from benchmarks.prompts import PromptSource
from benchmarks.serving.adapter_files import Sizes, write_adapter
from benchmarks.serving.systems.server_process import Server, ServerConfig
from server.decisions.prompts import DecisionEncoder
from server.model.base.export import export_hugging_face
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.model.text.chat import PromptEncoder

QUICK_ROWS = 24
PROGRAM = "benchmarks.decisions"


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, and write the page."""
    parser = command.parser(PROGRAM, "Measure decisions: their quality, and their speed.")
    parser.set_defaults(out=Path("benchmarks/results"))
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the data and the peers are kept")
    parser.add_argument("--parts", nargs="*", choices=("calibration", "speed"), default=("calibration", "speed"))
    parser.add_argument("--data", nargs="+", choices=list(DATA_SETS), default=list(DATA_SETS))
    parser.add_argument("--rounds", type=positive, default=3, help="rounds of the speed")
    parser.add_argument("--page", type=Path, default=Path("docs/decisions.md"), help="the page to write")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the server is stopped
    say = command.speaker()
    torch.set_num_threads(options.threads)
    folder = options.out / ("decisions-quick" if options.quick else "decisions")
    folder.mkdir(parents=True, exist_ok=True)
    converted = resolve_base(options.model, options.home, progress=say)
    base = load_base(converted)
    made = Made.by(PROGRAM, arguments, quick=options.quick)
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=options.out) as scratch:
        exported = Path(scratch) / "base"
        export_hugging_face(base, exported)
        if (compiled := options.home / "native").is_dir():
            shutil.copytree(compiled, Path(scratch) / "home/native")
        config = ServerConfig(
            Path(scratch) / "home",
            converted.parent,
            options.model,
            {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[str(base.dtype).removeprefix("torch.")],
            "cpu",
            options.threads,
            Path(scratch) / "log",
        )
        if "calibration" in options.parts:
            _calibration(options, config, exported, folder, made, say)
        if "speed" in options.parts:
            _speed(options, config, base, exported, folder, made, say)
    report.write(folder, folder / "decisions.md" if options.quick else options.page)


def kept_outcomes(folder: Path, model: str) -> dict[str, calibration.Outcome]:
    """Return what an interrupted run measured, by data set. Results of another model don't count."""
    kept = command.read(folder, "calibration", report.Calibration)
    return dict(kept.outcomes) if kept is not None and kept.model == model else {}


def _calibration(
    options: argparse.Namespace, config: ServerConfig, base: Path, folder: Path, made: Made, say: command.Say
) -> None:
    outcomes = kept_outcomes(folder, options.model)
    missing = [name for name in options.data if name not in outcomes]
    if not missing:
        return
    peer = venvs.find(options.cache, venvs.SCIKIT_LEARN) or venvs.make(options.cache, venvs.SCIKIT_LEARN, say)
    with Server(replace(config, workers=1)) as server:
        for name in missing:
            data = DATA_SETS[name](options.cache, say)
            if options.quick:
                data = data.reduced(QUICK_ROWS)
            say(f"{name}: training an adapter")
            ours = methods.adapter(server.url, name, data, say)
            say(f"{name}: training peers")
            scored = {
                methods.ADAPTER: ours,
                methods.PEFT: methods.peft(base, data, say),
                methods.LINEAR: methods.linear(peer, data),
            }
            outcomes[name] = calibration.measure(data, scored)
            machine = Machine.this(options.threads)
            found = report.Calibration(made, machine, options.model, peer.version, outcomes)
            command.write(folder, "calibration", found)
            for method, quality in outcomes[name].methods.items():
                say(f"{name}: {method}: accuracy {quality.accuracy.value:.3f}, T {quality.temperature:.2f}")
        server.stop()


def _speed(
    options: argparse.Namespace,
    config: ServerConfig,
    base: BaseModel,
    exported: Path,
    folder: Path,
    made: Made,
    say: command.Say,
) -> None:
    adapter = write_adapter(exported.parent / "adapter", Sizes.read(exported), seed=1, dtype=base.dtype)
    ends = base.config.eos_token_ids
    encoder = DecisionEncoder(PromptEncoder(base.tokenizer), ends[0])
    with Server(config) as server:
        systems = speed.Systems(server, exported, adapter, encoder)
        try:
            works = speed.QUICK_WORKS if options.quick else speed.WORKS
            prompts = PromptSource(base.tokenizer, many=True)
            rows = speed.measure(systems, prompts, works, 1 if options.quick else options.rounds, say)
        finally:
            systems.close()
        server.stop()
    command.write(folder, "speed", report.Speed(made, Machine.this(options.threads), options.model, rows))


if __name__ == "__main__":
    main()
