"""An adapter in training: how A and B start, and its parameters next to the frozen model.

The start depends on the seed and the base's weights alone:

    gaussian  A ~ N(0, σ²), B = 0, with the spec's σ
    kaiming   A ~ U(-1/√in, 1/√in), B = 0: PEFT's default (He et al. 2015, arXiv:1502.01852, with a = √5)
    pissa     scaling · B A is the best approximation of W of rank r (Meng et al. 2024, arXiv:2404.02948)
    olora     B and A are the first r columns and rows of W = Q R (Büyükakyüz 2024, arXiv:2406.01775)

Random streams are named, not continued: a draw depends on the stream's name alone. Each module has its own
stream, so the order of modules doesn't matter.

In PiSSA and OLoRA, B A starts as a part B₀A₀ of W itself. The model subtracts B₀A₀ again, so W stays as it is, and
training starts at the base. Computed directly, B A - B₀A₀ would be a small difference of two large terms, and
inexact in 16 bits. So the model computes the same difference without the large terms, as an ordinary LoRA of twice
the rank:

    B A - B₀A₀  =  (B - B₀) A + B₀ (A - A₀)  =  [B - B₀, B₀] · [A; A - A₀]

This LoRA is also what gets published. It is exactly 0 before the first step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from adapters.lora import BaseShape, LoraConfig, LoraModule, LoraWeights, ModuleKey
from server.model.base.weights import BaseModel
from server.model.ops.gradients import apply
from server.model.rank_rows import GROUPS, GroupKey
from server.training.dropout import Dropout, LayerInputs, hash_name
from server.training.spec import Init, LoraSpec

SUBTRACTED: frozenset[Init] = frozenset({"pissa", "olora"})
"""Inits in which B A starts as a part of W. Their adapters are published with twice the rank."""


def adapter_config(spec: LoraSpec) -> LoraConfig:
    """Return the published adapter's shape: for pissa and olora, twice the spec's rank with the same scaling."""
    rank, alpha = spec.rank, float(spec.alpha)
    if spec.init in SUBTRACTED:
        rank, alpha = 2 * rank, alpha * (math.sqrt(2) if spec.use_rslora else 2)
    return LoraConfig(rank, alpha, spec.target_modules, spec.use_rslora)


def initial_weights(
    spec: LoraSpec, base: BaseModel, seed: int, yield_or_leave: Callable[[], None] = lambda: None
) -> tuple[LoraWeights, LoraWeights | None]:
    """Return A and B of every targeted module, in fp32 on the CPU, and the weights to subtract (None: nothing).

    The method pissa takes some 15 s on the 135M base and two cores, and minutes on larger bases; the other methods
    take a second at most. `yield_or_leave` is called before each module that is decomposed, and may raise.
    """
    config, shape = adapter_config(spec), base.config.shape
    modules: dict[ModuleKey, LoraModule] = {}
    for layer in range(shape.num_layers):
        for name in spec.target_modules:
            key = ModuleKey(layer, name)
            if spec.init in SUBTRACTED:
                yield_or_leave()
            a, b = _start(spec, base, key, config.scaling_of(key), seed)
            modules[key] = LoraModule(a, b, config.scaling_of(key))
    weights = LoraWeights(modules)
    return weights, weights if spec.init in SUBTRACTED else None


def _start(
    spec: LoraSpec, base: BaseModel, key: ModuleKey, scaling: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rank = spec.rank
    if spec.init in SUBTRACTED:
        w = _weight(base, key)
        a, b = _principal(w, rank, scaling) if spec.init == "pissa" else _triangular(w, rank)
        missing = rank - a.shape[0]  # more than 0 if the rank exceeds W's own
        return torch.cat((a, a.new_zeros(missing, a.shape[1]))), torch.cat((b, b.new_zeros(len(b), missing)), 1)
    out_features, in_features = base.config.shape.features[key.module]
    a, draw = torch.empty(rank, in_features), stream("init", seed, key.layer, key.module)
    if spec.init == "gaussian":
        a.normal_(std=spec.init_std, generator=draw)
    else:
        bound = 1 / math.sqrt(in_features)
        a.uniform_(-bound, bound, generator=draw)
    return a, torch.zeros(out_features, rank)


def _principal(w: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B such that scaling · B A = U S Vᵀ for the r largest singular values. A and B have √S each.

    A and B are computed from the eigenvectors of the smaller of WᵀW and WWᵀ, in a third of the time of decomposing
    W itself.
    """
    is_tall = w.shape[0] >= w.shape[1]
    gram = w.t() @ w if is_tall else w @ w.t()
    near = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)  # (smaller side, r), the largest first
    far = (w if is_tall else w.t()) @ near  # (larger side, r): the other side's vectors times S
    s = far.norm(dim=0).clamp_min(torch.finfo(far.dtype).tiny)
    near, far = near * (s / scaling).sqrt(), far / (s * scaling).sqrt()
    a, b = (near, far) if is_tall else (far, near)
    return a.t().contiguous(), b


def _triangular(w: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B from W = Q R. The first r columns of Q depend only on the first r columns of W."""
    q = torch.linalg.qr(w[:, :rank]).Q  # (out, r)
    return q.t() @ w, q


def _weight(base: BaseModel, key: ModuleKey) -> torch.Tensor:
    """Return the module's W (out, in), in fp32 on the CPU."""
    for group, names in GROUPS.items():
        if key.module in names:
            fused: torch.Tensor = getattr(base.weights.layers[key.layer], group)
            sizes = [base.config.shape.features[name][0] for name in names]
            return torch.split(fused, sizes)[names.index(key.module)].to("cpu", torch.float32)
    raise AssertionError(f"{key.module} is in no group")


def stream(*name: int | str) -> torch.Generator:
    """Return a new CPU generator for `name`, such as ("init", seed, layer, module)."""
    return torch.Generator().manual_seed(hash_name(*name))


@dataclass(frozen=True, eq=False)
class TrainedModule:
    """One module: its slices of its group's tensors, and views of its A and B (fp32) and of their gradients."""

    key: ModuleKey
    rows: slice  # of the group's A
    features: slice  # of the group's fused output
    scaling: float
    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r)
    d_a: torch.Tensor
    d_b: torch.Tensor
    start: LoraModule | None  # A₀ and B₀, in fp32


@dataclass(frozen=True, eq=False)
class TrainedGroup:
    """One layer's modules that read the same input, with two leaf tensors: A (rows, in) and Bᵀ (rows, out).

    A module of rank r has r rows in both, or 2r if A₀ and B₀ are subtracted. A includes the scalings, as in
    serving. Bᵀ is block diagonal with a block for each module: one product for the whole group is cheaper than a
    narrow product for each module.
    """

    modules: tuple[TrainedModule, ...]
    a: torch.Tensor
    b: torch.Tensor


class _AddLora(torch.autograd.Function):
    """y + x Aᵀ B, in place on y, for the leaves A (rows, in) and B (rows, out).

    Dropout: features of x that aren't kept are set to zero, and the other features are multiplied by `factor`.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        y: torch.Tensor,
        x: torch.Tensor,
        kept: torch.Tensor | None,
        factor: float,
        a: torch.Tensor,
        b: torch.Tensor,
    ) -> torch.Tensor:
        if kept is not None:
            x = (x * kept).mul_(factor)
        hidden = x @ a.t()  # (tokens, rows)
        y.addmm_(hidden, b)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, kept, hidden, a, b)
        ctx.factor = factor
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        x, kept, hidden, a, b = ctx.saved_tensors
        d_hidden = dy @ b.t()  # (tokens, rows)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = d_hidden @ a
            if kept is not None:
                dx.mul_(kept).mul_(ctx.factor)
        return dy, dx, None, None, d_hidden.t() @ x, hidden.t() @ dy


class TrainedRows:
    """The parameters of one adapter in training, as `smollm.Adapters`.

    `masters` is one flat fp32 vector of every module's A and B, which the optimizer updates in place. The
    forward pass reads copies in the compute dtype. These copies are the leaves: one of A and one of B for each
    group of each layer. Gradients are added up in a flat fp32 vector after every micro-batch, so that no sum over
    micro-batches is rounded to 16 bits.

    `dropout` is set for one micro-batch and unset when the micro-batch's gradients are collected, so
    evaluations have no dropout.
    """

    def __init__(
        self,
        weights: LoraWeights,
        shape: BaseShape,
        dtype: torch.dtype,
        device: torch.device,
        frozen: LoraWeights | None = None,
        *,
        row_unit: int = 1,
    ) -> None:
        """Start from `weights` and keep their scalings; the forward pass computes in `dtype`.

        `frozen` has A₀ and B₀, which are subtracted, for the same modules, ranks and scalings. In the tensors of a
        group, each module's rows begin at a multiple of `row_unit`; unused rows are zero.
        """
        self._row_unit = row_unit
        self.dropout: Dropout | None = None
        self.masters = torch.zeros(weights.num_parameters, device=device)
        self.gradients = torch.zeros_like(self.masters)
        self.groups: dict[GroupKey, TrainedGroup] = {}
        self._inputs: dict[int, LayerInputs] = {}
        self._end = 0  # of the filled part of `masters`
        for layer in range(shape.num_layers):
            sizes = {}
            for name in GROUPS:
                group = self._make_group(layer, name, weights, shape, dtype, frozen)
                if group is not None:
                    self.groups[layer, name] = group
                    sizes[name] = group.a.shape[1]
            if sizes:
                self._inputs[layer] = LayerInputs.of(layer, sizes, device)
        assert self._end == weights.num_parameters, "an adapter of another base"
        self.refresh()

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The tensors that the forward pass reads, and whose gradients autograd computes."""
        return [leaf for group in self.groups.values() for leaf in (group.a, group.b)]

    def add(self, layer: int, group: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return y (tokens, out) plus the adapter's output for x (tokens, in)."""
        found = self.groups.get((layer, group))
        if found is None:
            return y
        kept, factor = None, 1.0
        if self.dropout is not None:
            kept, factor = self.dropout.kept(self._inputs[layer], group), self.dropout.factor
        return apply(_AddLora, y, x, kept, factor, found.a, found.b)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters to the leaves."""
        for group in self.groups.values():
            for module in group.modules:
                a, b = _published(module)
                group.a[module.rows] = a * module.scaling
                group.b[module.rows, module.features] = b.t()

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the leaf tensors' gradients to `gradients`. Then reset the leaves' own, and unset `dropout`."""
        self.dropout = None
        for group in self.groups.values():
            d_a, d_b = group.a.grad, group.b.grad
            group.a.grad = group.b.grad = None
            if d_a is None or d_b is None:
                continue
            for module in group.modules:
                rank = module.a.shape[0]
                d_rows = d_a[module.rows]
                module.d_a.add_(d_rows[:rank], alpha=module.scaling)
                if module.start is not None:
                    module.d_a.add_(d_rows[rank:], alpha=module.scaling)  # A is in A - A₀, too
                module.d_b.add_(d_b[module.rows, module.features][:rank].t())

    @torch.no_grad()
    def weights(self) -> LoraWeights:
        """Return a copy of the adapter as it is now, in fp32.

        The copy has twice the rank of A and B in training if A₀ and B₀ are subtracted.
        """
        modules: dict[ModuleKey, LoraModule] = {}
        for group in self.groups.values():
            for module in group.modules:
                a, b = (tensor.to("cpu", copy=True) for tensor in _published(module))
                modules[module.key] = LoraModule(a, b, module.scaling)
        return LoraWeights(modules)

    def _make_group(
        self,
        layer: int,
        name: str,
        weights: LoraWeights,
        shape: BaseShape,
        dtype: torch.dtype,
        frozen: LoraWeights | None,
    ) -> TrainedGroup | None:
        modules, row, feature = [], 0, 0
        device = self.masters.device
        for module_name in GROUPS[name]:
            key, out_features = ModuleKey(layer, module_name), shape.features[module_name][0]
            features = slice(feature, feature + out_features)
            feature = features.stop
            given = weights.modules.get(key)
            if given is None:
                continue
            start = None if frozen is None else _in_fp32(frozen.modules[key], device)
            num_rows = given.rank if start is None else 2 * given.rank
            rows = slice(row, row + num_rows)
            row = -(-rows.stop // self._row_unit) * self._row_unit
            a, d_a = self._take(given.a)
            b, d_b = self._take(given.b)
            modules.append(TrainedModule(key, rows, features, given.scaling, a, b, d_a, d_b, start))
        if not modules:
            return None

        def leaf(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device, requires_grad=True)

        return TrainedGroup(tuple(modules), leaf(row, modules[0].a.shape[1]), leaf(row, feature))

    def _take(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy `tensor` to the next part of `masters`. Return that part and the matching part of `gradients`."""
        part = slice(self._end, self._end + tensor.numel())
        self._end = part.stop
        master = self.masters[part].view(tensor.shape)
        master.copy_(tensor)
        return master, self.gradients[part].view(tensor.shape)


def _published(module: TrainedModule) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the module's A and B as published: [A; A - A₀] and [B - B₀, B₀] if A₀ and B₀ are subtracted."""
    a, b, start = module.a, module.b, module.start
    if start is None:
        return a, b
    return torch.cat((a, a - start.a)), torch.cat((b - start.b, start.b), 1)


def _in_fp32(module: LoraModule, device: torch.device) -> LoraModule:
    return LoraModule(module.a.to(device, torch.float32), module.b.to(device, torch.float32), module.scaling)
