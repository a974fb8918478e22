"""Compare merges with PEFT's, except for PEFT's errors, which are in test_merge_against_peft.py."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.overrides import TorchFunctionMode

from adapters.errors import InvalidInput
from adapters.lora import LoraModule, LoraWeights, ModuleKey
from adapters.merge import check, distance, merge, stacked
from adapters.merge_recipe import MergeMethod, Recipe
from tests.adapters.merging.merge_oracle import (
    delta,
    dense_sum,
    factors,
    gap,
    lora,
    model_with,
    our_draws,
    peft_merge,
    weights_of,
)

PARTS = {"one": 0.7, "two": 0.4, "three": 1.3}
PRUNING: tuple[MergeMethod, ...] = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


@pytest.fixture(scope="module")
def tuned() -> PeftModel:
    """Adapters of equal ranks, whose scalings, targets and layers differ."""
    return model_with(
        {
            "one": lora(4, 8),
            "two": lora(4, 2, ["q_proj", "up_proj", "o_proj"]),
            "three": lora(4, 4, alpha_pattern={"q_proj": 16}),
        }
    )


@pytest.fixture(scope="module")
def mixed() -> PeftModel:
    """Adapters whose ranks differ, too, even between modules of one adapter."""
    configs = {
        "one": lora(3),
        "two": lora(7, 3, ["v_proj", "k_proj"]),
        "three": lora(5, rank_pattern={"q_proj": 2}),
    }
    return model_with(configs)


def ours(tuned: PeftModel, recipe: Recipe, parts: Mapping[str, float] = PARTS) -> LoraWeights:
    return merge([(weights_of(tuned, name), weight) for name, weight in parts.items()], recipe)


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
@pytest.mark.parametrize("method", PRUNING)
def test_merged_factors_equal_pefts(tuned: PeftModel, method: MergeMethod, density: float) -> None:
    recipe = Recipe(method, density, seed=5)
    if method.startswith("dare") and density < 1:
        with our_draws(tuned, PARTS, recipe):
            expected = peft_merge(tuned, PARTS, method, density=density)
    else:
        expected = peft_merge(tuned, PARTS, method, density=density)
    found = ours(tuned, recipe)
    assert gap(factors(found), factors(expected)) < 1e-5
    assert {module.a.dtype for module in found.modules.values()} == {torch.float32}


@pytest.mark.parametrize("rank", [2, 9])
@pytest.mark.parametrize("method", PRUNING)
def test_merged_products_equal_pefts(mixed: PeftModel, method: MergeMethod, rank: int) -> None:
    recipe = Recipe(method, 0.4, seed=6, rank=rank)
    with our_draws(mixed, PARTS, recipe) if method.startswith("dare") else torch.no_grad():
        expected = peft_merge(mixed, PARTS, f"{method}_svd", density=0.4, svd_rank=rank)
    found = ours(mixed, recipe)
    assert gap(delta(found), delta(expected)) < 1e-5
    assert {module.rank for module in found.modules.values()} == {rank}


@pytest.mark.parametrize("rank", [None, 1, 4, 10])
def test_svd_equals_pefts(mixed: PeftModel, rank: int | None) -> None:
    """The signs of singular vectors are free: each row of A may be negated together with its column of B."""
    expected, found = peft_merge(mixed, PARTS, "svd", svd_rank=rank), ours(mixed, Recipe("svd", rank=rank))
    assert gap(delta(found), delta(expected)) < 1e-5
    for key, module in found.modules.items():
        assert module.rank == (rank or 7)
        needed = module.b.norm(dim=0) > 1e-4  # below that, PEFT's rows of A are noise, and ours are 0
        theirs = expected.modules[key]
        signs = (module.a * theirs.a).sum(1).sign()[needed]
        assert (module.a[needed] - signs[:, None] * theirs.a[needed]).abs().max() < 1e-4
        assert (module.b[:, needed] - signs * theirs.b[:, needed]).abs().max() < 1e-4


def test_svd_with_enough_rank_is_the_exact_sum(mixed: PeftModel) -> None:
    parts = [(weights_of(mixed, name), weight) for name, weight in PARTS.items()]
    found = merge(parts, Recipe("svd", rank=3 + 7 + 5))
    assert gap(delta(found), dense_sum(parts)) < 1e-5
    assert distance(parts, found) < 1e-5


def test_stacked_adapters_are_the_exact_sum(mixed: PeftModel) -> None:
    adapters = [
        (weights_of(mixed, name), weight) for name, weight in {"one": 0.7, "two": -0.4, "three": 1.3}.items()
    ]
    found = stacked(adapters)
    assert gap(delta(found), dense_sum(adapters)) < 1e-6
    assert found.max_rank == 3 + 7 + 5
    assert stacked(()).modules == {}


def test_a_rank_above_the_modules_is_padded_with_zeros(mixed: PeftModel) -> None:
    parts = [(weights_of(mixed, "two"), 1.0)]
    found = merge(parts, Recipe("svd", rank=40))
    assert {module.rank for module in found.modules.values()} == {40}  # k_proj has 10 outputs
    assert gap(delta(found), dense_sum(parts)) < 1e-5


def test_distance_equals_the_dense_computation(mixed: PeftModel) -> None:
    parts = [(weights_of(mixed, name), weight) for name, weight in PARTS.items()]
    found = merge(parts, Recipe("svd", rank=2))
    exact, merged = dense_sum(parts), delta(found)
    off = sum(float((merged[key] - exact[key]).square().sum()) for key in exact)
    expected = (off / sum(float(value.square().sum()) for value in exact.values())) ** 0.5
    assert 0.1 < expected < 1
    assert distance(parts, found) == pytest.approx(expected, rel=1e-6)
    assert distance([(parts[0][0], 1.0), (parts[0][0], -1.0)], found) == float("inf")


class Largest(TorchFunctionMode):
    """Records the size of the largest tensor that an operation returns."""

    num_bytes = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.num_bytes = max(self.num_bytes, tensor.nbytes)
        return found


def wide(seed: int, rank: int) -> LoraWeights:
    """An adapter with a rank far above its module's features in one module, and rank 2 in a larger module."""
    generator = torch.Generator().manual_seed(seed)
    return LoraWeights(
        {
            ModuleKey(0, name): LoraModule(
                torch.randn(r, inputs, generator=generator), torch.randn(out, r, generator=generator), 0.5
            )
            for name, r, out, inputs in (("q_proj", rank, 24, 16), ("up_proj", 2, 40, 16))
        }
    )


def test_memory_does_not_grow_with_the_square_of_the_rank() -> None:
    """A file of some megabytes can have rank 20,000 in one module: a square matrix of doubles would take 3 GB."""
    parts = [(wide(0, 1000), 0.7), (wide(1, 800), -0.4)]
    with Largest() as largest:
        found = merge(parts, Recipe("svd", rank=4))
        off = distance(parts, found)
    assert largest.num_bytes <= 8 * 1000 * 24, "in fp64, the larger factor of the larger part"
    exact, merged = dense_sum(parts), delta(found)
    squared = sum(float((merged[key] - exact[key]).square().sum()) for key in exact)
    total = sum(float(value.square().sum()) for value in exact.values())
    assert off == pytest.approx((squared / total) ** 0.5, rel=1e-9)
    cancelling = [(wide(0, 1000), 1.0), (wide(0, 1000), -1.0)]
    assert distance(cancelling, found) == float("inf")


def test_default_rank_is_limited_by_the_module_sizes() -> None:
    """The default rank is the largest one, limited by the largest rank of a product, since more would be zeros."""
    parts = [(wide(0, 1000), 0.7), (wide(1, 800), -0.4)]
    found = merge(parts, Recipe("svd"))
    assert {module.rank for module in found.modules.values()} == {16}
    assert gap(delta(found), dense_sum(parts)) < 1e-5
    assert {module.rank for module in merge([(wide(0, 5), 1.0)], Recipe("svd")).modules.values()} == {5}


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("method", ["svd", *PRUNING])
def test_order_of_parts_does_not_matter(tuned: PeftModel, method: MergeMethod, rank: int | None) -> None:
    recipe = Recipe(method, 1.0 if method == "svd" else 0.5, seed=1, rank=rank)
    backwards = {name: PARTS[name] for name in reversed(PARTS)}
    assert ours(tuned, recipe, backwards).digest == ours(tuned, recipe).digest


def test_the_seed_decides_what_dare_keeps(tuned: PeftModel) -> None:
    recipe = Recipe("dare_linear", 0.5, seed=1)
    assert ours(tuned, recipe).digest == ours(tuned, recipe).digest
    assert ours(tuned, recipe).digest != ours(tuned, dataclasses.replace(recipe, seed=2)).digest
    still = Recipe("ties", 0.5, seed=1)
    assert ours(tuned, still).digest == ours(tuned, dataclasses.replace(still, seed=2)).digest


def test_dare_keeps_the_mean() -> None:
    """The average over many seeds is the adapter itself, and the share of kept entries is the density."""
    key = ModuleKey(0, "q_proj")
    a, b = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[1.0], [0.5]])
    one = LoraWeights({key: LoraModule(a, b, 1.0)})
    drawn = torch.stack(
        [merge([(one, 1.0)], Recipe("dare_linear", 0.25, seed)).modules[key].a for seed in range(2000)]
    )
    assert ((drawn == 0) | (drawn == 4 * a)).all()
    assert (drawn != 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert (drawn.mean(0) - a).abs().max() < 0.5


def test_pruning_of_a_small_example() -> None:
    """Merge two parts with one entry in A and in B, small enough to compute manually."""
    key = ModuleKey(0, "q_proj")
    one = LoraWeights({key: LoraModule(torch.tensor([[4.0, -1.0, 2.0, 0.5]]), torch.tensor([[2.0]]), 1.0)})
    two = LoraWeights({key: LoraModule(torch.tensor([[-3.0, -3.0, 0.1, 0.2]]), torch.tensor([[-1.0]]), 1.0)})
    pruned = merge([(one, 1.0), (two, 1.0)], Recipe("magnitude_prune", 0.5)).modules[key]
    assert pruned.a.tolist() == [[1.0, -3.0, 2.0, 0.0]]
    assert pruned.b.tolist() == [[0.0]]  # half of one entry, rounded down, is none
    elected = merge([(one, 1.0), (two, 1.0)], Recipe("ties", 1.0)).modules[key]
    assert elected.a.tolist() == [[4.0, -2.0, pytest.approx(1.05), pytest.approx(0.35)]]
    assert elected.b.tolist() == [[2.0]]


def test_parts_of_different_ranks_need_a_rank(mixed: PeftModel) -> None:
    parts = [(weights_of(mixed, name), weight) for name, weight in PARTS.items()]
    for method in PRUNING:
        with pytest.raises(InvalidInput, match="set a rank") as caught:
            check([weights.ranks for weights, _ in parts], Recipe(method, 0.5))
        assert caught.value.errors[0].loc == ("rank",)
        check([weights.ranks for weights, _ in parts], Recipe(method, 0.5, rank=4))


def test_progress_is_reported(tuned: PeftModel) -> None:
    heard: list[tuple[int, int]] = []
    merge([(weights_of(tuned, "two"), 1.0)], Recipe("svd"), lambda done, total: heard.append((done, total)))
    assert heard == [(done, 9) for done in range(1, 10)]


@pytest.mark.parametrize("recipe", [Recipe("svd"), Recipe("ties", 0.5), Recipe("dare_linear", 0.5, rank=2)])
def test_overflow_of_fp32_is_refused(recipe: Recipe) -> None:
    huge = LoraWeights(
        {ModuleKey(0, "q_proj"): LoraModule(torch.full((1, 4), 3e38), torch.full((4, 1), 3e38), 1.0)}
    )
    with pytest.raises(InvalidInput, match="larger values than fp32") as caught:
        merge([(huge, 100.0)], recipe)
    assert caught.value.errors[0].loc == ("expression",)
