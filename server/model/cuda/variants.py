"""What is compiled for a base: each kernel with its constants, by the name of its place in a step.

Nothing is tuned by measuring, since a block of another size could change the order of a sum. A block of K is the
same for the tall and the short form of a product, so a row's bits don't depend on the batch's size.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from server.model.base.config import ModelConfig
from server.model.cuda.attention import SPLIT, attention_combine, attention_split
from server.model.cuda.linear import linear
from server.model.cuda.lists import place_lists
from server.model.cuda.lora import TILE, lora_expand, lora_shrink
from server.model.cuda.rows import rms_norm, rotary_write, swiglu
from server.model.cuda.sampling import gumbel_argmax
from server.model.rank_rows import GROUPS, GroupLayout

BLOCK_K = 64


class Kernel(Protocol):
    """A function that Triton compiles."""

    __name__: str
    arg_names: list[str]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        """Return the function that launches a grid of programs."""
        ...


@dataclass(frozen=True)
class Variant:
    """A kernel with constants. `types` are those of its tensors: "T" is the base's dtype."""

    kernel: Kernel
    types: tuple[str, ...]
    constants: Mapping[str, int | float | bool]
    num_warps: int = 4
    num_stages: int = 3

    @property
    def options(self) -> dict[str, int | bool]:
        """Triton's options. Fusing products with sums changes the rounding, and its default differs by version."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def why_not(config: ModelConfig) -> str | None:
    """Return why the kernels can't serve a base, or None if they can."""
    sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    sizes |= {"q_size": config.q_size, "2 · kv_size": 2 * config.kv_size}
    for name, size in sizes.items():
        if size % BLOCK_K:
            return f"{name} {size} is no multiple of {BLOCK_K}"
    if config.head_dim not in (32, 64, 128):
        return f"head_dim {config.head_dim} is not 32, 64 or 128"
    if config.num_heads > TILE * config.num_kv_heads:
        return f"more than {TILE} query heads share a key head"
    if config.vocab_size % 64:
        return f"vocab_size {config.vocab_size} is no multiple of 64"
    return None


def launch(variant: Variant, grid: tuple[int, ...], tensors: Sequence[torch.Tensor]) -> None:
    """Launch a kernel on the GPU of the tensors. They must begin at multiples of 16 bytes, as torch's own do."""
    variant.kernel[grid](*tensors, **variant.constants, **variant.options)


def variants(config: ModelConfig, page: int) -> dict[str, Variant]:
    """Return every variant for a base, with pages of `page` positions."""
    return dict(_variants(config, page))


def _variants(config: ModelConfig, page: int) -> Iterator[tuple[str, Variant]]:
    heads: dict[str, int | float] = {"HEADS": config.num_heads, "KV_HEADS": config.num_kv_heads}
    dim = {"DIM": config.head_dim}
    hidden, inner = config.hidden_size, config.intermediate_size
    products = {
        "qkv": (config.q_size + 2 * config.kv_size, hidden, False),
        "o": (hidden, config.q_size, True),
        "gate_up": (2 * inner, hidden, False),
        "down": (hidden, inner, True),
        "head": (config.vocab_size, hidden, False),
    }
    for name, (out, inputs, has_residual) in products.items():
        y = "fp32" if name == "head" else "T"
        for is_tall in (False, True):
            block_n = 64 if is_tall else 16 if out < 2048 else 32 if out < 8192 else 64
            yield (
                f"linear {name}, {'tall' if is_tall else 'short'}",
                Variant(
                    linear,
                    ("T", "T", "T", y, "i32"),
                    {
                        "N": out,
                        "K": inputs,
                        "HAS_RESIDUAL": has_residual,
                        "IS_TALL": is_tall,
                        "BLOCK_N": block_n,
                        "BLOCK_K": BLOCK_K,
                    },
                    8 if is_tall else 4,
                ),
            )
    for group in GROUPS:
        layout = GroupLayout.of(group, config.shape)
        sizes = list(layout.out_features.values())
        starts = [sum(sizes[:i]) for i in range(1, len(sizes))]
        out = sum(sizes)
        shrink = {"K": layout.in_features, "BLOCK_K": BLOCK_K}
        yield f"lora_shrink {group}", Variant(lora_shrink, ("T", "T", "i32", "i32", "T"), shrink)
        expand = {
            "OUT": out,
            "OUT1": starts[0] if starts else out,
            "OUT2": starts[1] if len(starts) > 1 else out,
            "MODULES": len(sizes),
            "UNIT": layout.unit,
            "BLOCK_N": math.gcd(64, *sizes),
        }
        tensors = ("T", "T", "i32", "i32", "i32", "i32", "T")
        yield f"lora_expand {group}", Variant(lora_expand, tensors, expand, num_stages=2)
    scale = config.head_dim**-0.5 / math.log(2)
    pages: dict[str, int | float] = {"PAGE": page, "SPLIT": SPLIT, "BLOCK_N": 32}
    yield (
        "attention_split",
        Variant(
            attention_split,
            ("T", "T", "T", "i32", "i32", "i32", "fp32", "fp32"),
            {"SCALE": scale, **heads, **dim, **pages},
        ),
    )
    combine = {"HEADS": config.num_heads, **dim}
    yield "attention_combine", Variant(attention_combine, ("fp32", "fp32", "i32", "T"), combine, 1, 1)
    norm = {"EPS": config.rms_norm_eps, "D": hidden, "BLOCK": 1 << (hidden - 1).bit_length()}
    yield "rms_norm", Variant(rms_norm, ("T", "T", "T"), norm, 4, 1)
    for is_rotary in {index not in config.nope_layers for index in range(config.num_layers)}:
        types = ("T", "T", "T", "i32", "i32", "T", "T", "T")
        constants = {**heads, **dim, "IS_ROTARY": is_rotary}
        yield f"rotary_write{'' if is_rotary else ', not rotated'}", Variant(rotary_write, types, constants, 1, 1)
    yield "swiglu", Variant(swiglu, ("T", "T"), {"D": inner, "BLOCK": 1024}, 4, 1)
    draw = {"VOCAB": config.vocab_size, "BLOCK": 4096}
    yield "gumbel_argmax", Variant(gumbel_argmax, ("fp32", "i32", "i32"), draw, 8, 1)
    yield "place_lists", Variant(place_lists, ("i32", "i32"), {"BLOCK": 1024}, 4, 1)
