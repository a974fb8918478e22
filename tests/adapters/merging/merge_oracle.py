"""PEFT's `add_weighted_adapter` as the reference of merges: several adapters on one tiny Llama."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from adapters.lora import MODULES, LoraModule, LoraWeights, ModuleKey
from adapters.merge import Side, kept
from adapters.merge_recipe import Recipe
from tests.adapters.oracle import lora_layers, matrices, tiny_llama

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def lora(rank: int = 4, alpha: int = 8, targets: Sequence[str] = TARGETS, **options: Any) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **options)


def model_with(configs: Mapping[str, LoraConfig]) -> PeftModel:
    """Return a tiny Llama with an adapter of random A and B for each config."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _quietly():
        torch.manual_seed(3)
        names = list(configs)
        tuned = get_peft_model(tiny_llama(), configs[names[0]], adapter_name=names[0])
        for name in names[1:]:
            tuned.add_adapter(name, configs[name])
        for path, parameter in tuned.named_parameters():
            if "lora_" in path:
                torch.nn.init.normal_(parameter, std=0.2)
    return tuned.eval()


def weights_of(tuned: PeftModel, name: str) -> LoraWeights:
    """Return the weights of one of the model's live adapters."""
    modules: dict[ModuleKey, LoraModule] = {}
    for path, layer in _layers(tuned, name):
        key = ModuleKey(int(path.split(".")[2]), path.rpartition(".")[2])
        assert key.path == path
        a, b = matrices(layer, name)
        modules[key] = LoraModule(a.detach().clone(), b.detach().clone(), layer.scaling[name])
    return LoraWeights(modules)


def peft_merge(tuned: PeftModel, parts: Mapping[str, float], kind: str, **options: object) -> LoraWeights:
    """Return PEFT's merge of the weighted adapters; `kind` is its `combination_type`."""
    with _quietly():
        tuned.add_weighted_adapter(list(parts), list(parts.values()), "merged", combination_type=kind, **options)
    found = weights_of(tuned, "merged")
    tuned.delete_adapter("merged")
    return found


@contextmanager
def our_draws(tuned: PeftModel, parts: Mapping[str, float], recipe: Recipe) -> Iterator[None]:
    """Make PEFT's DARE draw the same masks as ours, in PEFT's order: by module, then A and B, then adapter."""
    digests = {name: weights_of(tuned, name).digest for name in parts}
    sides: tuple[Side, ...] = ("BA",) if recipe.merges_products else ("A", "B")
    asked = iter(
        [
            (digests[name], ModuleKey(int(path.split(".")[2]), path.rpartition(".")[2]), side)
            for path, layer in _layers(tuned)
            for side in sides
            for name in parts
            if name in layer.lora_A
        ]
    )

    def prune(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        assert rescale
        return tensor * kept(recipe, *next(asked), tensor.shape) / density

    with mock.patch("peft.utils.merge_utils.random_pruning", prune):
        yield
    assert next(asked, None) is None


def delta(weights: LoraWeights) -> dict[ModuleKey, torch.Tensor]:
    """Return scaling · B A of each module, in fp64."""
    return {key: m.scaling * m.b.double() @ m.a.double() for key, m in weights.modules.items()}


def dense_sum(parts: Sequence[tuple[LoraWeights, float]]) -> dict[ModuleKey, torch.Tensor]:
    """Return Σ weight · scaling · B A of each module, in fp64: the exact sum of an expression."""
    total: dict[ModuleKey, torch.Tensor] = {}
    for weights, weight in parts:
        for key, product in delta(weights).items():
            total[key] = total.get(key, torch.zeros_like(product)) + weight * product
    return total


def gap(found: Mapping[ModuleKey, torch.Tensor], expected: Mapping[ModuleKey, torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest value."""
    assert set(found) == set(expected)
    largest = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[key].double() - expected[key].double()).abs().max()) for key in found) / largest


def factors(weights: LoraWeights) -> dict[ModuleKey, torch.Tensor]:
    """Return A and B of each module in turn. All scalings must be 1."""
    assert all(module.scaling == 1 for module in weights.modules.values())
    return {key: torch.cat((m.a.flatten(), m.b.flatten())) for key, m in weights.modules.items()}


def _layers(tuned: PeftModel, name: str | None = None) -> list[tuple[str, LoraLayer]]:
    return [
        (path, layer)
        for path, layer in lora_layers(tuned)
        if path.rpartition(".")[2] in MODULES
        if name is None or name in layer.lora_A
    ]


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of PEFT about deprecations and several adapters
        yield
