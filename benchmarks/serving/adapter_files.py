"""Random adapters in PEFT's format: by default r=16 and alpha=32 on all seven linear modules.

A is initialized as in PEFT, and B is small: an adapter changes an answer within some tokens, and the answer stays
text. The files are written with safetensors alone, independently of the code under test.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 16
ALPHA = 32
B_SIGMA = 0.06


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Llama-shaped base that an adapter needs: each module's (out, in), by its path in a layer."""

    num_layers: int
    modules: dict[str, tuple[int, int]]
    max_positions: int

    @property
    def num_parameters(self) -> int:
        """Parameters of one adapter."""
        return self.num_layers * RANK * sum(inputs + outputs for outputs, inputs in self.modules.values())

    @classmethod
    def read(cls, base: Path) -> "Sizes":
        """Read config.json of a Hugging Face directory."""
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        heads = int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or hidden // heads)
        queries, keys = heads * head_dim, int(config.get("num_key_value_heads") or heads) * head_dim
        modules = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        return cls(int(config["num_hidden_layers"]), modules, int(config["max_position_embeddings"]))


def write_adapter(
    directory: Path, sizes: Sizes, seed: int, dtype: torch.dtype = torch.float32, rank: int = RANK
) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors` into a new directory; return it.

    Alpha grows with the square root of the rank, so that adapters of all ranks have about the same effect.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(sizes.num_layers):
        for path, (outputs, inputs) in sizes.modules.items():
            name = f"base_model.model.model.layers.{layer}.{path}"
            bound = 1 / math.sqrt(inputs)
            a = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
            b = torch.empty(outputs, rank).normal_(0, B_SIGMA, generator=generator)
            tensors[f"{name}.lora_A.weight"] = a.to(dtype)
            tensors[f"{name}.lora_B.weight"] = b.to(dtype)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": round(ALPHA * math.sqrt(rank / RANK)),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(path.rpartition(".")[2] for path in sizes.modules),
    }
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory
