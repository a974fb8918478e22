"""Tests that PEFT's files are read exactly, and that PEFT loads our files with the same effect."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import load_file

from adapters.lora import MODULES, BaseShape, LoraConfig, LoraModule, LoraWeights, ModuleKey
from adapters.peft.files import CONFIG_NAME, WEIGHTS_NAME, PeftAdapter, read, write
from tests.adapters.oracle import (
    NUM_LAYERS,
    assert_same,
    live,
    loaded,
    logits,
    saved,
    shape_of,
    tiny_llama,
    tiny_smollm3,
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "two modules": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all linear": {"r": 1, "lora_alpha": 3, "target_modules": "all-linear"},
    "rank above the sizes": {"r": 64, "target_modules": ["k_proj", "down_proj"]},
    "rank-stabilized": {"r": 5, "lora_alpha": 7, "target_modules": list(MODULES), "use_rslora": True},
    "regular expression": {"r": 2, "target_modules": r".*\.(q|down)_proj"},
    "regular expression over layers": {
        "r": 2,
        "target_modules": r"model\.layers\.[02]\.(self_attn|mlp)\.[a-z]*_proj",
    },
    "one layer": {"r": 3, "target_modules": ATTENTION, "layers_to_transform": 1},
    "some layers": {
        "r": 3,
        "target_modules": ATTENTION,
        "layers_to_transform": [0, 2, 9],
        "layers_pattern": "layers",
    },
    "layers by expression": {
        "r": 3,
        "target_modules": ["gate_proj", "up_proj"],
        "layers_to_transform": [2],
        "layers_pattern": ["blocks", r"la[xy]ers"],
    },
    "excluded": {"r": 2, "target_modules": "all-linear", "exclude_modules": ["1.mlp.up_proj", "o_proj"]},
    "excluded by expression": {"r": 2, "target_modules": ATTENTION, "exclude_modules": r".*\.0\..*|.*\.k_proj"},
    "paths": {
        "r": 2,
        "target_modules": [
            "model.layers.0.mlp.up_proj",
            "layers.2.self_attn.q_proj",
            "1.self_attn.q_proj",
            "c_attn",
        ],
    },
    "two sets of layers": {"r": 2, "target_modules": r".*(0\.self_attn\.q_proj|1\.mlp\.up_proj|q_proj)"},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": list(MODULES),
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7, "unknown": 9},
        "alpha_pattern": {"v_proj": 5, "model.layers.0.mlp.down_proj": 0.5, "proj": 99},
    },
    "patterns that are expressions": {
        "r": 4,
        "target_modules": list(MODULES),
        "use_rslora": True,
        "rank_pattern": {r"[qk]_proj": 3, r"layers\.\d+\.mlp\..*": 6},
        "alpha_pattern": {r"(self_attn|mlp)\.(v|up)_proj": 20, r"^model\.layers\.2\..*": 1},
    },
    "patterns that overlap": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 5, "self_attn.*": 7, "z": 1},
    },
    "every module by a pattern": {"r": 9, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}},
    "a harmless start": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "another": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "lora_dropout": 0.1},
    "random": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"},
}


def peft_config(name: str) -> PeftLoraConfig:
    return PeftLoraConfig(**CONFIGS[name])


def read_directory(directory: Path, base: BaseShape) -> PeftAdapter:
    return read((directory / CONFIG_NAME).read_bytes(), directory / WEIGHTS_NAME, base)


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_what_peft_saved_and_writes_what_peft_loads(name: str, tmp_path: Path) -> None:
    base = shape_of(tiny_llama())
    tuned, theirs = saved(tmp_path / "theirs", peft_config(name))

    adapter = read_directory(theirs, base)
    assert_same(adapter.weights, live(tuned))
    assert adapter.config.rank == CONFIGS[name]["r"]
    assert all(adapter.config.targets(key) for key in adapter.weights.modules)

    ours = tmp_path / "ours"
    ours.mkdir()
    write(ours, adapter)
    again = loaded(ours)
    assert_same(adapter.weights, live(again))
    assert torch.equal(logits(again), logits(tuned))
    assert read_directory(ours, base).weights.digest == adapter.weights.digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_preserved(dtype: torch.dtype, tmp_path: Path) -> None:
    tuned, theirs = saved(tmp_path / "theirs", peft_config("rank-stabilized"), tiny_llama(dtype))
    adapter = read_directory(theirs, shape_of(tiny_llama()))
    assert_same(adapter.weights, live(tuned))
    ours = tmp_path / "ours"
    ours.mkdir()
    write(ours, adapter)
    assert_same(adapter.weights, live(loaded(ours, tiny_llama(dtype))))


def test_smollm3_has_the_same_modules(tmp_path: Path) -> None:
    model = tiny_smollm3()
    base = shape_of(model)
    tuned, theirs = saved(tmp_path, peft_config("all linear"), model)
    assert_same(read_directory(theirs, base).weights, live(tuned))


def test_bytes_and_files_read_equally(tmp_path: Path) -> None:
    base = shape_of(tiny_llama())
    _, theirs = saved(tmp_path, peft_config("all linear"))
    mapped = read_directory(theirs, base)
    copied = read((theirs / CONFIG_NAME).read_bytes(), (theirs / WEIGHTS_NAME).read_bytes(), base)
    assert mapped.weights.digest == copied.weights.digest
    assert mapped.config == copied.config


def test_the_first_matching_pattern_of_the_file_wins(tmp_path: Path) -> None:
    """PEFT sorts patterns when it saves, and takes the first match in that order when it loads."""
    config = PeftLoraConfig(
        r=4, target_modules=["q_proj"], alpha_pattern={"q_proj": 5, "layers.1.self_attn.q_proj": 3}
    )
    _, theirs = saved(tmp_path, config)
    adapter = read_directory(theirs, shape_of(tiny_llama()))
    assert_same(adapter.weights, live(loaded(theirs)))
    assert adapter.config.alpha_pattern == {
        "model.layers.0.self_attn.q_proj": 5.0,
        "model.layers.1.self_attn.q_proj": 3.0,
        "model.layers.2.self_attn.q_proj": 5.0,
    }


def test_configs_use_names_if_possible(tmp_path: Path) -> None:
    base = shape_of(tiny_llama())
    shapes = {name: read_directory(saved(tmp_path / name, peft_config(name))[1], base).config for name in CONFIGS}
    assert shapes["all linear"].target_modules == MODULES
    assert shapes["all linear"].layers_to_transform is None
    assert shapes["excluded by expression"].target_modules == ("q_proj", "v_proj", "o_proj")
    assert shapes["excluded by expression"].layers_to_transform == (1, 2)
    assert shapes["patterns that are expressions"].rank_pattern["gate_proj"] == 6
    assert shapes["every module by a pattern"].rank_pattern == {"q_proj": 2}
    assert len(shapes["excluded"].target_modules) == 6 * NUM_LAYERS - 1  # paths


def test_keys_without_effect_are_ignored(tmp_path: Path) -> None:
    _, theirs = saved(tmp_path, peft_config("two modules"))
    config = json.loads((theirs / CONFIG_NAME).read_bytes())
    config |= {"eva_config": {"rho": 1}, "runtime_config": {"x": 1}, "peft_version": "9", "revision": "main"}
    config |= {"from_the_future": None, "another": False, "more": [], "text": "", "object": {}}
    config |= {"base_model_name_or_path": "someone/else"}
    adapter = read(json.dumps(config).encode(), theirs / WEIGHTS_NAME, shape_of(tiny_llama()))
    assert adapter.base_model == "someone/else"


def test_a_trained_adapter_is_written(tmp_path: Path) -> None:
    """A handmade example of trained weights: mixed dtypes, odd sizes of A and B, a single module."""
    a, b = torch.randn(3, 36).to(torch.float16), torch.randn(30, 3)
    key = ModuleKey(1, "q_proj")
    config = LoraConfig(3, 4.5, ("q_proj",), use_rslora=True, layers_to_transform=(1,))
    weights = LoraWeights({key: LoraModule(a, b, config.scaling_of(key))})
    write(tmp_path, PeftAdapter(config, weights, "smollm2-135m-instruct"))

    tensors = load_file(tmp_path / WEIGHTS_NAME)
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    assert set(tensors) == {f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"}
    assert torch.equal(tensors[f"{prefix}.lora_A.weight"], a)
    assert torch.equal(tensors[f"{prefix}.lora_B.weight"], b)
    assert json.loads((tmp_path / CONFIG_NAME).read_bytes())["base_model_name_or_path"] == "smollm2-135m-instruct"
    (layer,) = live(loaded(tmp_path)).values()
    assert layer[2] == pytest.approx(4.5 / 3**0.5, abs=1e-12)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(2, 4.0, ("q_proj",)),
        LoraConfig(3, 5.0, ("q_proj",)),
        LoraConfig(3, 4.0, ("k_proj",)),
        LoraConfig(3, 4.0, ("q_proj",), layers_to_transform=(0,)),
        LoraConfig(3, 4.0, ("q_proj",), use_rslora=True),
    ],
)
def test_a_config_of_other_weights_is_not_written(config: LoraConfig, tmp_path: Path) -> None:
    weights = LoraWeights({ModuleKey(1, "q_proj"): LoraModule(torch.ones(3, 36), torch.ones(30, 3), 4 / 3)})
    with pytest.raises(ValueError, match=r"contradicts the weights of model\.layers\.1"):
        write(tmp_path, PeftAdapter(config, weights))
    assert not list(tmp_path.iterdir())


def test_a_pattern_names_a_module_by_name_or_path_only() -> None:
    with pytest.raises(ValueError, match="not by both"):
        LoraConfig(2, 4.0, rank_pattern={"q_proj": 1, "model.layers.0.self_attn.q_proj": 2})
