"""Converts a checkpoint to the directory that a base is loaded from.

The directory has the original config.json, generation_config.json and tokenizer, the weights with q·k·v and
gate·up stacked, and a manifest. It is created by one rename and never changes afterwards.

In its safetensors file all tensors start at multiples of 64 bytes, so that vector instructions can use the mapped
tensors directly. The format allows no gaps between tensors: a tensor that doesn't end at such a multiple is
followed by a filler tensor.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from adapters.storage.durable import new_directory, new_file, write_json
from server.errors import StartupError
from server.model.base.checkpoint import Checkpoint, StoredTensor, read_json
from server.model.base.config import ModelConfig
from server.model.base.quantized import QUANTIZED, Quantized
from server.model.base.weights import FORMAT, MANIFEST, WEIGHTS, BaseWeights, Manifest, digest_of, load_weights


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint, by its Hugging Face name."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stack:
    """A tensor of the converted file: tensors of the checkpoint, concatenated along the first dimension."""

    name: str
    parts: tuple[Part, ...]

    @property
    def rows(self) -> list[int]:
        return [part.shape[0] for part in self.parts]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(self.rows), *self.parts[0].shape[1:])


def layout(config: ModelConfig) -> Iterator[Stack]:
    """Yield every tensor of a base in the order of the converted file. A tied output head has no entry."""
    embedding = (config.vocab_size, config.hidden_size)
    norm = (config.hidden_size,)
    yield _stack("embed", ("model.embed_tokens", embedding))
    for index in range(config.num_layers):
        modules = {
            name: f"model.layers.{index}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        modules |= {name: f"model.layers.{index}.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
        linear = {name: (path, config.shape.features[name]) for name, path in modules.items()}
        yield _stack(f"layers.{index}.input_norm", (f"model.layers.{index}.input_layernorm", norm))
        yield _stack(f"layers.{index}.qkv", linear["q_proj"], linear["k_proj"], linear["v_proj"])
        yield _stack(f"layers.{index}.o", linear["o_proj"])
        yield _stack(f"layers.{index}.post_norm", (f"model.layers.{index}.post_attention_layernorm", norm))
        yield _stack(f"layers.{index}.gate_up", linear["gate_proj"], linear["up_proj"])
        yield _stack(f"layers.{index}.down", linear["down_proj"])
    yield _stack("final_norm", ("model.norm", norm))
    if not config.tie_word_embeddings:
        yield _stack("lm_head", ("lm_head", embedding))


def _stack(name: str, *modules: tuple[str, tuple[int, ...]]) -> Stack:
    return Stack(name, tuple(Part(f"{module}.weight", shape) for module, shape in modules))


ALIGNMENT = 64  # bytes: a cache line, and the largest vector register
FILLER = "_filler."
"""Prefix of the names of tensors that aren't part of the model."""

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written. `make` builds it just before it is written, so only one is in memory at a time."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_aligned(path: Path, tensors: Iterable[PlannedTensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors in order, and wait until they are on the disk. Raise OSError if that fails."""
    tensors = _with_fillers(tensors)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.num_bytes]
        header[tensor.name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": span}
        offset = span[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)  # the file's first 8 bytes are the header's length
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in tensors:
            made = tensor.make()
            assert made.dtype == tensor.dtype, tensor.name
            assert tuple(made.shape) == tensor.shape, tensor.name
            file.write(made.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _with_fillers(tensors: Iterable[PlannedTensor]) -> list[PlannedTensor]:
    filled: list[PlannedTensor] = []
    for tensor in tensors:
        filled.append(tensor)
        if gap := -tensor.num_bytes % ALIGNMENT:
            shape = (gap,)
            filled.append(PlannedTensor(f"{FILLER}{len(filled)}", shape, torch.uint8, _zeros(gap)))
    return filled


def _zeros(size: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.zeros(size, dtype=torch.uint8)


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_FAULTS = 5  # listed in an error


def convert(checkpoint: Checkpoint, target: Path, name: str, origin: str, revision: str | None = None) -> None:
    """Write the checkpoint as the converted directory `target`, unless another process has done so.

    Raise StartupError if the checkpoint isn't supported or lacks tensors, and OSError if it can't be written.
    """
    config = ModelConfig.of(checkpoint.config, checkpoint.generation, checkpoint.tokenizer.eos_token_id)
    if len(checkpoint.tokenizer) > config.vocab_size:
        raise StartupError(
            f"{name}: the tokenizer has {len(checkpoint.tokenizer)} tokens, the model only {config.vocab_size}"
        )
    planned = _plan(name, config, checkpoint.tensors)
    with new_directory(target, is_public=True) as directory:
        _write_tokenizer(checkpoint.tokenizer, directory)
        write_json(directory / "config.json", checkpoint.config)
        if checkpoint.generation:
            write_json(directory / "generation_config.json", checkpoint.generation)
        write_aligned(directory / WEIGHTS, planned, {"format": "smolora"})
        written = load_weights(directory, config, dtype=None, device=torch.device("cpu"))
        manifest = Manifest(FORMAT, target.name, name, digest_of(config, written), origin, revision, config)
        write_quantized(directory, config, written, checkpoint.quantized)
        write_json(directory / MANIFEST, asdict(manifest) | {"config": config.stored})


def write_quantized(
    directory: Path, config: ModelConfig, weights: BaseWeights, quantized: Mapping[str, Quantized]
) -> None:
    """Add the quantized form of tensors to a converted directory. The file is created by one rename.

    A tensor whose quantized form doesn't expand to exactly the converted weights is left out. `quantized` is keyed
    by Hugging Face's names of tensors. Raise OSError if the file can't be written.
    """
    if not quantized:
        return
    stored = dict(weights.tensors())
    kept: dict[str, Quantized] = {}
    for stack in layout(config):
        parts = [quantized[part.name] for part in stack.parts if part.name in quantized]
        if len(parts) < len(stack.parts) or len({part.type for part in parts}) > 1:
            continue
        stacked = Quantized(parts[0].type, torch.cat([part.blocks for part in parts]))
        if torch.equal(stacked.expanded(), stored[stack.name]):
            kept[stack.name] = stacked
    planned = [
        PlannedTensor(name, tuple(matrix.blocks.shape), torch.uint8, partial(_same, matrix.blocks))
        for name, matrix in kept.items()
    ]
    with new_file(directory / QUANTIZED, is_public=True) as file:
        write_aligned(file, planned, {name: matrix.type for name, matrix in kept.items()})


def _write_tokenizer(tokenizer: "PreTrainedTokenizerBase", directory: Path) -> None:
    """Save the tokenizer under a class name with which every version of transformers uses tokenizer.json as is."""
    tokenizer.save_pretrained(directory)
    options = read_json(directory / "tokenizer_config.json")
    for key in ("backend", "is_local", "local_files_only"):  # facts about this process, not the tokenizer
        options.pop(key, None)
    options["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(directory / "tokenizer_config.json", options)


def _plan(name: str, config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> list[PlannedTensor]:
    """Return the converted file's tensors in order. Raise StartupError, naming missing, misshapen and unknown
    tensors."""
    stacks = list(layout(config))
    parts = {part.name: part for stack in stacks for part in stack.parts}
    faults = [f"{key} is missing" for key in parts if key not in tensors]
    faults += [
        f"{key} has shape {list(tensors[key].shape)}, not {list(part.shape)}"
        for key, part in parts.items()
        if key in tensors and tensors[key].shape != part.shape
    ]
    faults += [f"{key} is unknown" for key in tensors if key not in parts and not _has_no_effect(key)]
    if faults:
        more = f" and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise StartupError(f"{name}: the weights don't fit config.json: {', '.join(faults[:MAX_FAULTS])}{more}")
    dtypes = {tensors[key].dtype for key in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # fp32 represents all others exactly
    return [
        PlannedTensor(
            stack.name, stack.shape, dtype, partial(_read, [tensors[p.name] for p in stack.parts], dtype)
        )
        for stack in stacks
    ]


def _has_no_effect(name: str) -> bool:
    """Return whether a tensor may be ignored: a tied output head, or the rotary constants of old files."""
    return name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq")


def _read(parts: list[StoredTensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([part.read().to(dtype) for part in parts])


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
