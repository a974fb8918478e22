"""Writes a base as a Hugging Face directory, for transformers, PEFT and downloads."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from adapters.storage.durable import new_directory, write_json
from server.model.base.checkpoint import read_json
from server.model.base.config import ModelConfig
from server.model.base.convert import layout
from server.model.base.quantized import QUANTIZED
from server.model.base.weights import MANIFEST, WEIGHTS, BaseModel, BaseWeights


def export_hugging_face(base: BaseModel, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Write `base` as the new directory `directory`, with weights in `dtype` (None: the base's own).

    To export other weights of the same sizes, such as fine-tuned ones, pass `dataclasses.replace(base,
    weights=...)`. Raise OSError if the directory can't be written.
    """
    dtype = dtype or base.dtype
    with new_directory(directory) as unfinished:
        state = {name: _owned(tensor, dtype) for name, tensor in split(base.config, base.weights)}
        save_file(state, unfinished / "model.safetensors", metadata={"format": "pt"})
        for file in base.directory.iterdir():
            if file.is_file() and file.name not in (WEIGHTS, QUANTIZED, MANIFEST):
                shutil.copyfile(file, unfinished / file.name)
        config = read_json(unfinished / "config.json")
        config.pop("torch_dtype", None)  # the older name of dtype
        config["dtype"] = str(dtype).removeprefix("torch.")
        write_json(unfinished / "config.json", config)


def split(config: ModelConfig, weights: BaseWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights, except a tied output head, with Hugging Face's names, as views of the stacked tensors."""
    tensors = dict(weights.tensors())
    for stack in layout(config):
        rows = torch.split(tensors[stack.name], stack.rows)
        yield from zip((part.name for part in stack.parts), rows, strict=True)


def _owned(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Copy a tensor, since safetensors refuses tensors that share memory."""
    return tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
