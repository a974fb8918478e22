"""Loads a converted base model: its frozen tensors in the layout of the forward pass, its tokenizer and its
digest.

Weights are mapped from the converted file, not copied, so processes that load the same base on a CPU share its
pages. Another dtype or device than the file's needs a copy. `server.model.base.source` finds the directory of a
base, and `server.model.base.convert` writes it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from server.errors import StartupError
from server.model.base.checkpoint import read_json
from server.model.base.config import ModelConfig
from server.model.base.quantized import Quantized, load_quantized
from server.model.device import room_for
from server.model.text.tokenizer import BaseTokenizer, require_byte_level

MANIFEST = "smolora.json"
WEIGHTS = "base.safetensors"
FORMAT = 1
"""The version of the converted layout. A directory of another version is converted again."""


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One decoder layer. Matrices are (out, in); matrices with the same input are stacked along `out`."""

    input_norm: torch.Tensor  # (hidden,)
    qkv: torch.Tensor  # (q + kv + kv, hidden)
    o: torch.Tensor  # (hidden, q)
    post_norm: torch.Tensor  # (hidden,)
    gate_up: torch.Tensor  # (2 * intermediate, hidden)
    down: torch.Tensor  # (hidden, intermediate)


LAYER_TENSORS = ("input_norm", "qkv", "o", "post_norm", "gate_up", "down")
"""The fields of `LayerWeights`, in the order of the file and of the forward pass."""


@dataclass(frozen=True, eq=False)
class BaseWeights:
    """Every tensor of a base. `lm_head` is `embed` if the base ties them."""

    embed: torch.Tensor  # (vocab, hidden)
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # (hidden,)
    lm_head: torch.Tensor  # (vocab, hidden)
    quantized: Mapping[str, Quantized] = field(default_factory=dict)  # the stored form of some tensors, by name

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each tensor once, with its name in the converted file."""
        yield "embed", self.embed
        for index, layer in enumerate(self.layers):
            for name in LAYER_TENSORS:
                yield f"layers.{index}.{name}", getattr(layer, name)
        yield "final_norm", self.final_norm
        if self.lm_head is not self.embed:
            yield "lm_head", self.lm_head

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for _, tensor in self.tensors())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors())


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A loaded base. `digest` identifies the stored weights and sizes, independent of the dtype in memory."""

    name: str
    directory: Path
    config: ModelConfig
    weights: BaseWeights
    tokenizer: BaseTokenizer
    digest: str  # SHA-256, hex

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.embed.device


@dataclass(frozen=True)
class Manifest:
    """The content of a converted directory's `smolora.json`."""

    format: int
    key: str  # the directory's name under HOME/models, even if it was moved elsewhere
    name: str
    digest: str
    origin: str  # the source directory or hub id
    revision: str | None  # the hub's commit
    config: ModelConfig


def read_manifest(directory: Path) -> Manifest | None:
    """Return the directory's manifest, or None if the directory isn't a converted base of this format."""
    if not (directory / MANIFEST).is_file():
        return None
    fields = read_json(directory / MANIFEST)
    config = ModelConfig.from_stored(fields.get("config"))
    if fields.get("format") != FORMAT or config is None:
        return None
    revision = fields.get("revision")
    return Manifest(
        format=FORMAT,
        key=str(fields.get("key")),
        name=str(fields.get("name")),
        digest=str(fields.get("digest")),
        origin=str(fields.get("origin")),
        revision=None if revision is None else str(revision),
        config=config,
    )


def load_base(directory: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> BaseModel:
    """Load a converted base. On a CPU, if `dtype` is None or the file's own, its tensors are views of the file.

    Views must not be written to: a write would change only a private copy of the page. Raise StartupError if
    the directory isn't a converted base or can't be read, or if the device has no room.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise StartupError(f"{directory.name} is not a converted base model")
    tokenizer = load_tokenizer(directory)
    with room_for("the base", torch.device(device)):
        weights = load_weights(directory, manifest.config, dtype, torch.device(device))
    return BaseModel(manifest.name, directory, manifest.config, weights, tokenizer, manifest.digest)


def load_tokenizer(directory: Path) -> BaseTokenizer:
    """Load a converted base's tokenizer. Raise StartupError if it can't be read or isn't byte-level."""
    template = directory / "chat_template.jinja"
    options = read_json(directory / "tokenizer_config.json")
    named = {name: token for name, token in options.items() if name.endswith("_token")}
    others = options.get("model_specific_special_tokens")  # their names may have other endings
    named |= others if isinstance(others, dict) else {}
    try:
        backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
        require_byte_level(directory.name, backend)  # an older version may have converted another one
        return BaseTokenizer(
            backend,
            special_tokens={name: token for name, token in named.items() if isinstance(token, str)},
            chat_template=template.read_text("utf-8") if template.is_file() else None,
        )
    except StartupError:
        raise
    except Exception as error:  # tokenizers raises plain Exceptions
        raise StartupError(f"{directory.name}: the tokenizer can't be read: {error!r}"[:300]) from error


def load_weights(
    directory: Path, config: ModelConfig, dtype: torch.dtype | None, device: torch.device
) -> BaseWeights:
    """Map a converted base's tensors, and convert them to a dtype (None: the file's) and a device."""
    try:
        with safe_open(directory / WEIGHTS, framework="pt") as file:

            def get(name: str) -> torch.Tensor:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor.to(device=device, dtype=dtype)  # the same tensor if nothing changes

            weights = _assemble(config, get)
        if weights.embed.dtype is not torch.bfloat16 or device.type != "cpu":
            return weights
        return replace(weights, quantized=load_quantized(directory))
    except (SafetensorError, OSError) as error:
        raise StartupError(f"the converted base in {directory.name} can't be read: {error}") from error


def _assemble(config: ModelConfig, get: Callable[[str], torch.Tensor]) -> BaseWeights:
    embed = get("embed")
    layers = [
        LayerWeights(*(get(f"layers.{index}.{name}") for name in LAYER_TENSORS))
        for index in range(config.num_layers)
    ]
    lm_head = embed if config.tie_word_embeddings else get("lm_head")
    return BaseWeights(embed, tuple(layers), get("final_norm"), lm_head)


def digest_of(config: ModelConfig, weights: BaseWeights) -> str:
    """Return the SHA-256 (hex) of the sizes and of every tensor's name, dtype, shape and bytes. This takes about
    1 s per GB."""
    sha = hashlib.sha256(b"smolora-base-v1" + json.dumps(config.stored, sort_keys=True).encode())
    for name, tensor in weights.tensors():
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
