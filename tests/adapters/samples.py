"""Small handmade adapters, for tests that don't need PEFT."""

import torch

from adapters.lora import BaseShape, LoraConfig, LoraModule, LoraWeights, ModuleKey
from adapters.peft.files import PeftAdapter

SHAPE = BaseShape(
    3,
    {
        "q_proj": (30, 36),
        "k_proj": (10, 36),
        "v_proj": (10, 36),
        "o_proj": (36, 30),
        "gate_proj": (50, 36),
        "up_proj": (50, 36),
        "down_proj": (36, 50),
    },
)
"""The sizes of `oracle.tiny_llama`."""


def sample_adapter(
    seed: int = 0, rank: int = 4, names: tuple[str, ...] = ("q_proj", "up_proj"), base_model: str | None = "tiny"
) -> PeftAdapter:
    """Return an adapter with random fp32 weights for `names` in all layers. Equal arguments give equal bytes."""
    generator = torch.Generator().manual_seed(seed)
    config = LoraConfig(rank, 2.0 * rank, names)
    modules: dict[ModuleKey, LoraModule] = {}
    for layer in range(SHAPE.num_layers):
        for name in names:
            num_out, num_in = SHAPE.features[name]
            a, b = torch.randn(rank, num_in, generator=generator), torch.randn(num_out, rank, generator=generator)
            modules[ModuleKey(layer, name)] = LoraModule(a, b, 2.0)
    return PeftAdapter(config, LoraWeights(modules), base_model)
