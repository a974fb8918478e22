"""Where an adapter starts: A and B before the first step, from the seed and the base's weights alone.

    gaussian  A ~ N(0, σ²) with σ = 1/r, B = 0
    kaiming   A ~ U(-1/√in, 1/√in), B = 0: PEFT's default (He et al. 2015, arXiv:1502.01852, with a = √5)
    pissa     scaling · B A is the best approximation of W of rank r (Meng et al. 2024, arXiv:2404.02948)
    olora     B and A are the first r columns and rows of W = Q R (Büyükakyüz 2024, arXiv:2406.01775)

The last two take that share off again by frozen rows, so that W stays as it is and the first step starts at the
base: see `trained_rows`. Each module draws from a stream of its own, so that nothing depends on their order.
"""

import math
from collections.abc import Callable

import torch

from adapters.lora import LoraConfig, LoraModule, LoraWeights, ModuleKey
from server.model.base.weights import BaseModel
from server.model.row_layout import GROUPS
from server.training.passes.streams import stream
from server.training.spec import Init, LoraSpec

TAKEN_OFF: frozenset[Init] = frozenset({"pissa", "olora"})
"""What starts with a share of W, and is published with twice the rank."""


def adapter_config(spec: LoraSpec) -> LoraConfig:
    """What is published: ordinary LoRA, of twice the rank and the same scaling where a share of W is taken off."""
    rank, alpha = spec.rank, float(spec.alpha)
    if spec.init in TAKEN_OFF:
        rank, alpha = 2 * rank, alpha * (math.sqrt(2) if spec.use_rslora else 2)
    return LoraConfig(rank, alpha, spec.target_modules, spec.use_rslora)


def initial_weights(
    spec: LoraSpec, base: BaseModel, seed: int, yield_or_leave: Callable[[], None] = lambda: None
) -> tuple[LoraWeights, LoraWeights | None]:
    """A and B of every targeted module, in fp32 on the CPU, and those that `TrainedRows` takes off again, or None.

    For pissa some 15 s on the 135M base and two cores, minutes on larger ones; the others take a second at most.
    `yield_or_leave` is called before each module that is decomposed, and may raise.
    """
    config, shape = adapter_config(spec), base.config.shape
    modules: dict[ModuleKey, LoraModule] = {}
    for layer in range(shape.num_layers):
        for name in spec.target_modules:
            key = ModuleKey(layer, name)
            if spec.init in TAKEN_OFF:
                yield_or_leave()
            a, b = _start(spec, base, key, config.scaling_of(key), seed)
            modules[key] = LoraModule(a, b, config.scaling_of(key))
    weights = LoraWeights(modules)
    return weights, weights if spec.init in TAKEN_OFF else None


def _start(
    spec: LoraSpec, base: BaseModel, key: ModuleKey, scaling: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rank = spec.rank
    if spec.init in TAKEN_OFF:
        w = _weight(base, key)
        a, b = _principal(w, rank, scaling) if spec.init == "pissa" else _triangular(w, rank)
        missing = rank - a.shape[0]  # of a rank above W's own
        return torch.cat((a, a.new_zeros(missing, a.shape[1]))), torch.cat((b, b.new_zeros(len(b), missing)), 1)
    out_features, in_features = base.config.shape.features[key.module]
    a, draw = torch.empty(rank, in_features), stream("init", seed, key.layer, key.module)
    if spec.init == "gaussian":
        a.normal_(std=1 / rank, generator=draw)
    else:
        bound = 1 / math.sqrt(in_features)
        a.uniform_(-bound, bound, generator=draw)
    return a, torch.zeros(out_features, rank)


def _principal(w: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, each with half of the singular values: scaling · B A = U S Vᵀ of the r largest.

    By the eigenvectors of the smaller of WᵀW and WWᵀ, which takes a third of the time of a decomposition of W.
    """
    is_tall = w.shape[0] >= w.shape[1]
    gram = w.t() @ w if is_tall else w @ w.t()
    near = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)  # (smaller side, r), the largest first
    far = (w if is_tall else w.t()) @ near  # (larger side, r): the other side's vectors, times S
    s = far.norm(dim=0).clamp_min(torch.finfo(far.dtype).tiny)
    near, far = near * (s / scaling).sqrt(), far / (s * scaling).sqrt()
    a, b = (near, far) if is_tall else (far, near)
    return a.t().contiguous(), b


def _triangular(w: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of W = Q R: its first r columns alone decide those of Q."""
    q = torch.linalg.qr(w[:, :rank]).Q  # (out, r)
    return q.t() @ w, q


def _weight(base: BaseModel, key: ModuleKey) -> torch.Tensor:
    """The module's W (out, in), in fp32 on the CPU."""
    for group, names in GROUPS.items():
        if key.module in names:
            fused: torch.Tensor = getattr(base.weights.layers[key.layer], group)
            sizes = [base.config.shape.features[name][0] for name in names]
            return torch.split(fused, sizes)[names.index(key.module)].to("cpu", torch.float32)
    raise AssertionError(f"{key.module} is in no group")
