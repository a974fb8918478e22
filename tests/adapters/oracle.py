"""PEFT as the reference: tiny bases of odd sizes, adapters on them, and the weights in PEFT's live layers."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig as HfLlamaConfig
from transformers import LlamaForCausalLM, PreTrainedModel, SmolLM3ForCausalLM
from transformers import SmolLM3Config as HfSmolLM3Config

from adapters.lora import MODULES, BaseShape, LoraWeights
from tests.kits.oracles.hugging_face import linear

NUM_LAYERS = 3
SIZES: dict[str, Any] = {
    "vocab_size": 71,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}

Live = dict[str, tuple[torch.Tensor, torch.Tensor, float]]
"""A module's path → its A, its B and its scaling."""


def tiny_llama(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(HfLlamaConfig(**SIZES))
    torch.nn.Module.to(model, dtype)  # the annotations in transformers are wrong
    model.eval()
    return model


def tiny_smollm3() -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmolLM3ForCausalLM(HfSmolLM3Config(**SIZES, no_rope_layer_interval=2))
    model.eval()
    return model


def shape_of(model: PreTrainedModel) -> BaseShape:
    linear = {name.rpartition(".")[2]: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    features = {name: (linear[name].out_features, linear[name].in_features) for name in MODULES}
    return BaseShape(model.config.num_hidden_layers, features)


def adapted(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Return `model` with a new adapter of random A and B, in the base's dtype."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of PEFT about deprecations and patterns without a match
        torch.manual_seed(1)
        tuned = get_peft_model(model, config, autocast_adapter_dtype=False)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return tuned.eval()


def saved(directory: Path, config: LoraConfig, model: PreTrainedModel | None = None) -> tuple[PeftModel, Path]:
    """An adapter and the directory in which PEFT saved it."""
    tuned = adapted(model or tiny_llama(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.save_pretrained(str(directory))
    return tuned, directory


def loaded(directory: Path, model: PreTrainedModel | None = None) -> PeftModel:
    """Return the model that PEFT loads from `directory` on a fresh base. Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", category=FutureWarning
        )  # PEFT calls deprecated functions of transformers
        return PeftModel.from_pretrained(model or tiny_llama(), directory, autocast_adapter_dtype=False).eval()


def lora_layers(tuned: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """PEFT's layers and their paths in the base."""
    for path, module in tuned.get_submodule("base_model.model").named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def matrices(layer: LoraLayer, name: str = "default") -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of one of the layer's adapters."""
    return linear(layer.lora_A, name).weight, linear(layer.lora_B, name).weight


def live(tuned: PeftModel) -> Live:
    layers: Live = {}
    for path, layer in lora_layers(tuned):
        if "default" in layer.scaling:
            a, b = matrices(layer)
            layers[path] = (a.detach(), b.detach(), layer.scaling["default"])
    return layers


def assert_same(weights: LoraWeights, layers: Live) -> None:
    """Assert that modules, bits and scalings are equal."""
    assert {key.path for key in weights.modules} == set(layers)
    for key, module in weights.modules.items():
        a, b, scaling = layers[key.path]
        assert module.a.dtype == a.dtype
        assert module.b.dtype == b.dtype
        assert torch.equal(module.a, a)
        assert torch.equal(module.b, b)
        assert module.scaling == scaling


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.arange(1, 20).unsqueeze(0)).logits
    return out
