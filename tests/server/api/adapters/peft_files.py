"""Small adapters in PEFT's format."""

import io
import json
import zipfile
from collections.abc import Mapping

import torch
from safetensors.torch import save

from adapters.lora import BaseShape
from tests.server.conftest import SHAPE

PATHS = {"q_proj": "self_attn", "v_proj": "self_attn", "up_proj": "mlp"}
ALL_PATHS = (
    PATHS | dict.fromkeys(("k_proj", "o_proj"), "self_attn") | dict.fromkeys(("gate_proj", "down_proj"), "mlp")
)


def peft_files(
    seed: int = 0,
    rank: int = 2,
    base_model: str | None = "someone/tiny-llama",
    shape: BaseShape = SHAPE,
    paths: Mapping[str, str] = PATHS,
) -> tuple[bytes, bytes]:
    """Return adapter_config.json and adapter_model.safetensors; each seed gives another digest."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(paths),
        "bias": "none",
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(shape.num_layers):
        for module, parent in paths.items():
            out, width = shape.features[module]
            prefix = f"base_model.model.model.layers.{layer}.{parent}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    return json.dumps(config).encode(), save(tensors)


def as_parts(config: bytes, weights: bytes) -> dict[str, tuple[str, bytes]]:
    """Return the two files as multipart fields."""
    return {
        "adapter_config": ("adapter_config.json", config),
        "adapter_model": ("adapter_model.safetensors", weights),
    }


def as_zip(config: bytes, weights: bytes) -> bytes:
    """Return the two files as an archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter_config.json", config)
        archive.writestr("adapter_model.safetensors", weights)
    return buffer.getvalue()
