"""A base model's sizes and constants, from a Hugging Face config.

`ModelConfig` has everything that the forward pass and adapters need to know about a base. `ModelConfig.of`
refuses every architecture and option that the forward pass doesn't compute exactly, and names it in the error.
transformers' configuration classes resolve defaults and older spellings.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from adapters.lora import BaseShape
from server.errors import StartupError

ARCHITECTURES = {"LlamaForCausalLM": "llama", "SmolLM3ForCausalLM": "smollm3"}
"""Each architecture that the forward pass computes, and its `model_type`."""

_MUST_BE: Mapping[str, tuple[object, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "hidden_act": ("silu",),
    "use_sliding_window": (None, False),
    "pretraining_tp": (None, 1),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
}
"""Options that can change the result, and the values with which they don't change it."""


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a Llama-shaped decoder. `head_dim` need not be hidden_size / num_heads."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    nope_layers: frozenset[int]  # layers whose queries and keys are not rotated
    eos_token_ids: tuple[int, ...]  # any of them ends a sequence

    @property
    def q_size(self) -> int:
        """The number of features of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """The number of features of all key heads, or of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def shape(self) -> BaseShape:
        """The shape that adapters must fit: the sizes (out, in) of every linear module."""
        hidden, inner = self.hidden_size, self.intermediate_size
        features = {
            "q_proj": (self.q_size, hidden),
            "k_proj": (self.kv_size, hidden),
            "v_proj": (self.kv_size, hidden),
            "o_proj": (hidden, self.q_size),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }
        return BaseShape(self.num_layers, features)

    @property
    def stored(self) -> dict[str, object]:
        """The config as JSON, for `from_stored`."""
        return dataclasses.asdict(self) | {"nope_layers": sorted(self.nope_layers)}

    @classmethod
    def from_stored(cls, stored: object) -> "ModelConfig | None":
        """Return the config that `stored` describes, or None if its fields differ from this class's."""
        if not isinstance(stored, dict) or stored.keys() != {field.name for field in dataclasses.fields(cls)}:
            return None
        tuples = {"nope_layers": frozenset(stored["nope_layers"]), "eos_token_ids": tuple(stored["eos_token_ids"])}
        return cls(**{**stored, **tuples})

    @classmethod
    def of(
        cls, raw: Mapping[str, object], generation: Mapping[str, object], tokenizer_eos: int | None
    ) -> "ModelConfig":
        """Return the config for a parsed config.json, generation_config.json (may be empty) and the tokenizer's
        end token.

        Raise StartupError, naming the architecture or every option that isn't supported.
        """
        from transformers import LlamaConfig, SmolLM3Config  # takes a second, so only for a conversion

        architecture = _architecture(raw)
        known = LlamaConfig if architecture == "LlamaForCausalLM" else SmolLM3Config
        try:
            fields: Mapping[str, object] = known.from_dict(dict(raw)).to_dict()
        except Exception as error:  # transformers' validation raises errors of many types
            raise StartupError(
                f"config.json is not a valid {architecture} config: {_first_line(error)}"
            ) from error
        rope = fields.get("rope_parameters")
        rope = rope if isinstance(rope, Mapping) else {}
        _refuse_options(raw, fields, rope)

        num_layers = _int(fields, "num_hidden_layers")
        num_heads = _int(fields, "num_attention_heads")
        num_kv_heads = _int(fields, "num_key_value_heads")
        hidden_size = _int(fields, "hidden_size")
        head_dim = fields.get("head_dim") or hidden_size // num_heads
        if num_heads % num_kv_heads:
            raise StartupError(f"config.json: {num_heads} heads can't share {num_kv_heads} key-value heads")
        return cls(
            architecture=architecture,
            vocab_size=_int(fields, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_int(fields, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_int({"head_dim": head_dim}, "head_dim"),
            rms_norm_eps=_float(fields, "rms_norm_eps"),
            rope_theta=_float(rope, "rope_theta"),
            tie_word_embeddings=fields.get("tie_word_embeddings") is True,
            max_position_embeddings=_int(fields, "max_position_embeddings"),
            nope_layers=_nope_layers(fields.get("no_rope_layers"), num_layers),
            eos_token_ids=_eos_token_ids(
                _int(fields, "vocab_size"),
                generation.get("eos_token_id", fields.get("eos_token_id")),
                tokenizer_eos,
            ),
        )


def _architecture(raw: Mapping[str, object]) -> str:
    listed, model_type = raw.get("architectures"), raw.get("model_type")
    if isinstance(listed, list) and listed:
        name = str(listed[0])
    else:  # a config that was saved without its model has only the type
        name = next((known for known, kind in ARCHITECTURES.items() if kind == model_type), str(model_type))
    if name not in ARCHITECTURES or model_type not in (None, ARCHITECTURES[name]):
        found = name if name not in ARCHITECTURES else f"{name} with model_type {model_type!r}"
        raise StartupError(f"the architecture {found} is not supported, only {' and '.join(ARCHITECTURES)} are")
    return name


def _refuse_options(
    raw: Mapping[str, object], fields: Mapping[str, object], rope: Mapping[object, object]
) -> None:
    """Raise StartupError, naming every option that the forward pass doesn't compute."""
    refused = [
        f"{key}={_short(value)}"
        for key, allowed in _MUST_BE.items()
        if (value := fields.get(key, raw.get(key))) not in allowed
    ]
    if (rope_type := rope.get("rope_type")) != "default":
        refused.append(f"rope_type={_short(rope_type)}")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        refused.append(f"partial_rotary_factor={_short(rope['partial_rotary_factor'])}")
    layer_types = fields.get("layer_types")
    if isinstance(layer_types, list) and (others := {*layer_types} - {"full_attention"}):
        refused.append(f"layer_types={_short(sorted(map(str, others)))}")
    if refused:
        raise StartupError(f"config.json asks for what is not supported: {', '.join(refused)}")


def _nope_layers(no_rope_layers: object, num_layers: int) -> frozenset[int]:
    """Return the layers without rotary embedding. SmolLM3's list has a 1 for layers that rotate; Llama has no
    list."""
    if no_rope_layers is None:
        return frozenset()
    if not isinstance(no_rope_layers, list) or len(no_rope_layers) < num_layers:
        raise StartupError(f"config.json: no_rope_layers needs an entry for each of the {num_layers} layers")
    return frozenset(layer for layer in range(num_layers) if not no_rope_layers[layer])


def _eos_token_ids(vocab_size: int, *sources: object) -> tuple[int, ...]:
    """Return the end tokens of all sources, in ascending order and without duplicates. Ids outside the vocabulary,
    such as -1 for none, are left out."""
    found: set[int] = set()
    for source in sources:
        ids = source if isinstance(source, list) else [source]
        found.update(token for token in ids if isinstance(token, int) and 0 <= token < vocab_size)
    return tuple(sorted(found))


def _int(fields: Mapping[str, object], key: str) -> int:
    value = fields.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise StartupError(f"config.json: {key} must be a positive integer, not {_short(value)}")
    return value


def _float(fields: Mapping[object, object] | Mapping[str, object], key: str) -> float:
    value = dict(fields).get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise StartupError(f"config.json: {key} must be a positive number, not {_short(value)}")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
