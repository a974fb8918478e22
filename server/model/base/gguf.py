"""Reads a base from a GGUF file: SmolLM2, or another base with its architecture and tokenizer type.

GGUF lacks the tokenizer's digit splitting, and rounds constants to single precision. This module restores the
splitting and the exact constants. Weights are rounded to bf16. Weights in 4-bit or 8-bit blocks are kept in their
stored form, too.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from server.errors import StartupError
from server.model.base.checkpoint import Checkpoint, StoredTensor
from server.model.base.quantized import BLOCK_BYTES, Quantized
from server.model.device import is_out_of_memory

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader
    from transformers import PreTrainedTokenizerBase

PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
"""SmolLM2's pre-tokenizer. Without its first step, spaces before a number are split in another way than in
training."""

_READ = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
_MUST_BE: Mapping[str, tuple[object, ...]] = {
    "llama.rope.scaling.type": (None, "none"),
    "llama.rope.scaling.factor": (None, 0.0, 1.0),  # linear scaling if there is no type, as in llama.cpp
    "llama.rope.scale_linear": (None, 0.0, 1.0),
    "tokenizer.ggml.add_bos_token": (None, False),
    "tokenizer.ggml.add_eos_token": (None, False),
}
"""Fields that can change the result, and the values with which they don't change it."""
_CONTROL = 3  # the type of special tokens
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # Hugging Face's name: GGUF's name
_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


def open_gguf(file: Path) -> Checkpoint:
    """Open a GGUF file. This takes seconds, since the gguf package reads the vocabulary slowly. Raise StartupError
    if it isn't a GGUF file or isn't supported."""
    from gguf import GGUFReader  # only for a conversion

    try:
        reader = GGUFReader(file)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # the gguf package raises errors of many types
        raise StartupError(f"{file.name} can't be read as GGUF: {error!r}"[:300]) from error
    if reader.byte_order == "S":  # the package doesn't swap bytes within blocks
        raise StartupError(f"{file.name}: its bytes are in another order than this machine's")
    for key, read in _READ.items():
        if (found := fields.get(key)) != read:
            raise StartupError(
                f"{file.name}: {key} is {found}, and only {read} is read: name its Hugging Face directory instead"
            )
    refused = [f"{key} is {fields[key]}" for key, allowed in _MUST_BE.items() if fields.get(key) not in allowed]
    if refused:
        raise StartupError(f"{file.name} asks for what is not supported: {', '.join(refused)}")
    try:
        return _checkpoint(reader, fields)
    except KeyError as error:
        raise StartupError(f"{file.name} has no {error.args[0]}") from error
    except Exception as error:  # inconsistent fields lead to errors of many types
        if is_out_of_memory(error):
            raise
        raise StartupError(f"{file.name} contradicts itself: {error}"[:300]) from error


def _checkpoint(reader: "GGUFReader", fields: Mapping[str, Any]) -> Checkpoint:
    """Return the checkpoint. Raise KeyError, with the field's name, if a field is missing."""
    config = _config(fields, is_tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    tokenizer = _tokenizer(fields)
    tensors, quantized = {}, {}
    for tensor in reader.tensors:
        name, rows = _name(tensor.name), np.array(tensor.data)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = _halves(rows, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        shape = tuple(int(size) for size in reversed(tensor.shape))
        tensors[name] = StoredTensor(shape, torch.bfloat16, partial(_values, rows, tensor.tensor_type))
        if (kind := tensor.tensor_type.name) in BLOCK_BYTES:
            quantized[name] = Quantized(kind, torch.from_numpy(rows))
    ends = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = {**ends, "transformers_version": config["transformers_version"]}
    return Checkpoint(config, generation, tokenizer, tensors, quantized)


def _config(fields: Mapping[str, Any], *, is_tied: bool) -> dict[str, Any]:
    """Return the content of config.json. Raise KeyError, with the field's name, if a field is missing."""
    from transformers import LlamaConfig

    special: dict[str, Any] = {  # None if the file has none
        f"{name}_token_id": fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()
    }
    config = LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        # The file has a single-precision number: 9.99999974e-06 is 1e-05.
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_theta": fields["llama.rope.freq_base"], "rope_type": "default"},
        tie_word_embeddings=is_tied,
        **special,
    )
    return {**config.to_diff_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}


def _tokenizer(fields: Mapping[str, Any]) -> "PreTrainedTokenizerBase":
    """Return a tokenizer with the file's vocabulary, merges, special tokens and chat template, and with SmolLM2's
    pre-tokenizer. The template and all special tokens but the end token are optional. Raise KeyError, with the
    field's name, if a required field is missing."""
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    backend = {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": tokens[index], **plain}
            for index, kind in enumerate(fields["tokenizer.ggml.token_type"])
            if kind == _CONTROL
        ],
        "pre_tokenizer": PRE_TOKENIZER,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }
    special = {
        name: key for name, key in _SPECIAL.items() if name == "eos" or f"tokenizer.ggml.{key}_token_id" in fields
    }
    make = cast("Callable[..., PreTrainedTokenizerBase]", PreTrainedTokenizerFast)  # untyped in transformers
    return make(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        **{f"{name}_token": _token(fields, f"tokenizer.ggml.{key}_token_id") for name, key in special.items()},
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def _token(fields: Mapping[str, Any], name: str) -> str:
    """Return the token whose id is in a field. Raise IndexError, naming the field, if there is no such token."""
    tokens, index = fields["tokenizer.ggml.tokens"], fields[name]
    if not 0 <= index < len(tokens):
        raise IndexError(f"{name} is {index} of {len(tokens)} tokens")
    return str(tokens[index])


def _name(name: str) -> str:
    """Return Hugging Face's name of a tensor. An unknown tensor keeps its name, and the conversion refuses it."""
    stem, _, end = name.rpartition(".")
    if stem == "output":
        return f"lm_head.{end}"
    if layer := _LAYER.fullmatch(stem):
        return f"model.layers.{layer[1]}.{_NAMES.get(layer[2], layer[2])}.{end}"
    return f"model.{_NAMES[stem]}.{end}" if stem in _NAMES else name


def _halves(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Return rows (heads · dim, ·) in Hugging Face's order instead of llama.cpp's.

    For the rotation, Hugging Face pairs a feature of a head's first half with one of its second half. llama.cpp
    pairs neighbouring features.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _values(rows: npt.NDArray[Any], kind: "GGMLQuantizationType") -> torch.Tensor:
    """Return the weights of rows of a ggml type, rounded to bf16. Raise StartupError if the type isn't
    supported."""
    from gguf.quants import dequantize

    try:
        values = dequantize(rows, kind)
    except NotImplementedError as error:
        raise StartupError(f"weights that a GGUF file stores as {kind.name} are not read") from error
    return torch.from_numpy(np.asarray(values, np.float32)).to(torch.bfloat16)
