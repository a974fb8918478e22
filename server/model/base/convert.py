"""Which Hugging Face tensors are stacked into which tensor of a converted base.

A safetensors file whose tensors all start on 64-byte borders, written in one pass.

Any safetensors reader can map it; aligned tensors can then be used where they lie, by vector instructions too.
The format allows no gaps between tensors, so one that does not end on a border is followed by a named filler.

Turns a checkpoint into the directory that a base is loaded from.

It holds config.json, generation_config.json and the tokenizer as they were, the weights with q·k·v and gate·up
stacked, and a manifest. It appears by one rename and never changes after that.
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
    """A tensor under its Hugging Face name."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stack:
    """A tensor of the converted file: its parts one after the other along the first dimension."""

    name: str
    parts: tuple[Part, ...]

    @property
    def rows(self) -> list[int]:
        return [part.shape[0] for part in self.parts]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(self.rows), *self.parts[0].shape[1:])


def layout(config: ModelConfig) -> Iterator[Stack]:
    """Every tensor of a base, in the order of the converted file. A tied head has no entry."""
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


ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
FILLER = "_filler."
"""The start of the names of tensors that are not part of the model."""

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: `make` builds it when its turn comes, so that only one is in memory at a time."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_aligned(path: Path, tensors: Iterable[PlannedTensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors in the order given and wait until they are on the disk. Raises OSError."""
    tensors = _with_fillers(tensors)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.num_bytes]
        header[tensor.name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": span}
        offset = span[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)  # the header's length is the file's first 8 bytes
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

MAX_FAULTS = 5  # named in an error


def convert(checkpoint: Checkpoint, target: Path, name: str, origin: str, revision: str | None = None) -> None:
    """Write the checkpoint as the converted directory `target`, unless another process is quicker.

    Raises StartupError where the checkpoint is not supported or lacks tensors, OSError where it can't be written.
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
    """Keep in a converted directory what its tensors were stored as, of those that are expanded to the very same
    bits. Appears by one rename. `quantized` has Hugging Face's names. Raises OSError."""
    if not quantized:
        return
    stored = dict(weights.tensors())
    kept: dict[str, Quantized] = {}
    for stack in layout(config):
        parts = [quantized[part.name] for part in stack.parts if part.name in quantized]
        if len(parts) < len(stack.parts) or len({part.type for part in parts}) > 1:
            continue
        one = Quantized(parts[0].type, torch.cat([part.blocks for part in parts]))
        if torch.equal(one.expanded(), stored[stack.name]):
            kept[stack.name] = one
    planned = [
        PlannedTensor(name, tuple(one.blocks.shape), torch.uint8, partial(_same, one.blocks))
        for name, one in kept.items()
    ]
    with new_file(directory / QUANTIZED, is_public=True) as file:
        write_aligned(file, planned, {name: one.type for name, one in kept.items()})


def _write_tokenizer(tokenizer: "PreTrainedTokenizerBase", directory: Path) -> None:
    """Save it under the class that every version of transformers reads from tokenizer.json as it stands."""
    tokenizer.save_pretrained(directory)
    options = read_json(directory / "tokenizer_config.json")
    for key in ("backend", "is_local", "local_files_only"):  # of this process, not of the tokenizer
        options.pop(key, None)
    options["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(directory / "tokenizer_config.json", options)


def _plan(name: str, config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> list[PlannedTensor]:
    """The converted file's tensors in order. Raises StartupError naming what is missing, misshapen or unknown."""
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
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # mixed: the one that holds all of them exactly
    return [
        PlannedTensor(
            stack.name, stack.shape, dtype, partial(_read, [tensors[p.name] for p in stack.parts], dtype)
        )
        for stack in stacks
    ]


def _has_no_effect(name: str) -> bool:
    """A head stored beside the embedding it is tied to, and the rotary constants that old files carry."""
    return name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq")


def _read(parts: list[StoredTensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([part.read().to(dtype) for part in parts])


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
