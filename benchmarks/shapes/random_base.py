"""GGUF files of Llamas with random weights, stored like the embedded base, to measure the speed of a size.

Matrices are Q4_1, the embedding is Q8_0. All blocks have the same scale, so that weights are uniform with the
usual standard deviation of initial weights. Everything except the sizes is copied from the embedded base.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from server.model.base.source import find_gguf

SIGMA = 0.02
HEAD_DIM = 64
BLOCK = 32  # weights
CONTEXT = 2048  # maximum tokens of a request

Draw = np.random.Generator
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Shape:
    """Sizes of a SmolLM2 from its config.json, with tied embeddings."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    rope_theta: float

    def fields(self) -> dict[str, int | float]:
        """The GGUF fields that differ between sizes."""
        return {
            "llama.block_count": self.layers,
            "llama.context_length": CONTEXT,
            "llama.embedding_length": self.hidden,
            "llama.feed_forward_length": self.inner,
            "llama.attention.head_count": self.heads,
            "llama.attention.head_count_kv": self.kv_heads,
            "llama.rope.freq_base": self.rope_theta,
            "llama.rope.dimension_count": HEAD_DIM,
        }

    def matrices(self) -> Iterator[tuple[str, int, int]]:
        """The name, outputs and inputs of each matrix in a layer."""
        queries, keys = self.heads * HEAD_DIM, self.kv_heads * HEAD_DIM
        yield "attn_q", queries, self.hidden
        yield "attn_k", keys, self.hidden
        yield "attn_v", keys, self.hidden
        yield "attn_output", self.hidden, queries
        yield "ffn_gate", self.inner, self.hidden
        yield "ffn_up", self.inner, self.hidden
        yield "ffn_down", self.hidden, self.inner


SHAPES = {
    "360M": Shape(960, 2560, 32, 15, 5, 100_000.0),
    "1.7B": Shape(2048, 8192, 24, 32, 32, 130_000.0),
}


def write_random_base(file: Path, shape: Shape, seed: int = 0) -> Path:
    """Write a random base to `file`; return it. Raise StartupError if there is no embedded base."""
    draw = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(file, "llama")
    embedded = gguf.GGUFReader(find_gguf())
    vocab = 0
    sizes = shape.fields()
    for key, field in embedded.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = sizes.get(key, field.contents())
            vocab = len(value) if key == "tokenizer.ggml.tokens" else vocab
            writer.add_key_value(key, value, field.types[0], field.types[-1])
    _add(writer, "token_embd", _q8_0(draw, vocab, shape.hidden), gguf.GGMLQuantizationType.Q8_0)
    norm = np.ones(shape.hidden, np.float32)
    writer.add_tensor("output_norm.weight", norm)
    for layer in range(shape.layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", norm)
        for name, outputs, inputs in shape.matrices():
            _add(writer, f"blk.{layer}.{name}", _q4_1(draw, outputs, inputs), gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: gguf.GGUFWriter, name: str, rows: Bytes, kind: gguf.GGMLQuantizationType) -> None:
    writer.add_tensor(f"{name}.weight", rows, raw_dtype=kind)


def _q4_1(draw: Draw, outputs: int, inputs: int) -> Bytes:
    """Return rows (outputs, bytes) of blocks: a scale, the least value and 32 numbers from 0 to 15."""
    scale = SIGMA / np.std(np.arange(16))
    return _blocks(draw, outputs, inputs, BLOCK // 2, [scale, -7.5 * scale])


def _q8_0(draw: Draw, outputs: int, inputs: int) -> Bytes:
    """Return rows (outputs, bytes) of blocks: a scale and 32 signed bytes."""
    return _blocks(draw, outputs, inputs, BLOCK, [SIGMA / np.std(np.arange(256))])


def _blocks(draw: Draw, outputs: int, inputs: int, size: int, head: list[Any]) -> Bytes:
    constants = np.array(head, np.float16).view(np.uint8)
    blocks = np.empty((outputs, inputs // BLOCK, constants.size + size), np.uint8)
    blocks[..., : constants.size] = constants
    blocks[..., constants.size :] = draw.integers(0, 256, (*blocks.shape[:2], size), np.uint8)
    return blocks.reshape(outputs, -1)
