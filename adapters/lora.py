"""LoRA weights as plain values.

An adapter adds `scaling * B(A x)` to the output of each linear module that it targets, with A of shape
(r, in), B of shape (out, r), and scaling alpha/r (Hu et al. 2021, arXiv:2106.09685, section 4.1) or
alpha/sqrt(r) (rsLoRA: Kalajdzievski 2023, arXiv:2312.03732). The frozen weight W itself never changes.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch  # importing torch takes a second, and users of names and settings don't need it

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear modules of a Llama layer, in the order of the forward pass."""

ATTENTION = MODULES[:4]
"""The modules of the attention block; the others are in the MLP."""


class ModuleKey(NamedTuple):
    """One linear module of the base: its layer, counted from 0, and its name in `MODULES`."""

    layer: int
    module: str

    @property
    def path(self) -> str:
        """The module's path in Hugging Face's model, such as "model.layers.3.self_attn.q_proj"."""
        block = "self_attn" if self.module in ATTENTION else "mlp"
        return f"model.layers.{self.layer}.{block}.{self.module}"


@dataclass(frozen=True)
class BaseShape:
    """The base's shape, which adapters must fit: the number of layers, and each module's (out, in) features."""

    num_layers: int
    features: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class LoraConfig:
    """The modules that an adapter targets, with the rank and alpha of each.

    A target is a name in `MODULES`, which applies to all `layers_to_transform` (None: to every layer), or the
    `ModuleKey.path` of one module. `rank_pattern` and `alpha_pattern` override `rank` and `alpha`; their keys are
    also names or paths.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] = MODULES
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for pattern in (self.rank_pattern, self.alpha_pattern):
            # PEFT takes the first key that matches: with both a name and its path, the order would matter
            if any(key.rpartition(".")[2] in pattern for key in pattern if "." in key):
                raise ValueError("a pattern names a module by its name or by its path, not by both")

    def to_document(self) -> dict[str, object]:
        """Return the configuration as a JSON-ready document, which is stored with an adapter's version."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def targets(self, key: ModuleKey) -> bool:
        if key.path in self.target_modules:
            return True
        in_layers = self.layers_to_transform is None or key.layer in self.layers_to_transform
        return in_layers and key.module in self.target_modules

    def rank_of(self, key: ModuleKey) -> int:
        return self.rank_pattern.get(key.path, self.rank_pattern.get(key.module, self.rank))

    def alpha_of(self, key: ModuleKey) -> float:
        return self.alpha_pattern.get(key.path, self.alpha_pattern.get(key.module, self.alpha))

    def scaling_of(self, key: ModuleKey) -> float:
        return scaling(self.alpha_of(key), self.rank_of(key), self.use_rslora)


@dataclass(frozen=True, eq=False)
class LoraModule:
    """The adapter of one linear module: `scaling * b @ (a @ x)`."""

    a: "torch.Tensor"  # (r, in)
    b: "torch.Tensor"  # (out, r)
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """An adapter's weights, by module. Never write to the tensors: they may be mapped from a file."""

    modules: Mapping[ModuleKey, LoraModule]

    @property
    def max_rank(self) -> int:
        return max((module.rank for module in self.modules.values()), default=0)

    @property
    def ranks(self) -> dict[ModuleKey, int]:
        return {key: module.rank for key, module in self.modules.items()}

    @property
    def num_parameters(self) -> int:
        return sum(module.a.numel() + module.b.numel() for module in self.modules.values())

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The names of the modules that have weights in at least one layer, in the order of `MODULES`."""
        present = {key.module for key in self.modules}
        return tuple(name for name in MODULES if name in present)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 (hex) of each module's layer, name, scaling, dtypes, shapes and tensor bytes.

        The adapter's name and date are left out, so that adapters with equal weights have equal digests.
        """
        import torch

        sha = hashlib.sha256(b"smolora-lora-v1")
        for key in sorted(self.modules):
            module = self.modules[key]
            header = f"{key.layer}|{key.module}|{module.scaling.hex()}|{module.a.dtype}|{module.b.dtype}"
            sha.update(f"{header}|{tuple(module.a.shape)}|{tuple(module.b.shape)}".encode())
            for tensor in (module.a, module.b):
                sha.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data)
        return sha.hexdigest()


class AdapterRef(NamedTuple):
    """A stored adapter, identified by its digest, with the factor by which its update is multiplied."""

    digest: str
    weight: float = 1.0


def scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """Return the factor on B(A x): alpha/r, or alpha/sqrt(r) for rank-stabilized LoRA."""
    return float(alpha) / (float(rank) ** 0.5 if use_rslora else float(rank))
