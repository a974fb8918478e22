"""Rows in training against the plain formula under autograd, the served path, and PEFT."""

from pathlib import Path

import pytest
import torch

from adapters.lora import LoraModule, LoraWeights, ModuleKey
from server.model.base.weights import BaseModel
from server.model.lora_batch import LoraBatch, TokenRun
from server.model.rank_rows import GROUPS, RankRows, RowFormat
from server.model.smollm import NoAdapters
from server.training.dropout import Dropout, LayerInputs
from server.training.trained_rows import TrainedRows
from tests.kits.engines import place, random_adapter
from tests.server.model.test_rank_rows import CPU, SHAPE
from tests.server.training.data.rows_kit import (
    deltas,
    flat,
    gradients_of,
    make_examples,
    model_of,
    packed_loss,
    peft_model,
    randomize,
    reference_loss,
    rows_of,
    weights_of,
)

ADAPTERS: dict[str, LoraWeights] = {
    "all modules": random_adapter(SHAPE, 0, rank=4),
    "one row": random_adapter(SHAPE, 1, rank=1),
    "k and down": random_adapter(SHAPE, 2, rank=3, modules=["k_proj", "down_proj"]),
    "some layers": random_adapter(SHAPE, 3, rank=5, modules=["q_proj", "v_proj", "up_proj"], layers=[0, 2]),
    "mixed ranks": random_adapter(SHAPE, 4, rank=lambda key: 1 + (7 * key.layer + len(key.module)) % 6),
}


def near(weights: LoraWeights, seed: int = 9, strength: float = 0.1) -> LoraWeights:
    """Another adapter of the same modules, ranks and scalings, a little off."""
    generator = torch.Generator().manual_seed(seed)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + strength * tensor.std() * torch.randn(tensor.shape, generator=generator)

    return LoraWeights({key: LoraModule(moved(m.a), moved(m.b), m.scaling) for key, m in weights.modules.items()})


def plain(
    leaves: LoraWeights,
    frozen: LoraWeights | None,
    layer: int,
    group: str,
    x: torch.Tensor,
    kept: torch.Tensor | None = None,
    factor: float = 1.0,
) -> torch.Tensor:
    """scaling · (B A - B₀ A₀) x, module by module as it is written, in fp64."""
    outputs = []
    x = x.double()
    if kept is not None:
        x = x * kept * factor
    for name in GROUPS[group]:
        key = ModuleKey(layer, name)
        module = leaves.modules.get(key)
        if module is None:
            outputs.append(x.new_zeros(x.shape[0], SHAPE.features[name][0]))
            continue
        out = module.scaling * (x @ module.a.t() @ module.b.t())
        if frozen is not None:
            start = frozen.modules[key]
            out = out - start.scaling * (x @ start.a.double().t() @ start.b.double().t())
        outputs.append(out)
    return torch.cat(outputs, 1)


def check_formula(weights: LoraWeights, frozen: LoraWeights | None, dropout: Dropout | None = None) -> None:
    """Every group of every layer: outputs, gradients of the input and of the output beside, and of A and B."""
    rows = TrainedRows(weights, SHAPE, torch.float32, CPU, frozen)
    leaves = LoraWeights(
        {
            key: LoraModule(m.a.double().requires_grad_(), m.b.double().requires_grad_(), m.scaling)
            for key, m in weights.modules.items()
        }
    )
    generator = torch.Generator().manual_seed(5)
    for layer in range(SHAPE.num_layers):
        for group, modules in GROUPS.items():
            x = torch.randn(11, SHAPE.features[modules[0]][1], generator=generator)
            y = torch.randn(11, sum(SHAPE.features[name][0] for name in modules), generator=generator)
            dy = torch.randn(y.shape, generator=generator)
            inputs = [tensor.clone().requires_grad_() for tensor in (x, y)]
            rows.dropout = dropout
            found = rows.add(layer, group, inputs[0], inputs[1] * 1)  # not a leaf: it is written in place
            kept, factor = None, 1.0
            if dropout is not None and (layer, group) in rows.groups:
                kept = dropout.kept(LayerInputs.of(layer, {group: x.shape[1]}, CPU), group)
                factor = dropout.factor
            exact = [tensor.clone().requires_grad_() for tensor in (x, y)]
            expected = exact[1].double() + plain(leaves, frozen, layer, group, exact[0], kept, factor)
            torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)
            found.backward(dy)
            expected.backward(dy.double())
            for ours, theirs in zip(inputs, exact, strict=True):
                if theirs.grad is None or ours.grad is None:  # no module of the group has an adapter
                    assert ours.grad is theirs.grad is None
                else:
                    torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-5, rtol=1e-5)
    rows.collect_gradients()
    expected_gradients: dict[ModuleKey, LoraModule] = {}
    for key, m in leaves.modules.items():
        assert m.a.grad is not None
        assert m.b.grad is not None
        expected_gradients[key] = LoraModule(m.a.grad.float(), m.b.grad.float(), 1.0)
    expected_flat = TrainedRows(LoraWeights(expected_gradients), SHAPE, torch.float32, CPU).masters
    torch.testing.assert_close(rows.gradients, expected_flat, atol=1e-5, rtol=1e-5)
    assert rows.gradients.abs().max() > 0.1


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_formula(name: str) -> None:
    check_formula(ADAPTERS[name], None)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_formula_with_subtracted_rows(name: str) -> None:
    check_formula(near(ADAPTERS[name]), ADAPTERS[name])


@pytest.mark.parametrize("name", ["all modules", "some layers"])
@pytest.mark.parametrize("takes_off", [False, True], ids=["", "taken off"])
def test_the_formula_with_dropout(name: str, takes_off: bool) -> None:
    dropout = Dropout(0.4, [(1, 0, 7), (1, 0, 3)], [5, 6])
    check_formula(near(ADAPTERS[name]), ADAPTERS[name] if takes_off else None, dropout)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_served_adapter_matches_the_trained_one(name: str) -> None:
    """The rows as they train against `LoraBatch` with the weights that they publish."""
    for rows in (
        TrainedRows(ADAPTERS[name], SHAPE, torch.float32, CPU),
        TrainedRows(near(ADAPTERS[name]), SHAPE, torch.float32, CPU, ADAPTERS[name]),
    ):
        pool = RankRows(SHAPE, max_rank=32, row_format=RowFormat.of_torch(torch.float32, CPU), device=CPU)
        (placement,) = place(pool, [rows.weights()])
        batch = LoraBatch(pool, [TokenRun(0, 9, ((placement, 1.0),))])
        for layer in range(SHAPE.num_layers):
            for group, modules in GROUPS.items():
                x = torch.randn(9, SHAPE.features[modules[0]][1])
                y = torch.randn(9, sum(SHAPE.features[module][0] for module in modules))
                with torch.inference_mode():
                    served = batch.add(layer, group, x, y.clone())
                    trained = rows.add(layer, group, x, y.clone())
                torch.testing.assert_close(trained, served, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_round_trip(name: str) -> None:
    weights = ADAPTERS[name]
    rows = TrainedRows(weights, SHAPE, torch.bfloat16, CPU)
    found = rows.weights()
    assert found.digest == weights.digest, "not a bit is lost, whatever the forward's dtype is"
    assert rows.masters.numel() == weights.num_parameters
    rows.masters.add_(1)
    rows.refresh()
    assert found.digest == weights.digest, "they are copies"
    for key, module in rows.weights().modules.items():
        assert torch.equal(module.a, weights.modules[key].a + 1)
        assert torch.equal(module.b, weights.modules[key].b + 1)


def test_the_published_adapter_with_subtracted_rows() -> None:
    """Twice the rank, and the same difference; nothing at all before the first step."""
    start = ADAPTERS["mixed ranks"]
    moved = near(start)
    published = TrainedRows(moved, SHAPE, torch.float32, CPU, start).weights()
    exact = {key: delta - deltas(start)[key] for key, delta in deltas(moved).items()}
    for key, delta in deltas(published).items():
        assert published.modules[key].rank == 2 * start.modules[key].rank
        torch.testing.assert_close(delta, exact[key], atol=1e-6, rtol=1e-5)
    untouched = TrainedRows(start, SHAPE, torch.float32, CPU, start).weights()
    assert all(not delta.any() for delta in deltas(untouched).values())


def test_gradients_add_up_in_32_bits() -> None:
    """A thousand micro-batches whose gradients 16 bits could not add up: each is 1/1000 of the sum."""
    weights = random_adapter(SHAPE, 0, rank=2, modules=["o_proj"], layers=[1])
    rows = TrainedRows(weights, SHAPE, torch.bfloat16, CPU)
    for _ in range(1000):
        for leaf in rows.leaves:
            leaf.grad = torch.full_like(leaf, 0.25)
        rows.collect_gradients()
    (module,) = weights.modules.values()
    expected = torch.full_like(rows.gradients, 250.0)
    expected[: module.a.numel()] *= module.scaling  # which the leaf of A holds
    torch.testing.assert_close(rows.gradients, expected, atol=0, rtol=1e-5)
    assert all(leaf.grad is None for leaf in rows.leaves)


def test_a_micro_batch_ends_its_dropout() -> None:
    rows = TrainedRows(ADAPTERS["one row"], SHAPE, torch.float32, CPU)
    rows.dropout = Dropout(0.5, [(0, 0, 0)], [3])
    rows.collect_gradients()
    assert rows.dropout is None


def test_an_adapter_of_another_base() -> None:
    with pytest.raises(AssertionError, match="another base"):
        TrainedRows(random_adapter(SHAPE, 0, rank=2, layers=[0, SHAPE.num_layers]), SHAPE, torch.float32, CPU)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"up_proj": 1}},
    ],
    ids=["all", "rslora", "three modules", "patterns"],
)
def test_first_gradients_are_pefts(options: dict[str, object], tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    """The same A and B on the same rows: loss and gradients of every module within 1e-5."""
    tuned, examples = randomize(peft_model(tiny_base_dir, **options)), make_examples()
    theirs = reference_loss(tuned, examples)
    theirs.backward()
    rows = rows_of(weights_of(tuned), tiny_base)
    ours = packed_loss(model_of(tiny_base), rows, examples)
    ours.backward()
    rows.collect_gradients()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    expected = flat(gradients_of(tuned), tiny_base)
    assert (rows.gradients - expected).abs().max() <= 1e-5
    assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_first_gradients_with_subtracted_rows_are_pefts(
    init: str, tiny_base: BaseModel, tiny_base_dir: Path
) -> None:
    """PEFT takes the share out of W; here W stays, and the loss and all gradients are the same."""
    tuned, examples = peft_model(tiny_base_dir, r=4, lora_alpha=8, init_lora_weights=init), make_examples()
    theirs = reference_loss(tuned, examples)
    theirs.backward()
    start = weights_of(tuned)
    rows = rows_of(start, tiny_base, start)
    model = model_of(tiny_base)
    ours = packed_loss(model, rows, examples)
    ours.backward()
    rows.collect_gradients()
    with torch.no_grad():
        assert ours.item() == packed_loss(model, NoAdapters(), examples).item(), (
            "the first step starts at the base"
        )
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    expected = flat(gradients_of(tuned), tiny_base)
    assert (rows.gradients - expected).abs().max() <= 1e-5
    assert expected.abs().max() > 1e-2


def test_a_step_of_the_optimizer_moves_the_forward(tiny_base: BaseModel) -> None:
    """AdamW on the flat masters lowers the loss, with and without a share taken off."""
    model, examples = model_of(tiny_base), make_examples()
    start = random_adapter(tiny_base.config.shape, 0, rank=4)
    for frozen in (None, start):
        rows = rows_of(start, tiny_base, frozen)
        rows.masters.grad = rows.gradients
        optimizer = torch.optim.AdamW([rows.masters], 1e-2, weight_decay=0.0)
        losses = []
        for _ in range(3):
            rows.gradients.zero_()
            loss = packed_loss(model, rows, examples)
            loss.backward()
            rows.collect_gradients()
            optimizer.step()
            rows.refresh()
            losses.append(loss.item())
        assert losses[2] < losses[1] < losses[0]
