"""Conversion of a Hugging Face Llama and its PEFT adapters to GGUF files in bf16, for llama.cpp.

The weights stay the same; only their layout changes. llama.cpp rotates pairs of neighbouring dimensions,
transformers rotates the two halves of a head, so the rows of queries and keys are permuted. Norms are fp32, as
written by llama.cpp's own converter. SmolLM and SmolLM2 are Llamas; other architectures are refused.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open

ARCHITECTURE = "llama"
SPLITTING = "smollm"
"""llama.cpp's name of the pre-tokenizer: digits apart, then as GPT-2."""

MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
NAMES = ("lora_A", "lora_B")


def write_base(directory: Path, file: Path) -> None:
    """Write the model in `directory`, a single safetensors file, to `file`. Raise ValueError if it isn't a
    Llama."""
    config = _config(directory)
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    _write_sizes(writer, config)
    _write_tokenizer(writer, directory, config)
    with safe_open(directory / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no mapping
            _add(writer, _gguf_name(name), _permuted(name, tensors.get_tensor(name), config))
    _finish(writer)


def write_adapter(base: Path, directory: Path, file: Path) -> None:
    """Write the PEFT adapter in `directory`, for the model in `base`, to `file`."""
    config = _config(base)
    described = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(described["lora_alpha"]))
    with safe_open(directory / "adapter_model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no mapping
            module, which = _parts(name)
            tensor = tensors.get_tensor(name)
            if which == "lora_B":  # the rows of B are the module's outputs
                tensor = _permuted(module, tensor, config)
            _add(writer, f"{_gguf_name(module)}.{which.lower()}", tensor)
    _finish(writer)


def _config(directory: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != ARCHITECTURE:
        raise ValueError(f"{directory.name} is a {config['model_type']}, not a {ARCHITECTURE}")
    return config


def _write_sizes(writer: gguf.GGUFWriter, config: dict[str, object]) -> None:
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    head_dim = _number(config, "head_dim") if config.get("head_dim") else hidden // heads
    rope = config.get("rope_parameters") or config
    assert isinstance(rope, dict)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(_number(config, "max_position_embeddings"))
    writer.add_embedding_length(hidden)
    writer.add_block_count(_number(config, "num_hidden_layers"))
    writer.add_feed_forward_length(_number(config, "intermediate_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(_number(config, "num_key_value_heads"))
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(str(config["rms_norm_eps"])))
    writer.add_vocab_size(_number(config, "vocab_size"))


def _write_tokenizer(writer: gguf.GGUFWriter, directory: Path, config: dict[str, object]) -> None:
    document = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    added = {int(token["id"]): token for token in document["added_tokens"]}
    by_id = {number: token for token, number in document["model"]["vocab"].items()}
    by_id |= {number: token["content"] for number, token in added.items()}
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(_number(config, "vocab_size"))]
    special = {number for number, token in added.items() if token["special"]}
    kinds = [
        gguf.TokenType.CONTROL
        if number in special
        else gguf.TokenType.USER_DEFINED
        if number in added
        else gguf.TokenType.NORMAL
        if number in by_id
        else gguf.TokenType.UNUSED
        for number in range(len(tokens))
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(SPLITTING)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(_number(config, "bos_token_id"))
    writer.add_eos_token_id(_number(config, "eos_token_id"))
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def _gguf_name(name: str) -> str:
    """Return the GGUF name of a transformers tensor, such as model.layers.0.mlp.up_proj.weight."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{int(layer)}.{MODULES[rest.removesuffix('.weight')]}.weight"


def _parts(name: str) -> tuple[str, str]:
    """Split a PEFT tensor's name into its module's weight, by transformers' name, and lora_A or lora_B."""
    path, which, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
    assert which in NAMES, name
    return f"{path}.weight", which


def _permuted(name: str, tensor: torch.Tensor, config: dict[str, object]) -> torch.Tensor:
    """Permute rows of queries and keys from (heads, 2, half, …) to llama.cpp's (heads, half, 2, …); keep other
    modules."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    if (key := heads.get(name.split(".")[-2])) is None:
        return tensor
    number = _number(config, key)
    halves = tensor.reshape(number, 2, tensor.shape[0] // number // 2, tensor.shape[1])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    """Add a tensor: matrices in bf16, rounded to nearest; vectors in fp32."""
    if tensor.dim() == 1:
        writer.add_tensor(name, tensor.float().numpy())
        return
    raw = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint8)
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _number(config: dict[str, object], key: str) -> int:
    value = config[key]
    assert isinstance(value, int)
    return value
