"""transformers as the reference: logits of a base with adapters merged densely into its weights, in fp32."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from adapters.lora import LoraWeights

Weighted = Iterable[tuple[LoraWeights, float]]


def load_reference(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the Hugging Face model of a directory for inference."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    model.eval()
    return model.requires_grad_(requires_grad=False)


def linear(model: torch.nn.Module, path: str) -> torch.nn.Linear:
    module = model.get_submodule(path)
    assert isinstance(module, torch.nn.Linear)
    return module


def templated(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> BatchEncoding:
    """Return a conversation's tokens, from transformers and the tokenizer's template."""
    found = tokenizer.apply_chat_template(messages, **options)
    assert isinstance(found, BatchEncoding)
    return found


def decoded(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], **options: Any) -> str:
    """Return the tokenizer's own text of a sequence, without cleaning up spaces."""
    text = tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False, **options)
    assert isinstance(text, str)
    return text


def generate(model: torch.nn.Module, **options: Any) -> torch.Tensor:
    """Return what a Hugging Face model generates after the input."""
    found = cast("Any", model).generate(**options)  # missing in the types of `PreTrainedModel`
    assert isinstance(found, torch.Tensor)
    return found


@contextmanager
def merged(model: PreTrainedModel, adapters: Weighted) -> Iterator[PreTrainedModel]:
    """Give the model weights W + Σ weight · scaling · B A, summed in fp64, during the block."""
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
    """Return logits (tokens, vocab) of one sequence."""
    out: torch.Tensor = model(input_ids=torch.tensor([list(token_ids)])).logits
    return out[0].float()


def assert_greedy(
    reference: torch.Tensor, num_prompt_tokens: int, token_ids: Sequence[int], tolerance: float = 0.0
) -> None:
    """Assert by teacher forcing that each token is the likeliest under `reference` (tokens, vocab) of prompt and
    answer.

    `tolerance`: allowed distance from the highest logit, for bases whose logits are close to each other.
    """
    for step, token_id in enumerate(token_ids):
        row = reference[num_prompt_tokens + step - 1]
        best = int(row.argmax())
        gap = float(row[best] - row[token_id])
        assert gap <= tolerance, f"token {step} is {token_id}, {gap:.3g} below {best}"
