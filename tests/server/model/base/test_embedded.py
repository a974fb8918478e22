"""The embedded base against the GGUF file read by the gguf package, and its tokenizer against known ids."""

import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import PreTrainedTokenizerBase

from server.model.base.checkpoint import read_tokenizer
from server.model.base.export import split
from server.model.base.source import EMBEDDED, PACKAGE, find_gguf
from server.model.base.weights import BaseModel, load_base, read_manifest
from tests.kits.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def base(base_dir: Path) -> BaseModel:
    manifest = read_manifest(base_dir)
    if manifest is None or manifest.name != EMBEDDED:
        pytest.skip("SMOLORA_TEST_BASE is another base")
    return load_base(base_dir)


@pytest.fixture(scope="module")
def tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """Return the tokenizer as transformers reads it."""
    return read_tokenizer(base.directory)


@cache
def gguf_tensors() -> dict[str, torch.Tensor]:
    """Return the dequantized tensors in fp32, by their GGUF names."""
    reader = GGUFReader(find_gguf())
    return {
        tensor.name: torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        for tensor in reader.tensors
        if tensor.name.startswith(("token_embd", "output_norm", "blk.0.", "blk.29."))
    }


def interleaved_to_half(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Convert between llama.cpp's rotation of neighbours and Hugging Face's of halves: (heads, d/2, 2, in) and
    (heads, 2, d/2, in)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def test_weights_are_the_dequantized_file_rounded_to_bf16(base: BaseModel) -> None:
    ours, theirs = dict(split(base.config, base.weights)), gguf_tensors()
    assert torch.equal(ours["model.embed_tokens.weight"], theirs["token_embd.weight"].bfloat16())
    assert torch.equal(ours["model.norm.weight"], theirs["output_norm.weight"].bfloat16())
    for layer in (0, 29):
        there, here = f"blk.{layer}.", f"model.layers.{layer}."
        plain = {
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        }
        for gguf_name, name in plain.items():
            assert torch.equal(ours[f"{here}{name}.weight"], theirs[f"{there}{gguf_name}.weight"].bfloat16()), name
        for gguf_name, name, heads in (("attn_q", "q_proj", 9), ("attn_k", "k_proj", 3)):
            expected = interleaved_to_half(theirs[f"{there}{gguf_name}.weight"], heads).bfloat16()
            assert torch.equal(ours[f"{here}self_attn.{name}.weight"], expected), name


def test_sizes_are_smollm2s(base: BaseModel) -> None:
    config = base.config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (49152, 576, 1536)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-05, 100000.0)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (8192, True)
    assert config.eos_token_ids == (2,)
    assert base.weights.num_parameters == 134_515_008
    assert base.dtype == torch.bfloat16
    assert base.name == EMBEDDED


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, we can use", [19556, 28, 392, 416, 722]),
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("\n", [198]),
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("", []),
        ("<|im_start|>user\n", [1, 4093, 198]),
    ],
)
def test_token_ids_are_smollm2s(
    base: BaseModel, tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]
) -> None:
    assert base.tokenizer.encode(text) == tokenizer(text).input_ids == ids
    assert base.tokenizer.decode(ids) == tokenizer.decode(ids) == text


def test_digits_are_split_off_first(tokenizer: PreTrainedTokenizerBase) -> None:
    """Without that step, the last of the two spaces would stay with the number."""
    assert tokenizer.tokenize("x  12 ½") == ["x", "ĠĠ", "1", "2", "Ġ", "Â½"]
    assert tokenizer.tokenize("a1b22") == ["a", "1", "b", "2", "2"]


def test_special_tokens(base: BaseModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_ids_to_tokens(list(range(17))) == SPECIAL_TOKENS
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        1,
        2,
        2,
        0,
    )
    assert len(base.tokenizer) == len(tokenizer) == 49152
    assert base.tokenizer.eos_token_id == 2
    ids = [1, 19556, 0, 5, 16, 2]
    assert base.tokenizer.decode(ids, skip_special_tokens=True) == "Hello"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hello"


def test_the_chat_template_is_smollm2s(base: BaseModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.chat_template == CHAT_TEMPLATE
    messages = [{"role": "user", "content": "Hi"}]
    assert base.tokenizer.chat_template is not None
    text = base.tokenizer.chat_template.render(messages, add_generation_prompt=True)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_converted_base_is_ready_in_under_three_seconds(base_dir: Path) -> None:
    took, end = 9.0, time.monotonic() + 30
    while took >= 3 and time.monotonic() < end:  # others use the machine, for seconds at a time
        started = time.perf_counter()
        load_base(base_dir)
        took = time.perf_counter() - started
    assert took < 3


def test_the_package_is_never_imported(base: BaseModel) -> None:
    find_gguf()
    assert PACKAGE not in sys.modules
