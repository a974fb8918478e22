"""Bases from GGUF files: conversion, the stored types that are kept, and refusals."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGUFEndian
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.errors import StartupError
from server.model.base import gguf
from server.model.base.export import export_hugging_face, split
from server.model.base.gguf import open_gguf
from server.model.base.quantized import QUANTIZED
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from tests.kits.tiny import tiny_tokenizer
from tests.kits.tiny_gguf import HEADS, KV_HEADS, save_tiny_gguf

TEXT = "404 Not Found.  <|im_start|>x 12"


def load(file: Path) -> BaseModel:
    return load_base(resolve_base(str(file), file.parent / "home"))


def halves(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Convert between llama.cpp's rotation of neighbours and Hugging Face's of halves: (heads, d/2, 2, in) and
    (heads, 2, d/2, in)."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q4_0", "Q5_1", "F16", "F32"])
def test_weights_equal_the_files(tmp_path: Path, kind: str, is_tied: bool) -> None:
    stands_for = save_tiny_gguf(tmp_path / "tiny.gguf", {"": kind}, is_tied=is_tied)
    base = load(tmp_path / "tiny.gguf")
    assert base.name == "tiny"
    ours = dict(split(base.config, base.weights))
    names = {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj", "attn_v": "self_attn.v_proj"}
    names |= {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_norm": "post_attention_layernorm"}
    expected = {
        "model.embed_tokens.weight": stands_for["token_embd.weight"],
        "model.norm.weight": stands_for["output_norm.weight"],
        "model.layers.1.self_attn.q_proj.weight": halves(stands_for["blk.1.attn_q.weight"], HEADS),
        "model.layers.1.self_attn.k_proj.weight": halves(stands_for["blk.1.attn_k.weight"], KV_HEADS),
    }
    for theirs, name in names.items():
        expected[f"model.layers.0.{name}.weight"] = stands_for[f"blk.0.{theirs}.weight"]
    if not is_tied:
        expected["lm_head.weight"] = stands_for["output.weight"]
    for name, values in expected.items():
        assert torch.equal(ours[name], torch.from_numpy(values).bfloat16()), name
    assert base.config.tie_word_embeddings is is_tied
    matrices = {name for name, tensor in base.weights.tensors() if tensor.ndim == 2}
    assert set(base.weights.quantized) == (matrices if kind in ("Q4_1", "Q8_0") else set())


def test_it_is_a_base_that_transformers_reads(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf")
    base = load(tmp_path / "tiny.gguf")
    exported = tmp_path / "exported"
    export_hugging_face(base, exported)
    assert not (exported / QUANTIZED).exists()
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype="auto").state_dict()
    for name, tensor in split(base.config, base.weights):
        assert torch.equal(theirs[name], tensor), name
    tokenizer, read = tiny_tokenizer(), AutoTokenizer.from_pretrained(exported)
    ids = tokenizer(TEXT).input_ids
    assert base.tokenizer.encode(TEXT) == read(TEXT).input_ids == ids
    assert base.tokenizer.decode(ids) == TEXT
    assert base.tokenizer.chat_template is not None
    assert read.chat_template == tokenizer.chat_template


def test_a_base_that_no_chat_was_trained_on(tmp_path: Path) -> None:
    """Its file has no template, and no special token except the end, like SmolLM2's without `Instruct`."""
    save_tiny_gguf(tmp_path / "tiny.gguf", is_chat=False)
    base = load(tmp_path / "tiny.gguf")
    assert base.tokenizer.chat_template is None
    assert base.tokenizer.eos_token_id == 2
    assert base.config.eos_token_ids == (2,)
    assert base.tokenizer.encode(TEXT) == tiny_tokenizer()(TEXT).input_ids
    export_hugging_face(base, tmp_path / "exported")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert (theirs.config.bos_token_id, theirs.config.pad_token_id) == (None, None)
    read = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert (read.eos_token, read.pad_token, read.chat_template) == ("<|im_end|>", None, None)


def test_blocks_expand_to_the_weights(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf")
    base = load(tmp_path / "tiny.gguf")
    weights = dict(base.weights.tensors())
    assert {one.type for one in base.weights.quantized.values()} == {"Q4_1", "Q8_0"}
    for name, one in base.weights.quantized.items():
        assert torch.equal(one.expanded(), weights[name]), name
    assert not load_base(base.directory, torch.float32).weights.quantized  # they stand for 16 bits


def test_a_stack_of_two_types_is_kept_in_16_bits(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf", {"attn_v": "Q8_0", "ffn_down": "F16", "": "Q4_1"})
    found = set(load(tmp_path / "tiny.gguf").weights.quantized)
    assert {"embed", "layers.0.o", "layers.1.gate_up"} < found
    assert not found & {f"layers.{layer}.{stack}" for layer in range(2) for stack in ("qkv", "down")}


def test_changed_file_is_converted_again(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf")
    first = load(tmp_path / "tiny.gguf")
    assert load(tmp_path / "tiny.gguf").directory == first.directory
    save_tiny_gguf(tmp_path / "tiny.gguf", {"": "Q8_0"})
    second = load(tmp_path / "tiny.gguf")
    assert second.digest != first.digest
    assert not first.directory.exists()


def test_too_little_memory_is_not_taken_for_a_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise MemoryError("Unable to allocate 28.7 MiB for an array")

    save_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf, "_checkpoint", no_room)
    with pytest.raises(MemoryError):
        open_gguf(tmp_path / "tiny.gguf")


def test_refused_files(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    save_tiny_gguf(file, architecture="qwen2")
    with pytest.raises(StartupError, match=r"^tiny.gguf: general.architecture is qwen2, and only llama is read"):
        open_gguf(file)
    save_tiny_gguf(file, splitting="llama-bpe")
    with pytest.raises(StartupError, match=r"tokenizer.ggml.pre is llama-bpe, and only smollm is read: name its"):
        open_gguf(file)
    save_tiny_gguf(file, heads=3)
    with pytest.raises(StartupError, match=r"^tiny.gguf contradicts itself: (.|\n)*attention heads"):
        open_gguf(file)
    save_tiny_gguf(file, eos_token_id=512)
    with pytest.raises(StartupError, match=r"itself: tokenizer.ggml.eos_token_id is 512 of 512 tokens"):
        open_gguf(file)
    save_tiny_gguf(file)
    os.truncate(file, 700)
    with pytest.raises(StartupError, match=r"^tiny.gguf can't be read as GGUF: "):
        open_gguf(file)
    file.write_bytes(b"")
    with pytest.raises(StartupError, match=r"^tiny.gguf can't be read as GGUF: "):
        open_gguf(file)
    with pytest.raises(StartupError, match="not a GGUF file"):
        resolve_base(str(tmp_path / "other.gguf"), tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "harmless"),
    [
        ("llama.rope.scaling.type", "linear", "none"),
        ("llama.rope.scaling.type", "yarn", "none"),
        ("llama.rope.scaling.factor", 2.0, 1.0),
        ("llama.rope.scale_linear", 4.0, 1.0),
        ("tokenizer.ggml.add_bos_token", True, False),
        ("tokenizer.ggml.add_eos_token", True, False),
    ],
)
def test_unsupported_variants_are_refused(
    tmp_path: Path, field: str, value: bool | str | float, harmless: bool | str | float
) -> None:
    file = tmp_path / "tiny.gguf"
    save_tiny_gguf(file, fields={field: value})
    with pytest.raises(StartupError, match=rf"^tiny.gguf asks for what is not supported: {field} is {value}$"):
        open_gguf(file)
    save_tiny_gguf(file, fields={field: harmless})
    open_gguf(file)


def test_another_order_of_bytes_is_refused(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf", endianess=GGUFEndian.BIG)
    with pytest.raises(StartupError, match=r"^tiny.gguf: its bytes are in another order than this machine's$"):
        open_gguf(tmp_path / "tiny.gguf")


def test_types_that_the_package_can_not_expand_are_refused(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf", {"": "F64"})
    with pytest.raises(StartupError, match=r"^weights that a GGUF file stores as F64 are not read$"):
        load(tmp_path / "tiny.gguf")
