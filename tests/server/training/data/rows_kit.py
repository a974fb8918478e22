"""Rows, losses and gradients for tests of training: ours packed, PEFT's and transformers' row by row."""

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import PreTrainedModel

from adapters.lora import MODULES, LoraModule, LoraWeights, ModuleKey
from server.model.base.weights import BaseModel
from server.model.smollm import Adapters, SmolLM
from server.training.encoding import Example
from server.training.packed import PackedAttention
from server.training.passes import TorchPass
from server.training.trained_rows import TrainedRows
from tests.adapters.oracle import live
from tests.kits.oracles.hugging_face import linear, load_reference, logits

LENGTHS = (1, 7, 2, 16, 1, 33, 17, 5, 16)
"""Below, at and above powers of two, where the groups of packed attention end."""


def make_examples(lengths: Sequence[int] = LENGTHS, seed: int = 0, vocab_size: int = 512) -> list[Example]:
    """Return random tokens. About half are trained on, and at least the last one of each row of two or more."""
    rng = random.Random(seed)
    return [
        Example(
            tuple(rng.randrange(3, vocab_size) for _ in range(length)),
            tuple(place > 0 and (place == length - 1 or rng.random() < 0.5) for place in range(length)),
        )
        for length in lengths
    ]


def model_of(base: BaseModel, max_positions: int = 128) -> SmolLM:
    return SmolLM(base.config, base.weights, max_positions=max_positions)


def pass_of(model: SmolLM, adapters: Adapters) -> TorchPass:
    """Return a pass that only measures; gradients stay as they are."""
    return TorchPass(model, adapters, lambda: None)


def packed_loss(model: SmolLM, adapters: Adapters, examples: Sequence[Example]) -> torch.Tensor:
    """Return the mean over the counted tokens of one flat batch, by torch's own cross-entropy over whole
    logits."""
    attention = PackedAttention([len(example.token_ids) for example in examples], model.device)
    token_ids = torch.tensor([token for example in examples for token in example.token_ids])
    is_target = torch.tensor([flag for example in examples for flag in example.is_target])
    hidden = model.forward(token_ids, attention.positions, attention, adapters)
    return F.cross_entropy(model.logits(hidden)[:-1][is_target[1:]], token_ids[1:][is_target[1:]])


def reference_loss(model: torch.nn.Module, examples: Sequence[Example]) -> torch.Tensor:
    """Return the same for a Hugging Face model, which reads one row at a time."""
    losses = []
    for example in examples:
        token_ids, is_target = torch.tensor(example.token_ids), torch.tensor(example.is_target)
        logits = model(input_ids=token_ids[None]).logits[0].float()
        losses.append(F.cross_entropy(logits[:-1][is_target[1:]], token_ids[1:][is_target[1:]], reduction="none"))
    return torch.cat(losses).mean()


def measured(model: PreTrainedModel, examples: Sequence[Example]) -> tuple[float, float, int]:
    """Return (mean loss, accuracy, counted tokens), computed row by row."""
    losses: list[torch.Tensor] = []
    is_right: list[torch.Tensor] = []
    for example in examples:
        targets = torch.tensor(example.token_ids[1:], dtype=torch.int64)
        is_target = torch.tensor(example.is_target[1:], dtype=torch.bool)
        predicted = logits(model, example.token_ids)[:-1]
        losses.append(F.cross_entropy(predicted, targets, reduction="none")[is_target])
        is_right.append((predicted.argmax(-1) == targets)[is_target])
    return float(torch.cat(losses).mean()), float(torch.cat(is_right).float().mean()), len(torch.cat(losses))


def peft_model(directory: Path, **options: Any) -> PeftModel:
    """Return a new adapter, initialized by PEFT, on the Hugging Face base in `directory`, in fp32."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of PEFT about deprecations
        torch.manual_seed(1)
        config = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": list(MODULES), **options})
        return get_peft_model(load_reference(directory), config, autocast_adapter_dtype=False)


def randomize(tuned: PeftModel, std: float = 0.1) -> PeftModel:
    """Fill all A and B at random: B = 0 would leave A without a gradient."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=std, generator=generator)
    return tuned


def keyed(path: str) -> ModuleKey:
    """Return a module's key, from its Hugging Face path."""
    layer, _, name = path.removeprefix("model.layers.").split(".")
    return ModuleKey(int(layer), name)


def weights_of(tuned: PeftModel) -> LoraWeights:
    """Return copies of PEFT's A and B."""
    return LoraWeights(
        {keyed(path): LoraModule(a.clone(), b.clone(), scaling) for path, (a, b, scaling) in live(tuned).items()}
    )


def gradients_of(tuned: PeftModel) -> LoraWeights:
    """Return the gradients of PEFT's A and B, in place of A and B."""
    found: dict[ModuleKey, LoraModule] = {}
    for path in live(tuned):
        layer = f"base_model.model.{path}"
        d_a = linear(tuned, f"{layer}.lora_A.default").weight.grad
        d_b = linear(tuned, f"{layer}.lora_B.default").weight.grad
        assert d_a is not None
        assert d_b is not None
        found[keyed(path)] = LoraModule(d_a.clone(), d_b.clone(), 1.0)
    return LoraWeights(found)


def rows_of(
    weights: LoraWeights, base: BaseModel, frozen: LoraWeights | None = None, dtype: torch.dtype = torch.float32
) -> TrainedRows:
    return TrainedRows(weights, base.config.shape, dtype, torch.device("cpu"), frozen)


def flat(weights: LoraWeights, base: BaseModel) -> torch.Tensor:
    """Return all A and B in the order of `TrainedRows.masters`."""
    return rows_of(weights, base).masters


def deltas(weights: LoraWeights) -> Mapping[ModuleKey, torch.Tensor]:
    """Return scaling · B A of each module, in fp64."""
    return {key: m.scaling * (m.b.double() @ m.a.double()) for key, m in weights.modules.items()}


def distance(found: LoraWeights, expected: LoraWeights) -> float:
    """Return ‖Δ - Δ'‖ / ‖Δ'‖ over all modules together."""
    ours, theirs = deltas(found), deltas(expected)
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[key] - theirs[key]).square().sum()) for key in ours)
    return math.sqrt(difference / sum(float(delta.square().sum()) for delta in theirs.values()))
