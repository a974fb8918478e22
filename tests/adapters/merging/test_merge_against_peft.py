"""Document errors of PEFT's `add_weighted_adapter`: our merge is exact, or follows the method's definition.

If PEFT fixes one of them, its test fails, and a caveat can be removed from the docs.
"""

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel

from adapters.lora import LoraWeights
from adapters.merge import config_of, merge
from adapters.merge_recipe import Recipe
from adapters.peft.files import PeftAdapter, read, write
from tests.adapters.merging.merge_oracle import (
    TARGETS,
    delta,
    dense_sum,
    factors,
    gap,
    lora,
    model_with,
    peft_merge,
    weights_of,
)
from tests.adapters.oracle import NUM_LAYERS, live, loaded, shape_of, tiny_llama

WRONG = 0.1
"""Of the largest value: far beyond any rounding."""


def two(left: LoraConfig | None = None, right: LoraConfig | None = None) -> PeftModel:
    return model_with({"left": left or lora(), "right": right or lora()})


def parts(tuned: PeftModel, left: float, right: float) -> list[tuple[LoraWeights, float]]:
    return [(weights_of(tuned, "left"), left), (weights_of(tuned, "right"), right)]


def exact(weighted: list[tuple[LoraWeights, float]]) -> LoraWeights:
    """Return the weighted sum as one adapter."""
    return merge(weighted, Recipe("svd", rank=sum(weights.max_rank for weights, _ in weighted)))


@pytest.mark.parametrize(("left", "right"), [(0.5, 0.5), (0.7, 0.3), (1.0, -1.0), (-0.5, -0.5)])
def test_linear_has_cross_terms(left: float, right: float) -> None:
    """(√w₁B₁ + √w₂B₂)(√w₁A₁ + √w₂A₂) is the sum plus the products of each B with the other A."""
    tuned = two()
    weighted = parts(tuned, left, right)
    linear = peft_merge(tuned, {"left": left, "right": right}, "linear")
    assert gap(delta(linear), dense_sum(weighted)) > WRONG
    assert gap(delta(exact(weighted)), dense_sum(weighted)) < 1e-5


def test_prunings_without_a_rank_have_cross_terms() -> None:
    """With density 1 they equal `linear`; ours with a rank equal the sum."""
    tuned = two()
    weighted = parts(tuned, 0.7, 0.3)
    for method in ("dare_linear", "magnitude_prune"):
        assert gap(delta(merge(weighted, Recipe(method))), dense_sum(weighted)) > WRONG
        assert gap(delta(merge(weighted, Recipe(method, rank=8))), dense_sum(weighted)) < 1e-5


def test_linear_refuses_mixed_ranks() -> None:
    tuned = two(lora(2), lora(6))
    with pytest.raises(ValueError, match="same r value"):
        peft_merge(tuned, {"left": 0.5, "right": 0.5}, "linear")
    weighted = parts(tuned, 0.5, 0.5)
    assert gap(delta(exact(weighted)), dense_sum(weighted)) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "svd", "ties"])
def test_rank_stabilized_results_are_scaled_twice(kind: str) -> None:
    """The result takes `use_rslora` from the first part, but its alpha is its rank, which is √r times too much."""
    stabilized, plain = (two(*(lora(use_rslora=use, alpha=4) for _ in range(2))) for use in (True, False))
    options = {"density": 1.0} if kind == "ties" else {}
    found = peft_merge(stabilized, {"left": 0.5, "right": 0.5}, kind, **options)
    assert {module.scaling for module in found.modules.values()} == {2.0}  # √4
    expected = peft_merge(plain, {"left": 0.5, "right": 0.5}, kind, **options)
    assert {module.scaling for module in expected.modules.values()} == {1.0}
    weighted = parts(stabilized, 0.5, 0.5)
    assert gap(delta(exact(weighted)), dense_sum(weighted)) < 1e-5


def test_a_single_rank_stabilized_adapter_is_not_itself() -> None:
    tuned = two(lora(use_rslora=True))
    itself = dense_sum(parts(tuned, 1.0, 0.0)[:1])
    found = delta(peft_merge(tuned, {"left": 1.0}, "linear"))
    assert gap(found, {key: 2 * value for key, value in itself.items()}) < 1e-5


def test_a_single_adapter_is_neither_pruned_nor_reduced() -> None:
    """PEFT silently does `linear` instead."""
    tuned = two()
    alone = parts(tuned, 1.0, 0.0)[:1]
    for kind, options in (
        ("svd", {"svd_rank": 2}),
        ("magnitude_prune", {"density": 0.5}),
        ("ties", {"density": 0.5}),
    ):
        assert gap(delta(peft_merge(tuned, {"left": 1.0}, kind, **options)), dense_sum(alone)) < 1e-5
    assert {module.rank for module in merge(alone, Recipe("svd", rank=2)).modules.values()} == {2}
    pruned = merge(alone, Recipe("magnitude_prune", 0.5))
    for module in pruned.modules.values():
        assert (module.a == 0).sum() == module.a.numel() // 2


def test_a_negative_weight_is_the_negated_adapter() -> None:
    """Subtracting an adapter must equal adding its negation. PEFT elects signs before it applies the weights."""
    tuned = two()
    (left, _), (right, _) = parts(tuned, 1.0, -1.0)
    negated = LoraWeights(
        {key: type(module)(-module.a, module.b, module.scaling) for key, module in right.modules.items()}
    )
    recipe = Recipe("ties", 0.6)
    found = merge([(left, 1.0), (right, -1.0)], recipe)
    expected = merge([(left, 1.0), (negated, 1.0)], recipe)
    assert gap(factors(found), factors(expected)) < 1e-6
    theirs = peft_merge(tuned, {"left": 1.0, "right": -1.0}, "ties", density=0.6)
    assert gap(factors(theirs), factors(expected)) > WRONG
    with torch.no_grad():
        for path, parameter in tuned.named_parameters():
            if "lora_A.right" in path:
                parameter.neg_()
    assert (
        gap(factors(peft_merge(tuned, {"left": 1.0, "right": 1.0}, "ties", density=0.6)), factors(expected)) < 1e-5
    )


def test_layers_of_other_parts_are_lost() -> None:
    """The result gets the first part's `layers_to_transform`."""
    tuned = two(lora(layers_to_transform=[0]), lora(layers_to_transform=[2]))
    found = peft_merge(tuned, {"left": 0.5, "right": 0.5}, "svd")
    assert {key.layer for key in found.modules} == {0}
    weighted = parts(tuned, 0.5, 0.5)
    merged = merge(weighted, Recipe("svd"))
    assert {key.layer for key in merged.modules} == {0, 2}
    assert gap(delta(merged), dense_sum(weighted)) < 1e-5


def test_an_empty_selection_gives_nan() -> None:
    tuned = two()
    found = peft_merge(tuned, {"left": 0.5, "right": 0.5}, "dare_linear", density=0.0)
    assert all(module.a.isnan().all() for module in found.modules.values())


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (lora(4), lora(4)),
        (lora(4, use_rslora=True), lora(4, 2, ["k_proj", "o_proj"])),
        (lora(4, rank_pattern={"q_proj": 2}, layers_to_transform=[0, 2]), lora(4, 1, ["v_proj"])),
    ],
)
def test_peft_loads_the_result(left: LoraConfig, right: LoraConfig, tmp_path: Path) -> None:
    """PEFT and our reader load the same weights and scalings."""
    weighted = parts(two(left, right), 0.6, -0.2)
    merged = merge(weighted, Recipe("magnitude_prune", 0.5))
    config = config_of(merged, NUM_LAYERS)
    write(tmp_path, PeftAdapter(config, merged))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = live(loaded(tmp_path))
    assert {key.path for key in merged.modules} == set(layers)
    for key, module in merged.modules.items():
        a, b, scaling = layers[key.path]
        assert torch.equal(module.a, a)
        assert torch.equal(module.b, b)
        assert scaling == 1.0
    again = read(
        (tmp_path / "adapter_config.json").read_bytes(),
        tmp_path / "adapter_model.safetensors",
        shape_of(tiny_llama()),
    )
    assert again.weights.digest == merged.digest
    assert again.config == config
    assert set(again.config.target_modules) <= {
        *TARGETS,
        "k_proj",
        "o_proj",
        *(key.path for key in merged.modules),
    }
