"""ModelConfig compared with transformers' reading of the same configs, and refusals."""

from collections.abc import Mapping

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, SmolLM3Config

from server.errors import StartupError
from server.model.base.config import ModelConfig

LLAMA: Mapping[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "max_position_embeddings": 77,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_theta": 5000.0,
    "rope_scaling": None,
}
SMOLLM3 = {**LLAMA, "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "num_hidden_layers": 9}
SMOLLM3 |= {"pad_token_id": 0}


def test_the_older_and_the_newer_spelling_of_rope_are_one() -> None:
    newer = {key: value for key, value in LLAMA.items() if not key.startswith("rope_")}
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    older = ModelConfig.of(LLAMA, {}, None)
    assert older == ModelConfig.of(newer, {}, None)
    assert older.rope_theta == 5000.0
    assert (older.q_size, older.kv_size) == (120, 24)


def test_sizes_left_out_are_transformers_defaults() -> None:
    optional = ("head_dim", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "rope_theta")
    raw = {key: value for key, value in LLAMA.items() if key not in (*optional, "tie_word_embeddings")}
    config, reference = ModelConfig.of(raw, {}, None), LlamaConfig(hidden_size=40, num_attention_heads=5)
    assert (config.head_dim, config.num_kv_heads) == (8, 5)
    assert config.rms_norm_eps == reference.rms_norm_eps
    assert config.max_position_embeddings == reference.max_position_embeddings
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    assert reference.rope_parameters is not None
    assert config.rope_theta == reference.rope_parameters["rope_theta"]


def test_the_shape_is_that_of_the_modules_transformers_builds() -> None:
    layer = LlamaForCausalLM(LlamaConfig.from_dict(dict(LLAMA))).model.layers[1]
    built = {
        name.rsplit(".", 1)[1]: tuple(module.weight.shape)
        for name, module in layer.named_modules()
        if name.endswith("_proj")
    }
    shape = ModelConfig.of(LLAMA, {}, None).shape
    assert shape.num_layers == 2
    assert dict(shape.features) == built


@pytest.mark.parametrize("options", [{}, {"no_rope_layer_interval": 3}, {"no_rope_layers": [1, 0] * 4 + [1]}])
def test_smollm3_layers_without_rotation(options: Mapping[str, object]) -> None:
    raw = {**SMOLLM3, **options}
    uses_rope = SmolLM3Config.from_dict(dict(raw)).no_rope_layers  # 1: the layer rotates
    assert uses_rope is not None
    expected = {index for index, rotates in enumerate(uses_rope) if rotates == 0}
    assert expected
    assert ModelConfig.of(raw, {}, None).nope_layers == expected
    assert ModelConfig.of(LLAMA, {}, None).nope_layers == frozenset()


@pytest.mark.parametrize(
    ("generation", "tokenizer_eos", "expected"),
    [
        ({}, None, (2,)),
        ({"eos_token_id": 7}, None, (7,)),  # generation_config wins, as in transformers
        ({"eos_token_id": [9, 7]}, 2, (2, 7, 9)),
        ({"eos_token_id": 2}, 2, (2,)),
        ({"eos_token_id": -1}, 2, (2,)),  # not a token id: grammars couldn't be compiled
        ({"eos_token_id": [7, 131]}, None, (7,)),
    ],
)
def test_end_tokens(
    generation: Mapping[str, object], tokenizer_eos: int | None, expected: tuple[int, ...]
) -> None:
    assert ModelConfig.of(LLAMA, generation, tokenizer_eos).eos_token_ids == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, "Qwen3ForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "granite"}, "granite"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}}, "rope_type='dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
        ({"num_key_value_heads": 2}, "5 heads can't share 2"),
        ({"hidden_size": "forty"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ],
)
def test_unsupported_architectures_are_refused_by_name(change: Mapping[str, object], named: str) -> None:
    with pytest.raises(StartupError) as refusal:
        ModelConfig.of({**LLAMA, **change}, {}, None)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_sliding_windows_are_refused() -> None:
    with pytest.raises(StartupError, match="use_sliding_window=True"):
        ModelConfig.of({**SMOLLM3, "use_sliding_window": True, "sliding_window": 16}, {}, None)


def test_every_option_at_fault_is_named_at_once() -> None:
    with pytest.raises(StartupError, match=r"attention_bias=True.*mlp_bias=True"):
        ModelConfig.of({**LLAMA, "attention_bias": True, "mlp_bias": True}, {}, None)
