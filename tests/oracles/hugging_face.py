"""transformers as the reference: logits of a base with adapters merged densely into its weights, in fp32."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapters.lora import LoraWeights

Weighted = Iterable[tuple[LoraWeights, float]]


def load_reference(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The Hugging Face model of a directory, for inference."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model.eval().requires_grad_(requires_grad=False)


def linear(model: torch.nn.Module, path: str) -> torch.nn.Linear:
    module = model.get_submodule(path)
    assert isinstance(module, torch.nn.Linear)
    return module


@contextmanager
def merged(model: PreTrainedModel, adapters: Weighted) -> Iterator[PreTrainedModel]:
    """The model while its weights are W + Σ weight · scaling · B A, summed up in fp64."""
    kept: dict[str, torch.Tensor] = {}
    sums: dict[str, torch.Tensor] = {}
    for weights, weight in adapters:
        for key, module in weights.modules.items():
            total = sums.setdefault(key.path, linear(model, key.path).weight.double())
            sums[key.path] = total + weight * module.scaling * (module.b.double() @ module.a.double())
    for path, total in sums.items():
        layer = linear(model, path)
        kept[path] = layer.weight.data
        layer.weight.data = total.to(layer.weight.dtype)
    try:
        yield model
    finally:
        for path, data in kept.items():
            linear(model, path).weight.data = data


@torch.inference_mode()
def logits(model: torch.nn.Module, token_ids: Sequence[int]) -> torch.Tensor:
    """(tokens, vocab) of one sequence."""
    out: torch.Tensor = model(input_ids=torch.tensor([list(token_ids)])).logits
    return out[0].float()


def assert_greedy(
    reference: torch.Tensor, num_prompt_tokens: int, token_ids: Sequence[int], tolerance: float = 0.0
) -> None:
    """Teacher forcing: each token is the likeliest under `reference` (tokens, vocab) of prompt and answer.

    `tolerance`: how far below the highest logit it may lie, for bases whose logits are close to each other.
    """
    for step, token_id in enumerate(token_ids):
        row = reference[num_prompt_tokens + step - 1]
        best = int(row.argmax())
        gap = float(row[best] - row[token_id])
        assert gap <= tolerance, f"token {step} is {token_id}, {gap:.3g} below {best}"
