"""Our forward pass compared with transformers', over the paged cache: prefills, decodes and mixes of both."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.engine.request import GenerationRequest
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.model.smollm import SmolLM
from tests.kits.engines import GREEDY, build_engine, check_idle, run
from tests.kits.oracles.hugging_face import assert_greedy, load_reference, logits
from tests.kits.paged import paged_logits
from tests.kits.tiny import save_tiny_base

ODD_BASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "untied": ("llama", {"tie_word_embeddings": False, "rms_norm_eps": 1e-3, "rope_theta": 500.0}),
    "head_dim": ("llama", {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10}),
    "wide_heads": (
        "llama",
        {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 16},
    ),
    "one_kv_head": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "num_hidden_layers": 2}),
    "all_kv_heads": ("llama", {"num_key_value_heads": 4, "intermediate_size": 50, "vocab_size": 517}),
    "one_layer": ("llama", {"num_hidden_layers": 1, "num_attention_heads": 6, "hidden_size": 48}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 2}),
    "smollm3_nope_list": (
        "smollm3",
        {"num_hidden_layers": 4, "no_rope_layers": [0, 1, 1, 0], "tie_word_embeddings": False, "head_dim": 8},
    ),
}

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "In 1969, the first people landed on",
    "Water boils at",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a haiku about autumn.<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,",
    "The mitochondria",
    "To be, or not to be:",
    "SELECT name FROM users WHERE",
    "La tour Eiffel se trouve à",
    "HTTP/1.1 404",
    "Ingredients: two eggs, flour,",
    "A",
    "The three laws of robotics are",
    "import numpy as np\n",
    "Photosynthesis is the process by which plants",
    "Q: What is 2 + 2?\nA:",
]


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1, "logits that are all alike would show nothing"
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("name", ODD_BASES)
def test_tiny_bases_agree_with_transformers(name: str, tmp_path: Path) -> None:
    architecture, options = ODD_BASES[name]
    directory = save_tiny_base(tmp_path / name, architecture, options, seed=3)
    base = load_base(resolve_base(str(directory), tmp_path / "home"))
    reference = load_reference(directory)
    rng = random.Random(name)
    vocab = base.config.vocab_size
    token_ids = [[rng.randrange(vocab) for _ in range(length)] for length in (1, 2, 9, 33, 60, 61, 64)]
    model = SmolLM(base.config, base.weights, max_positions=64)
    for ours, ids in zip(paged_logits(model, token_ids, seed=5, block_size=5), token_ids, strict=True):
        assert largest_difference(ours, logits(reference, ids)) <= 1e-4


def test_nope_layers_matter(tmp_path: Path) -> None:
    """The comparison above would fail with rotary embedding in every layer."""
    directory = save_tiny_base(tmp_path / "base", "smollm3", {"no_rope_layers": [1, 0, 1]}, seed=3)
    base = load_base(resolve_base(str(directory), tmp_path / "home"))
    ids = list(range(40, 70))
    model = SmolLM(base.config, base.weights, max_positions=64)
    assert base.config.nope_layers == {1}
    model.layers[1].uses_rotary = True
    (ours,) = paged_logits(model, [ids])
    assert largest_difference(ours, logits(load_reference(directory), ids)) > 1e-2


def test_gradients_do_not_reach_the_base(tiny_base: BaseModel) -> None:
    assert not any(tensor.requires_grad for _, tensor in tiny_base.weights.tensors())


def test_bf16_packed_weights_agree_with_plain_ones(tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    base = load_base(tiny_base.directory, torch.bfloat16)
    plain = SmolLM(base.config, base.weights, max_positions=64)
    packed = SmolLM(base.config, base.weights, max_positions=64, pack=True)
    ids = [list(range(20, 60)), list(range(100, 110))]
    reference = load_reference(tiny_base_dir)
    for first, second, tokens in zip(paged_logits(plain, ids), paged_logits(packed, ids), ids, strict=True):
        exact = logits(reference, tokens)
        assert largest_difference(first, exact) <= 0.1 * float(exact.abs().max())
        assert largest_difference(second, exact) <= 0.1 * float(exact.abs().max())


@pytest.mark.thorough  # end_to_end/test_exact_answers.py: over HTTP
@pytest.mark.real
def test_the_real_base_agrees_with_transformers(real_base: BaseModel, hf_base_dir: Path) -> None:
    """fp32, prefill and decode: logits within 1e-3; for 20 prompts, 64 greedy tokens equal to transformers'."""
    reference = load_reference(hf_base_dir)
    model = SmolLM(real_base.config, real_base.weights, max_positions=512)
    prompts = [tuple(real_base.tokenizer.encode(text)) for text in PROMPTS]
    greedy = replace(GREEDY, max_tokens=64)
    engine = build_engine(real_base, num_blocks=256, model=model)
    requests = [GenerationRequest(str(i), ids, greedy) for i, ids in enumerate(prompts)]
    results = run(engine, requests)
    check_idle(engine)
    texts = [(*ids, *results[str(i), 0].token_ids) for i, ids in enumerate(prompts)]
    theirs = [logits(reference, ids) for ids in texts]
    for i, ids in enumerate(prompts):
        assert len(results[str(i), 0].token_ids) == 64
        assert_greedy(theirs[i], len(ids), results[str(i), 0].token_ids)
        answered = theirs[i][len(ids) - 1 : -1]
        expected = answered.log_softmax(-1).gather(1, torch.tensor(results[str(i), 0].token_ids)[:, None])[:, 0]
        assert torch.tensor(results[str(i), 0].logprobs) == pytest.approx(expected, abs=1e-3)

    few = sorted(range(len(texts)), key=lambda i: len(texts[i]))[::5]
    ours = paged_logits(model, [texts[i][:52] for i in few], block_size=16, num_prompt_tokens=20)
    for i, found in zip(few, ours, strict=True):
        assert largest_difference(found, theirs[i][:52]) <= 1e-3
