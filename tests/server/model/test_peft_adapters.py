"""Adapters saved by PEFT, compared with PEFT's own forward pass on the same base: ranks, scalings, patterns and
subsets."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from adapters.lora import LoraWeights
from adapters.peft import files as peft_format
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.model.rank_rows import RankRows, RowFormat
from server.model.smollm import SmolLM
from tests.adapters.oracle import adapted
from tests.kits.engines import place
from tests.kits.oracles.hugging_face import load_reference, logits
from tests.kits.paged import paged_logits
from tests.kits.tiny import save_tiny_base

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES: dict[str, dict[str, Any]] = {
    **{f"rank_{rank}": {"r": rank, "lora_alpha": 2 * rank, "target_modules": ALL} for rank in (1, 4, 8, 16, 64)},
    "all_linear": {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"},
    "rslora": {"r": 16, "lora_alpha": 12, "target_modules": ALL, "use_rslora": True},
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "k_alone": {"r": 5, "lora_alpha": 16, "target_modules": ["k_proj"]},
    "mlp": {"r": 8, "lora_alpha": 3, "target_modules": ["gate_proj", "down_proj"]},
    "up_alone": {"r": 8, "lora_alpha": 8, "target_modules": ["up_proj"]},
    "one_layer": {"r": 8, "lora_alpha": 16, "target_modules": ALL, "layers_to_transform": [1]},
    "two_layers": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["o_proj", "up_proj"],
        "layers_to_transform": [0, 2],
    },
    "by_module": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 2, "down_proj": 17},
        "alpha_pattern": {"q_proj": 1, "up_proj": 40},
    },
    "by_layer": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {"layers.0.self_attn.v_proj": 9, "layers.2.mlp.gate_proj": 1},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 3, "layers.2.mlp.gate_proj": 5},
    },
    "by_layer_rslora": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "use_rslora": True,
        "rank_pattern": {r"model\.layers\.[01]\.self_attn\.k_proj": 16, "o_proj": 2},
        "alpha_pattern": {"o_proj": 30},
    },
}


def peft_adapter(
    hugging_face: Path, directory: Path, options: dict[str, Any], base: BaseModel
) -> tuple[PeftModel, LoraWeights]:
    """Return PEFT's live model of a random adapter, and the adapter read from its saved files."""
    tuned = adapted(load_reference(hugging_face), LoraConfig(task_type="CAUSAL_LM", **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.save_pretrained(str(directory))
    read = peft_format.read(
        (directory / "adapter_config.json").read_bytes(),
        directory / "adapter_model.safetensors",
        base.config.shape,
    )
    return tuned, read.weights


def rows_of(base: BaseModel, max_rank: int) -> RankRows:
    return RankRows(
        base.config.shape,
        max_rank=max_rank,
        row_format=RowFormat.of_torch(base.dtype, base.device),
        device=base.device,
    )


def assert_agrees(
    base: BaseModel, weights: LoraWeights, tuned: PeftModel, ids: list[int], tolerance: float, plain: torch.Tensor
) -> None:
    """Check two sequences with the adapter and one without: prefills and decodes, each with its own reference."""
    rows = rows_of(base, weights.max_rank + 4)
    (placement,) = place(rows, [weights])
    model = SmolLM(base.config, base.weights, max_positions=len(ids))
    parts = [((placement, 1.0),), (), ((placement, 1.0),)]
    found = paged_logits(
        model, [ids, ids, ids[::-1]], seed=1, rows=rows, parts=parts, num_prompt_tokens=len(ids) // 2
    )
    theirs = [logits(tuned, ids), plain, logits(tuned, ids[::-1])]
    for ours, exact in zip(found, theirs, strict=True):
        assert (ours - exact).abs().max() <= tolerance


@pytest.mark.parametrize("name", CASES)
def test_tiny_llama(name: str, tiny_base: BaseModel, tiny_base_dir: Path, tmp_path: Path) -> None:
    ids = [(7 * i) % 500 for i in range(40)]
    plain = logits(load_reference(tiny_base_dir), ids)
    tuned, weights = peft_adapter(tiny_base_dir, tmp_path, CASES[name], tiny_base)
    assert (logits(tuned, ids) - plain).abs().max() > 0.05, "the adapter must show"
    assert_agrees(tiny_base, weights, tuned, ids, 5e-4, plain)


@pytest.mark.parametrize("name", ["rslora", "by_layer"])
def test_tiny_smollm3(name: str, tmp_path: Path) -> None:
    options: dict[str, object] = {"no_rope_layers": [1, 0, 1], "hidden_size": 36, "num_attention_heads": 3}
    directory = save_tiny_base(
        tmp_path / "base", "smollm3", {**options, "num_key_value_heads": 1, "head_dim": 10}, seed=2
    )
    base = load_base(resolve_base(str(directory), tmp_path / "home"))
    ids = [(7 * i) % 500 for i in range(30)]
    tuned, weights = peft_adapter(directory, tmp_path / "adapter", CASES[name], base)
    assert_agrees(base, weights, tuned, ids, 5e-4, logits(load_reference(directory), ids))


@pytest.mark.real
@pytest.mark.parametrize("name", ["rank_16", "by_layer_rslora"])
def test_the_real_base(name: str, real_base: BaseModel, hf_base_dir: Path, tmp_path: Path) -> None:
    ids = real_base.tokenizer.encode("The quick brown fox jumps over the lazy dog, then naps under")
    plain = logits(load_reference(hf_base_dir), ids)
    tuned, weights = peft_adapter(hf_base_dir, tmp_path, CASES[name], real_base)
    with torch.no_grad():  # 0.2 in every B would turn the model to noise
        for parameter_name, parameter in tuned.named_parameters():
            if "lora_B" in parameter_name:
                parameter.mul_(0.02)
    scaled = {
        key: type(module)(module.a, module.b * torch.tensor(0.02, dtype=module.b.dtype), module.scaling)
        for key, module in weights.modules.items()
    }
    assert (logits(tuned, ids) - plain).abs().max() > 0.05
    assert_agrees(real_base, LoraWeights(scaled), tuned, ids, 1e-3, plain)
