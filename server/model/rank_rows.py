"""Rank rows: the memory of resident adapters' low-rank matrices, and the layout of an adapter in it.

Linear modules that read the same input form a group (`GROUPS`). Each group has one pool with `a` (layers, rows,
in) and `b` (layers, number of units, unit). A unit is a part of a row of B: `unit` successive output features of a
module. `unit` divides the output sizes of all modules in the group, so rows of q and rows of k share a pool
without padding.

A resident adapter has one run (contiguous range) of rows and one run of units in the pool of each group that it
targets. A run has the same place in every layer, so one index describes a token's rows for all layers. If rows are
packed (`RowFormat.tile`), a run's layers are contiguous instead, and `a` is (layers · rows, in): a run whose first
row is r begins at row r · layers.

`a` includes a row's scaling (α/r or α/√r, which may vary by layer), so products with `a` are multiplied only by
the request's weight for the adapter. A module's B, transposed, is (rank, out). Each of its rows fills out/unit
units. `engine.adapter_pool` decides which adapter has which run.

`RowLayout.pack` writes an adapter's runs of all groups into one piece of memory, which can be stored
(`packed_adapters`) and copied into the pools.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from adapters.lora import BaseShape, LoraWeights, ModuleKey
from server.model.device import Uploads
from server.model.huge_pages import in_huge_pages, take_pages

GROUPS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""The modules of each group, which read the same input, in the order in which their outputs are fused."""


GroupKey = tuple[int, str]
"""A layer and a key of `GROUPS`."""


@dataclass(frozen=True)
class RowFormat:
    """The dtypes and the layout of adapters' matrices in the pools, chosen by a backend for its products.

    An adapter's rows of A are (rows, in), and a module's B is (rank, out). With a `tile` they are packed for
    products of bf16 pairs: A as (in / 2, rows, 2), and B as (out / tile, rank / 2, tile, 2).
    """

    a: torch.dtype
    b: torch.dtype
    tile: int | None = None

    @classmethod
    def of_torch(cls, dtype: torch.dtype, device: torch.device) -> "RowFormat":
        """Return the format for `lora_batch`. On a CPU, A is fp32, since torch's sampled product needs that."""
        return cls(torch.float32 if device.type == "cpu" else dtype, dtype)

    def rounded(self, rank: int) -> int:
        """Return the number of rows for a rank. If rows are packed, an odd rank gets one more row, of zeros."""
        return rank if self.tile is None else rank + rank % 2

    def bytes_per_rank(self, shape: BaseShape) -> int:
        """Return the bytes in the pools for an adapter of rank 1 on all linear modules."""
        sizes = shape.features.values()
        per_layer = sum(self.a.itemsize * inputs + self.b.itemsize * outputs for outputs, inputs in sizes)
        return shape.num_layers * per_layer


@dataclass(frozen=True)
class GroupLayout:
    """The modules of one group, which read the same input, and their sizes in features.

    A unit is the part of a row of B that a pool stores in one piece. `unit` is its number of output features.
    """

    modules: tuple[str, ...]
    in_features: int
    out_features: Mapping[str, int]
    unit: int

    @classmethod
    def of(cls, group: str, shape: BaseShape) -> "GroupLayout":
        modules = GROUPS[group]
        out = {name: shape.features[name][0] for name in modules}
        return cls(modules, shape.features[modules[0]][1], out, math.gcd(*out.values()))

    @property
    def units_per_token(self) -> int:
        return sum(self.out_features.values()) // self.unit


@dataclass(frozen=True)
class ModuleRows:
    """Where one module's matrices are among an adapter's rows of A and units of B, and their rank."""

    module: str
    rank: int  # rounded up by the format
    row: int  # relative to the run's first row
    unit: int  # relative to the run's first unit
    out_start: int  # the module's first feature in the group's fused output
    out_features: int


@dataclass(frozen=True)
class GroupRows:
    """How many rows of A and units of B an adapter needs in the pool of one group of modules.

    A unit is a part of a row of B; all units of a group have the same number of output features.
    """

    modules: tuple[ModuleRows, ...]
    num_rows: int
    num_units: int


Needs = Mapping[str, GroupRows]
"""The rows and units that an adapter needs, by group. Groups that the adapter doesn't target are left out."""


@dataclass(frozen=True, eq=False)
class PackedFile:
    """An adapter that `RowLayout.pack` has packed, whose content is still in a file."""

    needs: Needs
    read: Callable[[Sequence[memoryview]], None]  # fills the buffers with the content, in order


class RowLayout:
    """The layout of adapters' matrices in the pools, for one base and one `RowFormat`."""

    def __init__(self, shape: BaseShape, row_format: RowFormat) -> None:
        self.shape = shape
        self.format = row_format
        self.groups = {group: GroupLayout.of(group, shape) for group in GROUPS}

    def needs(self, ranks: Mapping[str, int]) -> dict[str, GroupRows]:
        """Return an adapter's rows of A and units of B in each group's pool, given its modules' ranks."""
        needs = {}
        for group, layout in self.groups.items():
            modules, row, unit, out_start = [], 0, 0, 0
            for name in layout.modules:
                out = layout.out_features[name]
                if rank := self.format.rounded(ranks.get(name, 0)):
                    modules.append(ModuleRows(name, rank, row, unit, out_start, out))
                    row += rank
                    unit += rank * (out // layout.unit)
                out_start += out
            if row:
                needs[group] = GroupRows(tuple(modules), row, unit)
        return needs

    def needs_of(self, weights: LoraWeights) -> dict[str, GroupRows]:
        """Return the rows of A and units of B that an adapter takes in each group's pool.

        If a module's rank varies by layer, the largest rank counts.
        """
        ranks: dict[str, int] = {}
        for key, module in weights.modules.items():
            ranks[key.module] = max(ranks.get(key.module, 0), module.rank)
        return self.needs(ranks)

    def num_bytes(self, needs: Needs) -> int:
        """Return the bytes that an adapter takes in all pools."""
        return sum(sum(self._sizes(group, rows)) for group, rows in needs.items())

    @torch.inference_mode()
    def pack(self, weights: LoraWeights) -> torch.Tensor:
        """Return an adapter in the layout of the pools (bytes,): for each group of modules A's rows, then B's
        units.

        Raise ValueError or RuntimeError if the adapter is for another base.
        """
        needs = self.needs_of(weights)
        content = rest = torch.empty(self.num_bytes(needs), dtype=torch.uint8)
        for group, rows in needs.items():
            a, b, rest = rest.split([*(sizes := self._sizes(group, rows)), len(rest) - sum(sizes)])
            a = a.view(self.format.a).view(self.shape.num_layers, rows.num_rows, -1)
            b = b.view(self.format.b).view(self.shape.num_layers, rows.num_units, -1)
            self.fill(weights, rows, a, b)
        return content

    def fill(self, weights: LoraWeights, group: GroupRows, a_rows: torch.Tensor, b_units: torch.Tensor) -> None:
        """Write an adapter's matrices for one group of modules in the layout of the pools.

        a_rows is (layers, rows, in), and b_units is (layers, number of units, features of a unit). Raise
        ValueError or RuntimeError if the adapter is for another base.
        """
        if any(key.layer >= self.shape.num_layers for key in weights.modules):
            raise ValueError("the adapter has more layers than the base")
        unit, tile = b_units.shape[2], self.format.tile
        for layer in range(self.shape.num_layers):
            for rows in group.modules:
                b = b_units[layer, rows.unit : rows.unit + rows.rank * (rows.out_features // unit)]
                if tile is None:
                    a = a_rows[layer, rows.row : rows.row + rows.rank]  # (rank, in)
                    b = b.view(rows.rank, rows.out_features)
                else:
                    a = _pairs(a_rows[layer]).view(-1, group.num_rows)[:, rows.row : rows.row + rows.rank]
                    b = _pairs(b).view(-1, rows.rank // 2, tile)
                module = weights.modules.get(ModuleKey(layer, rows.module))
                if module is None:
                    a.zero_()
                    b.zero_()
                    continue
                rank = module.rank  # at most rows.rank, the largest of all layers, rounded up
                scaled = module.a.float() * module.scaling
                if tile is None:
                    a[:rank].copy_(scaled)
                    a[rank:].zero_()
                    b[:rank].copy_(module.b.t())
                    b[rank:].zero_()
                else:
                    missing = rows.rank - rank
                    a.copy_(_pairs(F.pad(scaled, (0, 0, 0, missing)).to(a_rows.dtype)).t())
                    whole = F.pad(module.b.to(b_units.dtype), (0, missing)).contiguous()  # (out, rank)
                    b.copy_(_pairs(whole).view(-1, tile, rows.rank // 2).transpose(1, 2))

    def _sizes(self, group: str, rows: GroupRows) -> tuple[int, int]:
        """Return how many bytes an adapter's A and B take in the pool of one group of modules."""
        layers, layout = self.shape.num_layers, self.groups[group]
        num_a, num_b = rows.num_rows * layout.in_features, rows.num_units * layout.unit
        return layers * num_a * self.format.a.itemsize, layers * num_b * self.format.b.itemsize


def _pairs(numbers: torch.Tensor) -> torch.Tensor:
    """View each pair of neighbouring 16-bit numbers as one 32-bit number, to move them together."""
    return numbers.view(torch.int32)


@dataclass(frozen=True)
class Run:
    """The contiguous rows of A and units of B that an adapter has in the pool of one group of modules."""

    rows: GroupRows
    first_row: int
    first_unit: int


class Placement(dict[str, Run]):
    """The rows and units that an adapter has in the pool of each group. It must not be changed once built.

    `table` has what steps need: int64 (modules of `GROUPS`, 3), each module's rank, its first row of
    A and its first unit of B in the group's pool. A module that the adapter doesn't target has rank 0.
    """

    def __init__(self, runs: Mapping[str, Run]) -> None:
        super().__init__(runs)
        self.table = np.zeros((sum(map(len, GROUPS.values())), 3), np.int64)
        module = 0
        for group, names in GROUPS.items():
            if (run := runs.get(group)) is not None:
                targets = {rows.module: rows for rows in run.rows.modules}
                row, unit = run.first_row, run.first_unit
                for place, name in enumerate(names, module):
                    if (rows := targets.get(name)) is not None:
                        row, unit = run.first_row + rows.row, run.first_unit + rows.unit
                    self.table[place] = rows.rank if rows else 0, row, unit
                    row += rows.rank if rows else 0
            module += len(names)


Stored = LoraWeights | PackedFile
"""An adapter outside of the pools: as it was published, or packed in the layout of the pools."""


_TYPICAL_RANK = 16
"""The assumed rank of the first adapter. Its memory pages are allocated before its rank is known."""


class RankRows:
    """The memory of resident adapters: one pool for each group of modules. Unused rows have arbitrary content."""

    def __init__(self, shape: BaseShape, *, max_rank: int, row_format: RowFormat, device: torch.device) -> None:
        """Allocate room for adapters whose ranks add up to `max_rank`, each on all linear modules.

        Ranks count as rounded by `RowFormat.rounded`.
        """
        max_rank = row_format.rounded(max_rank)
        self.shape = shape
        self.format = row_format
        self.device = device
        self.max_rank = max_rank
        self.layout = RowLayout(shape, row_format)
        self.layouts = self.layout.groups
        self._ends: dict[str, tuple[int, int]] = {}  # by group: the ends of the rows and units used so far
        self._last: Mapping[str, Run] = {}
        self.lacks_pages = False
        """Whether an adapter has used the pages that `take_ahead` allocated."""
        self._uploads = None if device.type == "cpu" else Uploads(device)
        self.a: dict[str, torch.Tensor] = {}
        self.b: dict[str, torch.Tensor] = {}
        for group, layout in self.layouts.items():
            a_shape = (self.num_rows(group), layout.in_features)
            b_shape = (self.num_units(group), layout.unit)
            if row_format.tile is None:
                self.a[group] = torch.empty(shape.num_layers, *a_shape, dtype=row_format.a, device=device)
                self.b[group] = torch.empty(shape.num_layers, *b_shape, dtype=row_format.b, device=device)
            else:
                self.a[group] = in_huge_pages(shape.num_layers * a_shape[0], a_shape[1], dtype=row_format.a)
                self.b[group] = in_huge_pages(shape.num_layers * b_shape[0], b_shape[1], dtype=row_format.b)
        if row_format.tile is not None:
            typical = self.layout.needs(dict.fromkeys(shape.features, min(max_rank, _TYPICAL_RANK)))
            self._last = {group: Run(rows, 0, 0) for group, rows in typical.items()}
            self.take_ahead()

    def num_rows(self, group: str) -> int:
        """Return the number of rows of A that this group's pool has in each layer."""
        return self.max_rank * len(self.layouts[group].modules)

    def num_units(self, group: str) -> int:
        """Return the number of units of B (parts of rows) that this group's pool has in each layer."""
        return self.max_rank * self.layouts[group].units_per_token

    def run(self, group: str, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of an adapter's part of a pool.

        These are A (layers, rows, in) and B (layers, number of units, features of a unit).
        """
        num_rows, num_units, layers = run.rows.num_rows, run.rows.num_units, self.shape.num_layers
        if self.format.tile is None:
            return (
                self.a[group][:, run.first_row : run.first_row + num_rows],
                self.b[group][:, run.first_unit : run.first_unit + num_units],
            )
        return (
            self.a[group].narrow(0, layers * run.first_row, layers * num_rows).unflatten(0, (layers, num_rows)),
            self.b[group].narrow(0, layers * run.first_unit, layers * num_units).unflatten(0, (layers, num_units)),
        )

    def needs(self, stored: Stored) -> Needs:
        """Return the rows of A and units of B that an adapter takes in each group's pool."""
        return self.layout.needs_of(stored) if isinstance(stored, LoraWeights) else stored.needs

    @torch.inference_mode()
    def place(self, stored: Stored, placement: Mapping[str, Run]) -> None:
        """Copy an adapter into its part of the pools (`placement`), which may be read after this returns.

        Other parts may be used during the copy: a GPU copies and computes at the same time. Raise ValueError or
        RuntimeError if the adapter is for another base, and Unavailable if its file can't be read.
        """
        staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        buffers: list[memoryview] = []
        for group, run in placement.items():
            a, b = self.run(group, run)
            if self._uploads is not None:
                host_a, host_b = (torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True) for rows in (a, b))
                staged += [(host_a, a), (host_b, b)]
                a, b = host_a, host_b
            if isinstance(stored, LoraWeights):
                self.layout.fill(stored, run.rows, a, b)
            else:
                buffers += _buffers(a) + _buffers(b)
            rows, units = self._ends.get(group, (0, 0))
            ends = run.first_row + run.rows.num_rows, run.first_unit + run.rows.num_units
            self._ends[group] = max(rows, ends[0]), max(units, ends[1])
            self.lacks_pages |= self.format.tile is not None and self._ends[group] != (rows, units)
        if isinstance(stored, PackedFile):
            assert list(placement) == list(stored.needs), "the file has the groups in this order"
            stored.read(buffers)
        self._last = placement
        if self._uploads is not None:
            self._uploads.copy(staged)

    @torch.inference_mode()
    def move(self, group: str, kind: str, start: int, length: int, to: int) -> None:
        """Move `length` rows or units (`kind`: "rows" or "units") of a group's pool from index `start` to `to`.

        The two ranges may overlap. No thread may write to either range meanwhile.
        """
        pool, dim, scale = self.a if kind == "rows" else self.b, 1, 1
        if self.format.tile is not None:  # the layers of a run are contiguous
            dim, scale = 0, self.shape.num_layers
        if to != start:
            source = pool[group].narrow(dim, start * scale, length * scale)
            pool[group].narrow(dim, to * scale, length * scale).copy_(source.clone())

    def take_ahead(self) -> None:
        """Have the system allocate memory pages where the next adapter will likely be placed.

        The next adapter is assumed to be as large as the last one. Without this call, the copy into the
        pools would allocate the pages, which takes longer than the rest of the copy.
        """
        self.lacks_pages = False
        layers = self.shape.num_layers
        for group, run in self._last.items():
            row, unit = self._ends.get(group, (0, 0))
            take_pages(self.a[group][layers * row : layers * (row + run.rows.num_rows)])
            take_pages(self.b[group][layers * unit : layers * (unit + run.rows.num_units)])


def _buffers(run: torch.Tensor) -> list[memoryview]:
    """Return the memory of a part of a pool (layers, rows, …) in order.

    Return one buffer if the part's layers are contiguous, else one for each layer.
    """
    pieces = [run] if run.is_contiguous() else list(run)
    return [memoryview(piece.view(torch.uint8).numpy().data).cast("B") for piece in pieces]
