"""Time of a native step by phase: `python -m benchmarks.serving.phases`.

Measures steps of growing numbers of streams, each decoding a token after a context of the same length, and of one
prompt. All use the base with sampling (temperature 0.7, top-p 0.9). Each phase is shown with its bound: reading
its weights, keys and values once, or its multiplications, each at the highest speed seen here: that of torch's sum
and product, or of any phase. Writes phases.json. The machine must be otherwise idle.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks import command
from benchmarks.command import QUICK, Made, positive
from benchmarks.machine import Machine
from benchmarks.serving.bandwidth import bandwidth
from benchmarks.tables import milliseconds, number, table
from server.model.base.config import ModelConfig
from server.model.base.source import resolve_base
from server.model.base.weights import BaseWeights, load_base
from server.model.native.abi import PHASES
from server.model.native.library import instructions
from server.model.native.load import load_native
from server.model.native.model import ROW_FORMAT, NativeLora, NativeModel, StepTables
from server.model.native.sampling import SampleTable
from server.model.ops.linear import can_pack
from server.model.rank_rows import RankRows

BLOCK = 16
PRODUCT = 2048
"""Rows, columns and depth of torch's product, whose speed may be the bound."""


@dataclass(frozen=True)
class Step:
    """A step of `streams` sequences, with `tokens` new tokens each after a context of `context` tokens."""

    streams: int
    tokens: int
    context: int

    @property
    def title(self) -> str:
        if self.tokens > 1:
            return f"a prompt of {self.tokens} tokens"
        return f"{self.streams} stream{'s' if self.streams > 1 else ''}"


@dataclass(frozen=True)
class Found:
    """Median times of one step, in seconds."""

    step: Step
    phases: dict[str, float]
    whole: float  # of the call, as seen by Python


@dataclass(frozen=True)
class Results:
    """All results of this benchmark."""

    made: Made
    machine: Machine
    base: str
    bandwidth: float  # bytes per second, the fastest seen
    speed: float  # floating-point operations per second, the fastest seen
    sizes: dict[str, int]  # parameters of each phase that multiplies by weights
    weight_bytes: dict[str, int]  # of the same phases, as held in memory
    cache_bytes: int  # per position, keys and values
    attention_flops: int  # per new token and position that it attends to
    found: tuple[Found, ...]


def main(arguments: list[str] | None = None) -> Results:
    """Run the benchmark; return, print and write the results."""
    parser = command.parser("benchmarks.serving.phases", "Measure the time of a native step by phase.")
    parser.add_argument("--streams", type=positive, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--context", type=positive, default=128, help="tokens before each stream's new one")
    parser.add_argument("--prompt", type=positive, default=512, help="tokens of the step that is a prompt")
    parser.add_argument("--repeats", type=positive, default=40)
    options = parser.parse_args(arguments)
    if options.quick:
        options.streams, options.repeats, options.prompt = [1, 2], 3, 32
    say = command.speaker()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    directory = resolve_base(options.model, options.home, progress=say)
    base = load_base(directory, torch.bfloat16)
    length = max(options.context + 1, options.prompt)
    model = load_native(base, options.home / "native", length, say)
    if model is None:
        raise SystemExit("no native code here: a CPU with AVX2, or a 64-bit Arm, and a compiler are needed")
    torch.set_num_threads(1)  # as in a server: torch's threads would compete with native code for the cores
    steps = [Step(streams, 1, options.context) for streams in options.streams]
    found = []
    for step in (*steps, Step(1, options.prompt, 0)):
        say(step.title)
        found.append(measured(model, step, options.repeats))
    torch.set_num_threads(options.threads)
    are_stored = keeps_stored(instructions(), options.threads)
    sizes, weight_bytes = parameters(model.config), bytes_of(base.weights, are_stored=are_stored)
    products = [(each, phase, size) for each in found for phase, size in sizes.items() if phase != "head"]
    read = [weight_bytes[phase] / each.phases[phase] for each, phase, _ in products]
    speeds = [
        2 * size * each.step.streams * each.step.tokens / each.phases[phase] for each, phase, size in products
    ]
    config = model.config
    results = Results(
        Made.by("benchmarks.serving.phases", arguments, quick=options.quick),
        Machine.this(options.threads),
        directory.name,
        max(*read, bandwidth(options.threads, 1 << (24 if options.quick else 29))),
        max(*speeds, product_speed()),
        sizes,
        weight_bytes,
        2 * 2 * config.num_layers * config.kv_size,
        4 * config.num_layers * config.q_size,
        tuple(found),
    )
    command.write(options.out, "phases", results)
    print(markdown(results))
    return results


def parameters(config: ModelConfig) -> dict[str, int]:
    """Return the number of weights in each phase's products."""
    features = config.shape.features
    groups = {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "gate_up": ("gate_proj", "up_proj")}
    groups["down"] = ("down_proj",)
    found = {
        phase: config.num_layers * sum(features[name][0] * features[name][1] for name in names)
        for phase, names in groups.items()
    }
    return {**found, "head": config.vocab_size * config.hidden_size}


def keeps_stored(native: str, threads: int) -> bool:
    """Return whether native code for these instructions reads 4- and 8-bit weights as they are stored, rather than
    expanded to 16 bits. serve.cpp decides the same."""
    return native.startswith("avx512") or threads > 2


def bytes_of(weights: BaseWeights, *, are_stored: bool = True) -> dict[str, int]:
    """Return the bytes of weights that each phase reads, of stored sizes if `are_stored`."""
    found = dict.fromkeys(("qkv", "o", "gate_up", "down", "head"), 0)
    for name, tensor in weights.tensors():
        phase = "head" if tensor is weights.lm_head else name.rpartition(".")[2]
        if phase in found:
            stored = weights.quantized.get(name) if are_stored else None
            found[phase] += tensor.nbytes if stored is None else stored.blocks.nbytes
    return found


def measured(model: NativeModel, step: Step, repeats: int) -> Found:
    """Run the step repeatedly; return the medians."""
    run = _runner(model, step)
    for _ in range(3):
        run()
    model.take_phases()
    wholes, spent = [], []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        wholes.append(time.perf_counter() - begun)
        spent.append(model.take_phases())
    phases = {phase: statistics.median(each[phase] for each in spent) for phase in PHASES}
    return Found(step, phases, statistics.median(wholes))


def _runner(model: NativeModel, step: Step) -> Callable[[], None]:
    config, streams = model.config, step.streams
    blocks = -(-(step.context + step.tokens) // BLOCK)
    shape = (streams * blocks, config.num_layers, BLOCK, config.num_kv_heads, config.head_dim)
    k, v = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2))
    rows = RankRows(config.shape, max_rank=1, row_format=ROW_FORMAT, device=torch.device("cpu"))
    lora = NativeLora(rows, [])
    ids = np.arange(streams * step.tokens, dtype=np.int64) % config.vocab_size
    runs = np.array(
        [(i * step.tokens, (i + 1) * step.tokens, step.context, i * blocks, 1) for i in range(streams)], np.int64
    )

    tables = StepTables(ids, runs, np.arange(streams * blocks, dtype=np.int32), k, v, lora)

    def run() -> None:
        choices = SampleTable(config.vocab_size)
        for key in range(streams):
            choices.add(temperature=0.7, top_k=0, top_p=0.9, min_p=0.0, key=key, num_top=0)
        model.draw(tables, choices)

    return run


def product_speed() -> float:
    """Return the floating-point operations per second of torch's product in bf16, or in fp32 if the processor has
    no bf16 instructions, as bf16 would then take minutes."""
    dtype = torch.bfloat16 if can_pack(torch.zeros(1, 1, dtype=torch.bfloat16)) else torch.float32
    a, b = (torch.randn(PRODUCT, PRODUCT, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begun)
    return 2 * PRODUCT**3 / best


def limits(results: Results, step: Step, phase: str) -> tuple[float, float] | None:
    """Return the least seconds for the phase's reads and multiplications; None for a phase that does neither."""
    rows = step.streams * step.tokens
    if phase == "attention":
        positions = step.streams * (step.context + step.tokens)
        seen = step.streams * (step.context * step.tokens + step.tokens * (step.tokens + 1) // 2)
        return positions * results.cache_bytes / results.bandwidth, seen * results.attention_flops / results.speed
    size = results.sizes.get(phase)
    if size is None:
        return None
    rows = step.streams if phase == "head" else rows
    return results.weight_bytes[phase] / results.bandwidth, 2 * size * rows / results.speed


def markdown(results: Results) -> str:
    """Return the whole report."""
    parts = [
        *([QUICK] if results.made.quick else []),
        f"Made by `{results.made.command}`, {results.made.day}: {results.base}, {results.machine}. Memory is read "
        f"at {number(results.bandwidth / 1e9)} GB/s at most; the fastest product does "
        f"{number(results.speed / 1e9)} GFLOP/s.",
        "Milliseconds (medians), and in brackets the share of that in which memory or arithmetic, whichever takes "
        "longer, could have done it.",
        table(("", *(each.step.title for each in results.found)), _rows(results)),
    ]
    return "\n\n".join(parts)


def _rows(results: Results) -> list[tuple[str, ...]]:
    def cell(each: Found, phase: str) -> str:
        least = limits(results, each.step, phase)
        took = each.phases[phase]
        return milliseconds(took) + ("" if least is None else f" ({max(least) / took:.0%})")

    def whole(each: Found) -> str:
        least = [limits(results, each.step, phase) for phase in PHASES]
        return f"{milliseconds(each.whole)} ({sum(max(one) for one in least if one) / each.whole:.0%})"

    rows = [(phase, *(cell(each, phase) for each in results.found)) for phase in PHASES]
    sums = [sum(each.phases.values()) for each in results.found]
    outside = [milliseconds(each.whole - total) for each, total in zip(results.found, sums, strict=True)]
    return [*rows, ("outside the phases", *outside), ("the step", *map(whole, results.found))]


if __name__ == "__main__":
    main()
