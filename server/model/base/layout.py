"""Which Hugging Face tensors are stacked into which tensor of a converted base."""

from collections.abc import Iterator
from dataclasses import dataclass

from server.model.base.config import ModelConfig


@dataclass(frozen=True)
class Part:
    """A tensor under its Hugging Face name."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stack:
    """A tensor of the converted file: its parts one after the other along the first dimension."""

    name: str
    parts: tuple[Part, ...]

    @property
    def rows(self) -> list[int]:
        return [part.shape[0] for part in self.parts]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(self.rows), *self.parts[0].shape[1:])


def layout(config: ModelConfig) -> Iterator[Stack]:
    """Every tensor of a base, in the order of the converted file. A tied head has no entry."""
    embedding = (config.vocab_size, config.hidden_size)
    norm = (config.hidden_size,)
    yield _stack("embed", ("model.embed_tokens", embedding))
    for index in range(config.num_layers):
        modules = {
            name: f"model.layers.{index}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        modules |= {name: f"model.layers.{index}.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
        linear = {name: (path, config.shape.features[name]) for name, path in modules.items()}
        yield _stack(f"layers.{index}.input_norm", (f"model.layers.{index}.input_layernorm", norm))
        yield _stack(f"layers.{index}.qkv", linear["q_proj"], linear["k_proj"], linear["v_proj"])
        yield _stack(f"layers.{index}.o", linear["o_proj"])
        yield _stack(f"layers.{index}.post_norm", (f"model.layers.{index}.post_attention_layernorm", norm))
        yield _stack(f"layers.{index}.gate_up", linear["gate_proj"], linear["up_proj"])
        yield _stack(f"layers.{index}.down", linear["down_proj"])
    yield _stack("final_norm", ("model.norm", norm))
    if not config.tie_word_embeddings:
        yield _stack("lm_head", ("lm_head", embedding))


def _stack(name: str, *modules: tuple[str, tuple[int, ...]]) -> Stack:
    return Stack(name, tuple(Part(f"{module}.weight", shape) for module, shape in modules))
