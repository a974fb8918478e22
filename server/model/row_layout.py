"""How an adapter lies in the pools of `rank_rows`: what it needs of each group's, and what its runs hold.

`pack` makes all of it at once, as one piece of memory, which can be kept (`packed_adapters`) and copied in.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from adapters.lora import BaseShape, LoraWeights, ModuleKey

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
