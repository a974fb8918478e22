"""A base model before conversion: configuration, tokenizer and tensors with their Hugging Face names.

`open_directory` reads a Hugging Face directory (safetensors, in one file or sharded). The tokenizer is exactly
that of tokenizer.json. No code that comes with a model is executed.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from server.errors import StartupError
from server.model.base.quantized import Quantized
from server.model.text.tokenizer import require_byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes of weights that are supported, by their safetensors names."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, which is read when needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A whole base model, whose tensors are read one at a time."""

    config: Mapping[str, object]  # config.json
    generation: Mapping[str, object]  # generation_config.json, or empty
    tokenizer: "PreTrainedTokenizerBase"
    tensors: Mapping[str, StoredTensor]
    quantized: Mapping[str, Quantized] = field(default_factory=dict)  # the stored form of some of the tensors


def open_directory(directory: Path) -> Checkpoint:
    """Open a Hugging Face directory. Raise StartupError, with a message of one line, if it is incomplete."""
    if not (directory / "config.json").is_file():
        raise StartupError(f"{directory.name} is not a Hugging Face model directory: it has no config.json")
    generation = directory / "generation_config.json"
    return Checkpoint(
        config=read_json(directory / "config.json"),
        generation=read_json(generation) if generation.is_file() else {},
        tokenizer=read_tokenizer(directory),
        tensors={name: tensor for file in _weight_files(directory) for name, tensor in _tensors_of(file).items()},
    )


def read_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Return the directory's tokenizer with its special tokens and chat template.

    Raise StartupError if the directory has no readable tokenizer, or if the tokenizer isn't byte-level.
    """
    if not (directory / "tokenizer.json").is_file():
        raise StartupError(f"{directory.name} has no tokenizer.json")
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast  # only for a conversion

    # AutoTokenizer may replace the file's pre-tokenizer by that of a known class.
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise errors of many types
        raise StartupError(f"{directory.name}: the tokenizer can't be read: {error!r}"[:300]) from error
    require_byte_level(directory.name, tokenizer.backend_tokenizer)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def read_json(path: Path) -> dict[str, object]:
    """Return a file's JSON object. Raise StartupError if the file can't be read or has no JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise StartupError(f"{path} can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise StartupError(f"{path.name} is not valid JSON") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path.name} is not a JSON object")
    return value


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        shards = sorted({str(shard) for shard in weight_map.values()}) if isinstance(weight_map, dict) else []
        outside = [shard for shard in shards if Path(shard).name != shard]
        missing = [shard for shard in shards if not (directory / shard).is_file()]
        if outside or missing or not shards:
            raise StartupError(
                f"{directory.name}: {index.name} names missing files: {', '.join(outside + missing)}"
            )
        return [directory / shard for shard in shards]
    single = directory / "model.safetensors"
    if not single.is_file():
        raise StartupError(f"{directory.name} has no model.safetensors (other weight formats are not read)")
    return [single]


def _tensors_of(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            slices = {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in found.items()}
    except (SafetensorError, OSError) as error:
        raise StartupError(f"{file.name} can't be read as safetensors: {error}") from error
    for name, (_, dtype) in slices.items():
        if dtype not in DTYPES:
            raise StartupError(f"{file.name}: {name} is stored as {dtype}, and only {', '.join(DTYPES)} are read")
    return {
        name: StoredTensor(shape, DTYPES[dtype], _reader(file, name)) for name, (shape, dtype) in slices.items()
    }


def _reader(file: Path, name: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        with safe_open(file, framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor

    return read
