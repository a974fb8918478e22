"""Tests that `describe` gives exactly the ranks and scalings of the weights for any rank and alpha."""

import random
from pathlib import Path

import pytest
import torch

from adapters.lora import MODULES, LoraConfig, LoraModule, LoraWeights, ModuleKey, scaling
from adapters.peft.files import CONFIG_NAME, WEIGHTS_NAME, PeftAdapter, describe, read, write
from tests.adapters.samples import SHAPE


def weights_of(config: LoraConfig) -> LoraWeights:
    modules = {}
    for key in (ModuleKey(layer, name) for layer in range(SHAPE.num_layers) for name in MODULES):
        if config.targets(key):
            num_out, num_in = SHAPE.features[key.module]
            a, b = torch.ones(config.rank_of(key), num_in), torch.ones(num_out, config.rank_of(key))
            modules[key] = LoraModule(a, b, config.scaling_of(key))
    return LoraWeights(modules)


CONFIGS = [
    LoraConfig(4, 8.0),
    LoraConfig(3, 0.1, ("q_proj", "up_proj"), use_rslora=True),
    LoraConfig(4, 8.0, layers_to_transform=(1,)),
    LoraConfig(4, 0.7, rank_pattern={"q_proj": 7}, alpha_pattern={"q_proj": 0.3, "v_proj": 1 / 3}),
    LoraConfig(
        5,
        2.0,
        ("q_proj", ModuleKey(1, "up_proj").path),
        use_rslora=True,
        rank_pattern={ModuleKey(0, "q_proj").path: 2},
        alpha_pattern={ModuleKey(1, "q_proj").path: 0.9},
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_describe_restores_the_configuration(config: LoraConfig) -> None:
    found = describe(weights_of(config), config.rank, config.alpha, config.use_rslora, SHAPE.num_layers)
    paths = {key.path for key in weights_of(config).modules}
    assert (found.rank, found.alpha, found.use_rslora) == (config.rank, config.alpha, config.use_rslora)
    assert found.layers_to_transform == config.layers_to_transform
    assert set(found.target_modules) in (set(config.target_modules), paths)
    assert (found.rank_pattern, found.alpha_pattern) == (config.rank_pattern, config.alpha_pattern)


@pytest.mark.parametrize("num_layers", [SHAPE.num_layers, None])
@pytest.mark.parametrize(("rank", "alpha"), [(200, 400.0), (1, 0.3), (4, 8.0)])
@pytest.mark.parametrize("config", CONFIGS)
def test_described_weights_read_back_to_the_same_digest(
    config: LoraConfig, rank: int, alpha: float, num_layers: int | None, tmp_path: Path
) -> None:
    weights = weights_of(config)
    write(tmp_path, PeftAdapter(describe(weights, rank, alpha, config.use_rslora, num_layers), weights))
    again = read((tmp_path / CONFIG_NAME).read_bytes(), tmp_path / WEIGHTS_NAME, SHAPE)
    assert again.weights.digest == weights.digest
    assert (again.config.rank, again.config.alpha) == (rank, alpha)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_every_scaling_has_its_alpha(use_rslora: bool) -> None:
    draw = random.Random(0)
    for _ in range(3000):
        rank = draw.randint(1, 300)
        alpha = draw.choice([draw.randint(1, 999) / 10, draw.uniform(1e-6, 100), 2 ** draw.uniform(-40, 31)])
        exact = scaling(alpha, rank, use_rslora)
        module = LoraModule(torch.empty(rank, 1), torch.empty(1, rank), exact)
        found = describe(LoraWeights({ModuleKey(0, "q_proj"): module}), 2, 4.0, use_rslora, 1)
        assert found.scaling_of(ModuleKey(0, "q_proj")) == exact
