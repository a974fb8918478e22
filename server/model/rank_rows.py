"""How an adapter lies in the pools of `rank_rows`: what it needs of each group's, and what its runs hold.

`pack` makes all of it at once, as one piece of memory, which can be kept (`packed_adapters`) and copied in.

Rank rows: where the low-rank matrices of resident adapters lie, beside the frozen weights.

Linear modules that read the same input form a group with one pool. A pool has `a` (layers, rows, in) and
`b` (layers, units, unit): a resident adapter owns one run of rows and one of units in the pool of each group
that it targets, the same run in every layer, so that one index describes a token's rows for all layers.
Where rows are packed, a run's layers follow each other instead, so that an adapter lies together: the run of
rows r to s begins at r · layers of `a` (layers · rows, in).

A row's scaling (α/r or α/√r, which patterns may vary by layer) is multiplied into `a` when it is placed; what
is left for a request is its weight. A module's B, transposed, is (rank, out): each of its rows fills
out/unit units, where `unit` divides the output sizes of all modules in the group, so that a row of q and a
row of k lie in one pool without padding. Which run belongs to whom is `engine.adapter_pool`'s to decide.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

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
"""The modules that read the same input, in the order in which their outputs are fused."""


GroupKey = tuple[int, str]
"""A layer and a key of `GROUPS`."""


@dataclass(frozen=True)
class RowFormat:
    """How rank rows are stored: as the products over them want it, which a backend knows.

    A run of A is (rows, in), and a module's B (rank, out). With a `tile` they are packed as products of 16-bit
    pairs read them: the run of A as (in / 2, rows, 2), and B as (out / tile, rank / 2, tile, 2).
    """

    a: torch.dtype
    b: torch.dtype
    tile: int | None = None

    @classmethod
    def of_torch(cls, dtype: torch.dtype, device: torch.device) -> "RowFormat":
        """For `lora_batch`. On a CPU A is fp32, which torch's sampled product needs."""
        return cls(torch.float32 if device.type == "cpu" else dtype, dtype)

    def rounded(self, rank: int) -> int:
        """The rank that a module has here: where rows are packed, pairs of them, if need be with one of zeros."""
        return rank if self.tile is None else rank + rank % 2

    def bytes_per_rank(self, shape: BaseShape) -> int:
        """Bytes that one rank on all linear modules takes in the pools."""
        sizes = shape.features.values()
        per_layer = sum(self.a.itemsize * inputs + self.b.itemsize * outputs for outputs, inputs in sizes)
        return shape.num_layers * per_layer


@dataclass(frozen=True)
class GroupLayout:
    """The sizes of one group of a base: what `GROUPS` is, in features."""

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
    """One module's share of an adapter's run: its rank (the largest over the layers) and where its rows start."""

    module: str
    rank: int  # rounded up as the format wants it
    row: int  # from the first row of the run
    unit: int  # from the first unit of the run
    out_start: int  # where its outputs start in the group's fused output
    out_features: int


@dataclass(frozen=True)
class GroupRows:
    """What an adapter needs in one group's pool."""

    modules: tuple[ModuleRows, ...]
    num_rows: int
    num_units: int


Needs = Mapping[str, GroupRows]
"""What an adapter needs, by group; groups that it does not target are left out."""


@dataclass(frozen=True, eq=False)
class PackedRows:
    """An adapter as it is to lie: of each group that it needs its run of A and then that of B, in one piece."""

    needs: Needs
    content: torch.Tensor  # (bytes,), uint8


@dataclass(frozen=True, eq=False)
class PackedFile:
    """The content of a `PackedRows` that is still in a file."""

    needs: Needs
    read: Callable[[Sequence[memoryview]], None]  # fills buffers with the content, one after the other


class RowLayout:
    """What adapters need and what their runs hold, for one base and one format."""

    def __init__(self, shape: BaseShape, row_format: RowFormat) -> None:
        self.shape = shape
        self.format = row_format
        self.groups = {group: GroupLayout.of(group, shape) for group in GROUPS}

    def needs(self, ranks: Mapping[str, int]) -> dict[str, GroupRows]:
        """The rows and units that an adapter takes in each group's pool, by its modules' ranks."""
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
        """Where a module's rank varies by layer, the largest counts."""
        ranks: dict[str, int] = {}
        for key, module in weights.modules.items():
            ranks[key.module] = max(ranks.get(key.module, 0), module.rank)
        return self.needs(ranks)

    def num_bytes(self, needs: Needs) -> int:
        """Of what an adapter has in all pools."""
        return sum(sum(self._sizes(group, rows)) for group, rows in needs.items())

    def runs(self, packed: PackedRows) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Each group with the run of A (layers, rows, in) and that of B (layers, units, unit)."""
        layers, rest = self.shape.num_layers, packed.content
        for group, rows in packed.needs.items():
            a, b, rest = rest.split([*(sizes := self._sizes(group, rows)), len(rest) - sum(sizes)])
            a = a.view(self.format.a).view(layers, rows.num_rows, -1)
            yield group, a, b.view(self.format.b).view(layers, rows.num_units, -1)

    @torch.inference_mode()
    def pack(self, weights: LoraWeights) -> PackedRows:
        """Raises ValueError or RuntimeError for an adapter of another base."""
        needs = self.needs_of(weights)
        packed = PackedRows(needs, torch.empty(self.num_bytes(needs), dtype=torch.uint8))
        for group, a, b in self.runs(packed):
            self.fill(weights, needs[group], a, b)
        return packed

    def fill(self, weights: LoraWeights, group: GroupRows, a_rows: torch.Tensor, b_units: torch.Tensor) -> None:
        """Write all of a group's runs: a_rows (layers, rows, in) and b_units (layers, units, unit).

        Raises ValueError or RuntimeError for an adapter of another base.
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
                rank = module.rank  # smaller than rows.rank where a pattern varies it by layer, or is rounded up
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
        """Bytes of the runs of A and B."""
        layers, layout = self.shape.num_layers, self.groups[group]
        num_a, num_b = rows.num_rows * layout.in_features, rows.num_units * layout.unit
        return layers * num_a * self.format.a.itemsize, layers * num_b * self.format.b.itemsize


def _pairs(numbers: torch.Tensor) -> torch.Tensor:
    """Two neighbouring 16-bit numbers as one, which is moved as a whole."""
    return numbers.view(torch.int32)


@dataclass(frozen=True)
class Run:
    """An adapter's place in one group's pool."""

    rows: GroupRows
    first_row: int
    first_unit: int


Placement = Mapping[str, Run]
"""Where an adapter lies, by group."""

Stored = LoraWeights | PackedRows | PackedFile
"""An adapter that isn't placed yet: as it was published, or as it is to lie."""


_TYPICAL_RANK = 16
"""Of the first adapter, for whom pages are taken before anything is known of it."""


class RankRows:
    """The pools of all groups. Rows that no placement covers hold anything."""

    def __init__(self, shape: BaseShape, *, max_rank: int, row_format: RowFormat, device: torch.device) -> None:
        """Room for adapters on all linear modules whose ranks, rounded by the format, add up to `max_rank`."""
        max_rank = row_format.rounded(max_rank)
        self.shape = shape
        self.format = row_format
        self.device = device
        self.max_rank = max_rank
        self.layout = RowLayout(shape, row_format)
        self.layouts = self.layout.groups
        self._ends: dict[str, tuple[int, int]] = {}  # of the rows and units that adapters had so far
        self._last: Placement = {}
        self.lacks_pages = False
        """Whether an adapter has the pages that were taken ahead."""
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
        """Rows of A that the group's pool has in each layer."""
        return self.max_rank * len(self.layouts[group].modules)

    def num_units(self, group: str) -> int:
        """Units of B, likewise."""
        return self.max_rank * self.layouts[group].units_per_token

    def run(self, group: str, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        """What a run has of the pool: A (layers, rows, in) and B (layers, units, unit)."""
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
        """The rows and units that an adapter takes in each group's pool."""
        return self.layout.needs_of(stored) if isinstance(stored, LoraWeights) else stored.needs

    @torch.inference_mode()
    def place(self, stored: Stored, placement: Placement) -> None:
        """Copy an adapter into its rows, which may be read once this has returned.

        Other rows are not touched, so they may be in use meanwhile; a GPU copies beside what it computes.
        Raises ValueError or RuntimeError for an adapter of another base, Unavailable if its file can't be read.
        """
        packed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if isinstance(stored, PackedRows):
            packed = {group: (a, b) for group, a, b in self.layout.runs(stored)}
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
            elif isinstance(stored, PackedFile):
                buffers += _buffers(a) + _buffers(b)
            else:
                a.copy_(packed[group][0])
                b.copy_(packed[group][1])
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
        """Move a run of the group's "rows" or "units", which nobody is filling; the two places may overlap."""
        pool, dim, scale = self.a if kind == "rows" else self.b, 1, 1
        if self.format.tile is not None:  # the layers of a run follow each other
            dim, scale = 0, self.shape.num_layers
        if to != start:
            source = pool[group].narrow(dim, start * scale, length * scale)
            pool[group].narrow(dim, to * scale, length * scale).copy_(source.clone())

    def take_ahead(self) -> None:
        """Take the pages for one more adapter as large as the last one, where it is likely to lie: those that no
        adapter had yet cost more to take than all the rest of placing one.
        """
        self.lacks_pages = False
        layers = self.shape.num_layers
        for group, run in self._last.items():
            row, unit = self._ends.get(group, (0, 0))
            take_pages(self.a[group][layers * row : layers * (row + run.rows.num_rows)])
            take_pages(self.b[group][layers * unit : layers * (unit + run.rows.num_units)])


def _buffers(run: torch.Tensor) -> list[memoryview]:
    """The memory of a run (layers, rows, …) in order: in one piece if its layers follow each other."""
    pieces = [run] if run.is_contiguous() else list(run)
    return [memoryview(piece.view(torch.uint8).numpy().data).cast("B") for piece in pieces]
