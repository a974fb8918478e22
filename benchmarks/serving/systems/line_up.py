"""Selection and start of the peers, each with its fastest settings."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.command import Say
from benchmarks.peers import gguf_files, llama_cpp, openvino, venvs
from benchmarks.peers.llama_cpp import LlamaCppConfig, LlamaCppServer
from benchmarks.peers.openvino import OpenVino, OpenVinoConfig
from benchmarks.peers.transformers_peft import PeerConfig, TransformersPeft
from benchmarks.peers.venvs import LLAMA_CPP, OPENVINO, MadePeer
from benchmarks.peers.vllm import Vllm, VllmConfig, is_installed
from benchmarks.prompts import PromptSource
from benchmarks.serving.adapter_files import ALPHA, RANK
from benchmarks.serving.options import BITS_16, PEFT, TORCH, VLLM, Options
from benchmarks.serving.systems.server_process import Server, ServerConfig
from benchmarks.serving.systems.systems import WIDE, OurServer, Streams, System, Variant, fastest
from benchmarks.serving.systems.wires import Request

QUANTIZED = ("Q8_0", "Q4_1")
Trial = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Inputs:
    """Inputs of all systems."""

    base: Path  # a Hugging Face directory
    dtype: torch.dtype
    adapters: Mapping[str, Path]  # PEFT directories by name
    prompts: PromptSource
    scratch: Path
    log: Path


def line_up(
    options: Options,
    inputs: Inputs,
    torch_config: ServerConfig,
    wide_config: ServerConfig | None,
    stack: ExitStack,
    say: Say,
) -> tuple[list[System], dict[str, str]]:
    """Start the wanted peers, to be stopped by `stack`; return them, and the reasons why others are left out.

    `wide_config` is of our server with 16-bit weights, or None if it has those by default.
    """
    systems: list[System] = []
    missing: dict[str, str] = {}

    def add(system: System) -> None:
        stack.callback(system.stop)
        systems.append(system)

    makers: dict[str, Callable[[MadePeer], list[Variant]]] = {
        LLAMA_CPP: lambda peer: _llama_cpp(options, inputs, peer, say),
        OPENVINO: lambda peer: [_openvino(options, inputs, peer, say)],
    }
    for name, make in makers.items():
        if name not in options.peers:
            continue
        if name == LLAMA_CPP and options.instructions is not None:
            name = venvs.restricted(options.instructions)
        peer = venvs.find(options.cache, name)
        if inputs.dtype is not torch.bfloat16 or options.device != "cpu":
            missing[name] = "it is measured in bf16 on a CPU"
        elif peer is None:
            missing[name] = f"it has not been made: python -m benchmarks.peers make {name}"
        else:
            say(f"starting {name}")
            for start in make(peer):
                add(start())
            continue
        say(f"{name} is left out: {missing[name]}")
    if VLLM in options.peers and options.device != "cpu":
        if is_installed():
            say("starting vLLM")
            longest = 2 * (options.prompt_tokens + options.max_tokens)
            streams = max(options.streams)
            add(Vllm(VllmConfig(inputs.base, inputs.adapters, streams, longest, inputs.log.with_name("vllm.log"))))
        else:
            missing[VLLM] = "it isn't installed"
    if PEFT in options.peers:
        say("starting transformers and PEFT")
        config = PeerConfig(inputs.base, inputs.dtype, options.device, options.threads)
        add(TransformersPeft(config, inputs.adapters))
    if TORCH in options.peers:
        say("starting our server without its native code")
        server = stack.enter_context(Server(torch_config))
        add(OurServer(server, f"smolora {version('smolora')}", "smolora in torch", "SMOLORA_NATIVE=0"))
    if BITS_16 in options.peers and wide_config is not None:
        say("starting our server with 16-bit weights")
        server = stack.enter_context(Server(wide_config))
        add(
            OurServer(
                server, f"smolora {version('smolora')}", WIDE, "SMOLORA_MODEL=the peers' base", max_streams=1
            )
        )
    return systems, missing


def _llama_cpp(options: Options, inputs: Inputs, peer: MadePeer, say: Say) -> list[Variant]:
    model = inputs.scratch / "base-bf16.gguf"
    gguf_files.write_base(inputs.base, model)
    files = llama_cpp.adapter_files(inputs.base, inputs.adapters, inputs.scratch / "gguf-adapters")
    config = LlamaCppConfig(
        peer=peer,
        model=model,
        adapters=files,
        threads=options.threads,
        slots=max(options.streams),
        tokens_per_slot=2 * (options.prompt_tokens + options.max_tokens),
        log=inputs.log.with_name("llama.cpp.log"),
    )
    variants = {way: replace(config, variant=way) for way in llama_cpp.VARIANTS}
    best, trial = _tried(LLAMA_CPP, options, inputs, {way: _starter(each) for way, each in variants.items()}, say)
    chosen = variants[best]
    quantized = [
        replace(chosen, model=llama_cpp.quantize(peer, model, weights), adapters={}, weights=weights)
        for weights in QUANTIZED
    ]
    return [_starter(chosen, trial), *map(_starter, quantized)]


def _openvino(options: Options, inputs: Inputs, peer: MadePeer, say: Say) -> Variant:
    log = inputs.log.with_name("openvino.log")
    say("exporting the base for OpenVINO: about a minute")
    model = openvino.export(peer, inputs.base, inputs.scratch / "openvino", log)
    needed = dict(list(inputs.adapters.items())[:2])  # one adapter and a blend of two: it can't do more at a time
    config = OpenVinoConfig(*(peer, model, needed, ALPHA / RANK, options.threads, max(options.streams), log))
    variants = {way: replace(config, variant=way) for way in openvino.VARIANTS}
    starts: dict[str, Variant] = {way: _ov_starter(each) for way, each in variants.items()}
    best, trial = _tried(openvino.NAME, options, inputs, starts, say)
    return _ov_starter(variants[best], trial)


def _starter(config: LlamaCppConfig, trial: Trial | None = None) -> Variant:
    return lambda: LlamaCppServer(config, trial)


def _ov_starter(config: OpenVinoConfig, trial: Trial | None = None) -> Variant:
    return lambda: OpenVino(config, trial)


def _tried(
    name: str, options: Options, inputs: Inputs, variants: Mapping[str, Variant], say: Say
) -> tuple[str, Trial]:
    """Return the variant that is fastest for one stream and for the most streams, and all speeds. A quick run
    takes the first variant. So does a run with restricted instructions, where the other variants take minutes and
    were several times slower."""
    if options.quick or options.instructions is not None:
        return next(iter(variants)), {}
    trials: list[Streams] = []
    for streams in (min(options.streams), max(options.streams)):
        texts = inputs.prompts.take(streams * options.requests_of(streams), options.prompt_tokens)
        requests = [Request(text, (), options.max_tokens) for text in texts]
        trials.append([requests[stream::streams] for stream in range(streams)])
    return fastest(name, variants, trials, say)
