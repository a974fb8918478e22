"""Where adapters start: the distributions, PEFT's pissa and olora, and what is published of them."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel

from adapters.lora import MODULES, LoraModule, LoraWeights, ModuleKey
from adapters.peft import files as peft_format
from adapters.peft.files import PeftAdapter
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.model.rank_rows import GROUPS
from server.model.smollm import NoAdapters
from server.training.packed import PackedAttention
from server.training.spec import Init, JobSpec, LoraSpec
from server.training.trained_rows import TrainedRows, adapter_config, initial_weights
from tests.adapters.oracle import loaded
from tests.kits.oracles.hugging_face import load_reference, logits
from tests.server.training.data.rows_kit import (
    deltas,
    distance,
    make_examples,
    model_of,
    packed_loss,
    peft_model,
    reference_loss,
    rows_of,
    weights_of,
)

SPEC = LoraSpec(rank=4, alpha=8)
TAKEN_OFF: tuple[Init, ...] = ("pissa", "olora")


def weight(base: BaseModel, key: ModuleKey) -> torch.Tensor:
    """W of a module, cut out of the fused one by hand, in fp64."""
    group = next(name for name, modules in GROUPS.items() if key.module in modules)
    start = 0
    for name in GROUPS[group]:
        out = base.config.shape.features[name][0]
        if name == key.module:
            fused: torch.Tensor = getattr(base.weights.layers[key.layer], group)
            return fused[start : start + out].double()
        start += out
    raise AssertionError(key)


def steps(rows: TrainedRows, base: BaseModel, num: int, rate: float = 1e-3) -> LoraWeights:
    """What is published after some steps of AdamW."""
    model, examples = model_of(base), make_examples()
    rows.masters.grad = rows.gradients
    optimizer = torch.optim.AdamW([rows.masters], rate, weight_decay=0.0)
    for _ in range(num):
        rows.gradients.zero_()
        packed_loss(model, rows, examples).backward()
        rows.collect_gradients()
        optimizer.step()
        rows.refresh()
    return rows.weights()


@pytest.mark.parametrize("rank", [4, 64])
def test_gaussian_has_one_deviation_at_every_rank(rank: int, tiny_base: BaseModel) -> None:
    weights, frozen = initial_weights(replace(SPEC, rank=rank), tiny_base, seed=0)
    assert frozen is None
    drawn = torch.cat([module.a.flatten() for module in weights.modules.values()])
    assert drawn.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert abs(drawn.mean().item()) < 0.003
    kurtosis = ((drawn / drawn.std()) ** 4).mean().item()
    assert kurtosis == pytest.approx(3, rel=0.1), "a normal distribution"
    assert not any(module.b.any() for module in weights.modules.values())


def test_a_job_of_before_keeps_its_deviation(tiny_base: BaseModel) -> None:
    """It was 1/rank: equal at rank 16, to the bit."""
    for rank in (4, 16):
        document = JobSpec("old", lora=replace(SPEC, rank=rank)).to_document()
        lora = document["lora"]
        assert isinstance(lora, dict)
        del lora["init_std"]
        old, _ = initial_weights(JobSpec.from_document(document).lora, tiny_base, seed=0)
        new, _ = initial_weights(replace(SPEC, rank=rank), tiny_base, seed=0)
        for key, module in old.modules.items():
            torch.testing.assert_close(module.a, new.modules[key].a * (16 / rank), rtol=1e-6, atol=0)
        assert (old.digest == new.digest) is (rank == 16)


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_the_distribution_is_pefts(init: Init, tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    """The same deviation and largest value, for each number of inputs."""
    ours, _ = initial_weights(replace(SPEC, rank=16, init=init), tiny_base, seed=0)
    name = True if init == "kaiming" else init
    theirs = weights_of(peft_model(tiny_base_dir, r=16, lora_alpha=8, init_lora_weights=name))
    assert ours.modules.keys() == theirs.modules.keys()
    for inputs in (64, 96):
        a, b = (
            torch.cat([m.a.flatten() for m in weights.modules.values() if m.a.shape[1] == inputs])
            for weights in (ours, theirs)
        )
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.05)
        if init == "kaiming":
            assert a.abs().max().item() == pytest.approx(1 / math.sqrt(inputs), rel=0.01)
            assert b.abs().max().item() == pytest.approx(1 / math.sqrt(inputs), rel=0.01)


@pytest.mark.parametrize("init", TAKEN_OFF)
def test_the_init_can_be_stopped_before_each_decomposition(init: Init, tiny_base: BaseModel) -> None:
    """And to look changes nothing."""
    spec = replace(SPEC, init=init)
    expected, _ = initial_weights(spec, tiny_base, seed=0)
    asked = 0

    def yield_or_leave() -> None:
        nonlocal asked
        asked += 1
        if asked == leave_at:
            raise InterruptedError

    leave_at = 0
    weights, _ = initial_weights(spec, tiny_base, 0, yield_or_leave)
    assert weights.digest == expected.digest
    assert asked == len(weights.modules)
    asked, leave_at = 0, 5
    with pytest.raises(InterruptedError):
        initial_weights(spec, tiny_base, 0, yield_or_leave)
    assert asked == 5


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_the_seed_and_the_module_decide(init: Init, tiny_base: BaseModel) -> None:
    spec = replace(SPEC, init=init)
    weights, _ = initial_weights(spec, tiny_base, seed=3)
    again, _ = initial_weights(spec, tiny_base, seed=3)
    other, _ = initial_weights(spec, tiny_base, seed=4)
    assert again.digest == weights.digest != other.digest
    some, _ = initial_weights(replace(spec, target_modules=("down_proj", "q_proj")), tiny_base, seed=3)
    for key, module in some.modules.items():
        assert torch.equal(module.a, weights.modules[key].a), "neither the other modules nor their order"
    of_64_inputs = [m.a for m in weights.modules.values() if m.a.shape[1] == 64]
    assert all(not torch.equal(a, b) for i, a in enumerate(of_64_inputs) for b in of_64_inputs[:i])


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank", [3, 4])
def test_the_configuration(rank: int, use_rslora: bool, tiny_base: BaseModel) -> None:
    """Twice the rank where a share is taken off, and the same effective scaling, α/r or α/√r."""
    for init in ("gaussian", "kaiming", *TAKEN_OFF):
        spec = LoraSpec(rank=rank, alpha=7, init=init, use_rslora=use_rslora, target_modules=("q_proj", "up_proj"))
        config = adapter_config(spec)
        weights, frozen = initial_weights(spec, tiny_base, seed=0)
        assert config.rank == (2 * rank if init in TAKEN_OFF else rank)
        for key, module in weights.modules.items():
            assert module.scaling == pytest.approx(7 / (math.sqrt(rank) if use_rslora else rank), rel=1e-15)
            assert module.scaling == config.scaling_of(key)
            assert module.a.shape[0] == module.b.shape[1] == rank
        published = rows_of(weights, tiny_base, frozen).weights()
        assert all(module.rank == config.rank for module in published.modules.values())


def test_pissa_is_the_best_approximation(tiny_base: BaseModel) -> None:
    """Eckart & Young: what is left of W are its other singular values."""
    weights, _ = initial_weights(replace(SPEC, init="pissa"), tiny_base, seed=0)
    for key, delta in deltas(weights).items():
        w = weight(tiny_base, key)
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        best = u[:, :4] * s[:4] @ vt[:4]
        assert (delta - best).norm() <= 1e-5 * best.norm()
        module = weights.modules[key]
        share = (s[:4] / module.scaling).sqrt().float()  # half of the singular values on each side
        torch.testing.assert_close(module.a.norm(dim=1), share, rtol=1e-4, atol=0)
        torch.testing.assert_close(module.b.norm(dim=0), share, rtol=1e-4, atol=0)


@pytest.mark.parametrize("init", TAKEN_OFF)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_start_is_pefts(init: Init, use_rslora: bool, tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    spec = replace(SPEC, init=init, use_rslora=use_rslora)
    weights, frozen = initial_weights(spec, tiny_base, seed=0)
    assert frozen is weights
    theirs = weights_of(
        peft_model(tiny_base_dir, r=4, lora_alpha=8, init_lora_weights=init, use_rslora=use_rslora)
    )
    assert distance(weights, theirs) <= 1e-4
    for key, module in weights.modules.items():
        other = theirs.modules[key]
        sign = (module.a * other.a).sum(1).sign()  # of a pair of vectors: any is as good
        torch.testing.assert_close(module.a, sign[:, None] * other.a, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(module.b, sign * other.b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("init", TAKEN_OFF)
def test_a_rank_above_the_modules(init: Init, tiny_base: BaseModel) -> None:
    """k and v have 32 outputs: of rank 40, 8 rows are zero, and all of W is in the others."""
    weights, frozen = initial_weights(replace(SPEC, rank=40, init=init), tiny_base, seed=0)
    key = ModuleKey(1, "k_proj")
    module = weights.modules[key]
    assert module.rank == 40
    assert not module.a[32:].any()
    assert not module.b[:, 32:].any()
    share = 1 if init == "pissa" else module.scaling  # OLoRA's authors leave the scaling on it
    torch.testing.assert_close(deltas(weights)[key], share * weight(tiny_base, key), atol=1e-5, rtol=1e-4)
    rows_of(weights, tiny_base, frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", ["gaussian", "kaiming", *TAKEN_OFF])
@torch.no_grad()
def test_training_starts_at_the_base(init: Init, dtype: torch.dtype, tiny_base: BaseModel) -> None:
    """Logits of the first step: the base's to the bit, though B₀ A₀ is as large as W, in 16 bits too."""
    base = load_base(tiny_base.directory, dtype)
    weights, frozen = initial_weights(replace(SPEC, rank=16, init=init), base, seed=0)
    rows = rows_of(weights, base, frozen, dtype)
    model, attention = model_of(base), PackedAttention([20], base.device)
    token_ids = torch.arange(3, 23)
    ours = model.logits(model.forward(token_ids, attention.positions, attention, rows))
    plain = model.logits(model.forward(token_ids, attention.positions, attention, NoAdapters()))
    assert (ours - plain).abs().max() == 0
    if init in TAKEN_OFF:
        share = rows_of(weights, base, None, dtype)
        alone = model.logits(model.forward(token_ids, attention.positions, attention, share))
        assert (alone - plain).abs().max() > 0.5, "what is taken off is large"


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", TAKEN_OFF)
def test_trained_and_published_as_pefts_converted_files(
    init: Init, use_rslora: bool, tiny_base: BaseModel, tiny_base_dir: Path, tmp_path: Path
) -> None:
    """Five steps of AdamW here, and in PEFT with its conversion to ordinary LoRA afterwards."""
    examples = make_examples()
    tuned = peft_model(tiny_base_dir, r=4, lora_alpha=8, init_lora_weights=init, use_rslora=use_rslora)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], 1e-3, weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = tuned.peft_config["default"]
        assert isinstance(config, LoraConfig)
        config.init_lora_weights = True
        tuned.save_pretrained(str(tmp_path / "start"))
        for _ in range(5):
            optimizer.zero_grad()
            reference_loss(tuned, examples).backward()
            optimizer.step()
        tuned.save_pretrained(
            str(tmp_path / "trained"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    converted = read(tmp_path / "trained", tiny_base)

    spec = replace(SPEC, init=init, use_rslora=use_rslora)
    published = steps(rows_of(*_started(spec, tiny_base)), tiny_base, 5)
    assert distance(published, converted.weights) <= 1e-2
    # Written as ours is, PEFT and our reader load it as ordinary LoRA of the same shape as PEFT's own.
    ours = PeftAdapter(adapter_config(spec), published)
    (tmp_path / "ours").mkdir()
    peft_format.write(tmp_path / "ours", ours)
    again = read(tmp_path / "ours", tiny_base)
    assert again.weights.digest == published.digest
    assert (again.config.rank, again.config.use_rslora) == (converted.config.rank, converted.config.use_rslora)
    assert again.config.alpha == pytest.approx(converted.config.alpha, rel=1e-15)
    ids = list(examples[5].token_ids)
    reloaded: PeftModel = loaded(tmp_path / "ours", load_reference(tiny_base_dir))
    plain = logits(load_reference(tiny_base_dir), ids)
    difference = (logits(tuned, ids) - plain).abs().max()
    assert (logits(reloaded, ids) - logits(tuned, ids)).abs().max() <= 0.02 * difference
    assert difference > 0.05


def _started(spec: LoraSpec, base: BaseModel) -> tuple[LoraWeights, BaseModel, LoraWeights | None]:
    weights, frozen = initial_weights(spec, base, seed=0)
    return weights, base, frozen


def read(directory: Path, base: BaseModel) -> PeftAdapter:
    return peft_format.read(
        (directory / "adapter_config.json").read_bytes(),
        directory / "adapter_model.safetensors",
        base.config.shape,
    )


def in_16_bits(weights: LoraWeights, x: torch.Tensor) -> dict[ModuleKey, torch.Tensor]:
    """scaling · B(A x) as a 16-bit model computes it: A, B, x, A x and the result rounded."""
    return {
        key: ((x[:, : m.a.shape[1]].bfloat16() @ m.a.bfloat16().t()) @ m.b.bfloat16().t()).double() * m.scaling
        for key, m in weights.modules.items()
    }


@pytest.mark.parametrize("init", TAKEN_OFF)
def test_large_terms_do_not_cancel_in_16_bits(init: Init, tiny_base: BaseModel) -> None:
    """What ten small steps have learned survives in bf16: [B-B₀, B₀]·[A; A-A₀] is off by less than 1 %.

    PEFT's conversion, [B, -B₀]·[A; A₀], is the same in exact arithmetic. In bf16 its rounding errors, which are
    relative to B₀A₀ x, take a third of what was learned.
    """
    weights, frozen = initial_weights(replace(SPEC, rank=8, alpha=16, init=init), tiny_base, seed=0)
    rows = rows_of(weights, tiny_base, frozen)
    ours = steps(rows, tiny_base, 10, rate=1e-4)
    trained = {key: (m.a[:8], m.b[:, :8] + m.b[:, 8:]) for key, m in ours.modules.items()}
    theirs = LoraWeights(
        {
            key: LoraModule(torch.cat((a, start.a)), torch.cat((b, -start.b), 1), start.scaling)
            for key, start in weights.modules.items()
            for a, b in (trained[key],)
        }
    )
    assert distance(theirs, ours) <= 1e-3, "the same in fp32"
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    exact = {key: x[:, : m.a.shape[1]].double() @ deltas(ours)[key].t() for key, m in ours.modules.items()}

    def error(weights: LoraWeights) -> float:
        found = in_16_bits(weights, x)
        wrong = sum(float((found[key] - exact[key]).square().sum()) for key in exact)
        return math.sqrt(wrong / sum(float(out.square().sum()) for out in exact.values()))

    assert error(ours) <= 0.01
    assert error(theirs) >= 0.2
    assert len(exact) == len(MODULES) * tiny_base.config.num_layers


@pytest.mark.real
@pytest.mark.parametrize("init", TAKEN_OFF)
@torch.no_grad()
def test_the_real_base(init: Init, real_base: BaseModel) -> None:
    """On two modules of each layer: the share is W's own, and the first step is the base."""
    spec = LoraSpec(rank=16, alpha=32, init=init, target_modules=("k_proj", "down_proj"))
    weights, frozen = initial_weights(spec, real_base, seed=0)
    for key in (ModuleKey(0, "k_proj"), ModuleKey(17, "down_proj")):
        w, delta = weight(real_base, key), deltas(weights)[key]
        if init == "pissa":
            rest = torch.linalg.svdvals(w)[16:].norm()
            assert (w - delta).norm() == pytest.approx(rest.item(), rel=1e-5)
        else:
            q, _ = torch.linalg.qr(w)
            torch.testing.assert_close(delta, 2 * q[:, :16] @ (q[:, :16].t() @ w), atol=1e-5, rtol=1e-3)
    model, attention = model_of(real_base), PackedAttention([12], real_base.device)
    token_ids = torch.arange(100, 112)
    rows = rows_of(weights, real_base, frozen)
    ours = model.logits(model.forward(token_ids, attention.positions, attention, rows))
    plain = model.logits(model.forward(token_ids, attention.positions, attention, NoAdapters()))
    assert (ours - plain).abs().max() <= 1e-5


def test_initial_weights_leave_the_base_unchanged(tiny_base_dir: Path, tmp_path: Path) -> None:
    """The base's tensors, mapped from its file, are as they were."""
    base = load_base(resolve_base(str(tiny_base_dir), tmp_path))
    before = {name: tensor.clone() for name, tensor in base.weights.tensors()}
    for init in TAKEN_OFF:
        initial_weights(replace(SPEC, init=init), base, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.weights.tensors())
