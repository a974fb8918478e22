"""Rank rows: where the low-rank matrices of resident adapters lie, beside the frozen weights.

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

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adapters.lora import BaseShape, LoraWeights
from server.model.huge_pages import in_huge_pages, take_pages
from server.model.row_layout import GroupRows, Needs, PackedFile, PackedRows, RowFormat, RowLayout
from server.model.uploads import Uploads


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
