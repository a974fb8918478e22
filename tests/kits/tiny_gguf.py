"""Tiny GGUF files of random weights, written by the gguf package."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter
from gguf.quants import dequantize, quantize

from tests.kits.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_tokenizer

CONTROL, NORMAL = 3, 1  # kinds of tokens
VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 512, 64, 96, 3, 4, 2, 32
EMBEDDED_TYPES: Mapping[str, str] = {"token_embd": "Q8_0", "": "Q4_1"}
"""Types of matrices, by the ends of their names, as the embedded base has them."""


def save_tiny_gguf(
    file: Path,
    types: Mapping[str, str] = EMBEDDED_TYPES,
    *,
    architecture: str = "llama",
    splitting: str = "smollm",
    is_tied: bool = True,
    heads: int = HEADS,
    eos_token_id: int = 2,
    is_chat: bool = True,
    fields: Mapping[str, bool | str | float] = MappingProxyType({}),
    endianess: GGUFEndian = GGUFEndian.LITTLE,
) -> dict[str, npt.NDArray[np.float32]]:
    """Write a file, with more `fields`. Return the values of its tensors by their GGUF names.

    Without `is_chat` it has no chat template, and no special token except the end.
    """
    writer = GGUFWriter(file, architecture, endianess=endianess)
    for key, value in fields.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_bool(key, value) if isinstance(value, bool) else writer.add_string(key, value)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(heads)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    model = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in SPECIAL_TOKENS else NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(eos_token_id)
    if is_chat:
        writer.add_bos_token_id(1)
        writer.add_pad_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_chat_template(CHAT_TEMPLATE)
    found = {}
    for name, values in _tensors(is_tied).items():
        kind = next((types[end] for end in types if end and name.endswith(f"{end}.weight")), types.get("", "F32"))
        kind = "F32" if values.ndim == 1 else kind
        stored = values.astype(np.float64) if kind == "F64" else quantize(values, GGMLQuantizationType[kind])
        writer.add_tensor(name, stored, raw_dtype=GGMLQuantizationType[kind])
        found[name] = values if kind == "F64" else _stands_for(stored, kind)  # which the package can't read
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def _tensors(is_tied: bool) -> dict[str, npt.NDArray[np.float32]]:
    kv = KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,)}
    if not is_tied:
        shapes["output"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_k": (kv, HIDDEN),
            f"blk.{layer}.attn_v": (kv, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_gate": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_up": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, INTERMEDIATE),
        }
    random = np.random.default_rng(0)

    def values(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        drawn = random.normal(size=shape)
        return (0.15 * drawn if len(shape) > 1 else 1 + 0.2 * drawn).astype(np.float32)

    return {f"{name}.weight": values(shape) for name, shape in shapes.items()}


def _stands_for(stored: npt.NDArray[np.generic], kind: str) -> npt.NDArray[np.float32]:
    return np.asarray(dequantize(stored, GGMLQuantizationType[kind]), np.float32)
