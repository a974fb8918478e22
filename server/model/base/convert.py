"""Turns a checkpoint into the directory that a base is loaded from.

It holds config.json, generation_config.json and the tokenizer as they were, the weights with q·k·v and gate·up
stacked, and a manifest. It appears by one rename and never changes after that.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from adapters.durable import new_directory, new_file, write_json
from server.errors import StartupError
from server.model.base.aligned import PlannedTensor, write_aligned
from server.model.base.checkpoint import Checkpoint, StoredTensor, read_json
from server.model.base.config import ModelConfig
from server.model.base.layout import layout
from server.model.base.quantized import QUANTIZED, Quantized
from server.model.base.weights import FORMAT, MANIFEST, WEIGHTS, BaseWeights, Manifest, digest_of, load_weights

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
