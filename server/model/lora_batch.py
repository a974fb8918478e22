"""The adapters of one flat batch: the rows of A and B that each token uses, and the adapters' weights.

Successive tokens that share their adapters are a run. A long run, of `MIN_BLOCK` tokens or more, uses dense
products, one adapter after the other. All short runs are computed together. Their products with A are dense for
each run of `MIN_DENSE` tokens or more; for the others, only the products of each token with its adapters' rows are
computed. One call then sums the rows of B for all short runs. The indices are built once per step and serve every
layer. On 2 cores, for q·k·v at rank 16, the sum over B takes 7 µs for one token and 20 µs for 32 tokens; a bf16
matrix product takes 22–30 µs for each of q, k and v. `rank_rows` explains rows, units and groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from server.model.device import to_device
from server.model.ops.linear import Pairs, expand_sampled, shrink_block, shrink_sampled
from server.model.rank_rows import GroupLayout, Placement, RankRows, Run

MIN_BLOCK = 64
"""Runs of at least this many tokens use dense products for both A and B."""

MIN_DENSE = 4
"""Runs of at least this many tokens use dense products for A. So does a short run if the step has no other."""

Parts = tuple[tuple[Placement, float], ...]
"""A request's resident adapters and their weights; empty for the base."""

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenRun:
    """Tokens [start, stop) of the flat batch that share their adapters."""

    start: int
    stop: int
    parts: Parts


@dataclass(frozen=True, eq=False)
class _Block:
    start: int
    stop: int
    run: Run
    weight: float


@dataclass(frozen=True, eq=False)
class _DenseShrink:
    """The dense products of one short run's tokens with the rows of A of the run's adapters.

    `tokens` are the run's indices among the tokens of all short runs. `rows` has a slice of A for each adapter.
    """

    tokens: slice
    rows: tuple[slice, ...]

    def __call__(self, x: torch.Tensor, a_rows: torch.Tensor) -> torch.Tensor:
        x = x[self.tokens].to(a_rows.dtype)
        products = [F.linear(x, a_rows[rows]) for rows in self.rows]
        return (products[0] if len(products) == 1 else torch.cat(products, 1)).flatten()


@dataclass(frozen=True, eq=False)
class _SampledShrink:
    """The products of each token of successive short runs with the rows of A of that token's adapters.

    `pairs` are these tokens and rows. `tokens` are the indices of these runs among the tokens of all short runs.
    """

    tokens: slice
    pairs: Pairs

    def __call__(self, x: torch.Tensor, a_rows: torch.Tensor) -> torch.Tensor:
        return shrink_sampled(x[self.tokens], a_rows, self.pairs)


@dataclass(frozen=True, eq=False)
class _Short:
    """What one group of modules computes for all runs of fewer than `MIN_BLOCK` tokens.

    These are products with A, then sums over rows of B.
    """

    shrinks: tuple[_DenseShrink | _SampledShrink, ...]
    weights: torch.Tensor | None  # (num_pairs,); None: all 1
    hidden_index: torch.Tensor | None  # (num_entries,): each entry's pair; None: entry i has pair i
    unit_index: torch.Tensor  # (num_entries,): each entry's unit of B
    bags: torch.Tensor  # (tokens * units_per_token + 1,)

    def share(self, x: torch.Tensor, a_rows: torch.Tensor, b_units: torch.Tensor) -> torch.Tensor:
        """Return what the adapters add (tokens, out), in b_units' dtype, for the inputs x (tokens, in)."""
        products = [shrink(x, a_rows) for shrink in self.shrinks]
        hidden = products[0] if len(products) == 1 else torch.cat(products)
        if self.weights is not None:
            hidden = hidden * self.weights
        hidden = hidden.to(b_units.dtype)
        if self.hidden_index is not None:
            hidden = hidden.index_select(0, self.hidden_index)
        return expand_sampled(hidden, b_units, self.unit_index, self.bags).view(x.shape[0], -1)


class LoraBatch:
    """The adapters of one flat batch. Implements `smollm.Adapters`."""

    def __init__(self, rows: RankRows, runs: Sequence[TokenRun]) -> None:
        """`runs` must be in the order of their tokens. Tokens outside the runs have no adapter."""
        self._rows = rows
        short = [run for run in runs if run.parts and run.stop - run.start < MIN_BLOCK]
        self._tokens = _tokens(short, rows.device)
        self._blocks: dict[str, list[_Block]] = {}
        self._short: dict[str, _Short] = {}
        for group, layout in rows.layouts.items():
            self._blocks[group] = [
                _Block(run.start, run.stop, placement[group], weight)
                for run in runs
                if run.stop - run.start >= MIN_BLOCK
                for placement, weight in run.parts
                if group in placement
            ]
            if any(group in placement for run in short for placement, _ in run.parts):
                self._short[group] = _plan_short(short, group, layout, rows)

    def add(self, layer: int, group: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return y (tokens, out) plus each token's `Σ weight · scaling · B(A x)`. y is changed in place."""
        for block in self._blocks[group]:
            self._add_block(layer, group, block, x, y)
        short = self._short.get(group)
        if short is not None:
            tokens = self._tokens
            share = short.share(x[tokens], self._rows.a[group][layer], self._rows.b[group][layer])
            if isinstance(tokens, slice):
                y[tokens].add_(share)
            else:
                y.index_add_(0, tokens, share)
        return y

    def _add_block(self, layer: int, group: str, block: _Block, x: torch.Tensor, y: torch.Tensor) -> None:
        run, tokens = block.run, slice(block.start, block.stop)
        a, b = (pool[layer] for pool in self._rows.run(group, run))
        hidden = shrink_block(x[tokens], a, block.weight, y.dtype)  # (tokens, rows of the run)
        unit = b.shape[1]
        for rows in run.rows.modules:
            b_module = b[rows.unit : rows.unit + rows.rank * (rows.out_features // unit)]
            out = y[tokens, rows.out_start : rows.out_start + rows.out_features]
            out.addmm_(hidden[:, rows.row : rows.row + rows.rank], b_module.view(rows.rank, rows.out_features))


def _tokens(runs: Sequence[TokenRun], device: torch.device) -> slice | torch.Tensor:
    """Return an index of the runs' tokens: a slice, which needs no copy, if they are contiguous, else a tensor."""
    if not runs:
        return slice(0, 0)
    if all(before.stop == after.start for before, after in pairwise(runs)):
        return slice(runs[0].start, runs[-1].stop)
    return to_device(torch.cat([torch.arange(run.start, run.stop) for run in runs]), device)


def _plan_short(runs: Sequence[TokenRun], group: str, layout: GroupLayout, rows: RankRows) -> _Short:
    weights: list[npt.NDArray[np.float32]] = []
    hidden_index: list[_Ints] = []
    unit_index: list[_Ints] = []
    bag_counts: list[_Ints] = []
    num_pairs = 0
    for run in runs:
        parts = [(placement[group], weight) for placement, weight in run.parts if group in placement]
        run_weights = [np.full(part.rows.num_rows, weight, np.float32) for part, weight in parts]
        run_hidden, run_units, counts = _entries(parts, layout)
        for _ in range(run.start, run.stop):
            weights += run_weights
            hidden_index.append(run_hidden + num_pairs)
            unit_index.append(run_units)
            bag_counts.append(counts)
            num_pairs += sum(part.rows.num_rows for part, _ in parts)
    all_weights, all_hidden = np.concatenate(weights), np.concatenate(hidden_index)
    is_identity = len(all_hidden) == num_pairs and bool((all_hidden == np.arange(num_pairs)).all())
    return _Short(
        shrinks=_plan_shrinks(runs, group, rows),
        weights=None if bool((all_weights == 1).all()) else _to(all_weights, rows.device),
        hidden_index=None if is_identity else _to(all_hidden, rows.device),
        unit_index=_to(np.concatenate(unit_index), rows.device),
        bags=_to(np.concatenate(([0], np.cumsum(np.concatenate(bag_counts)))), rows.device),
    )


def _plan_shrinks(
    runs: Sequence[TokenRun], group: str, rows: RankRows
) -> tuple[_DenseShrink | _SampledShrink, ...]:
    shrinks: list[_DenseShrink | _SampledShrink] = []
    singles: list[tuple[int, list[slice]]] = []  # (number of tokens, rows of A) of consecutive runs
    start = 0

    def flush() -> None:
        nonlocal start
        num_tokens = sum(num for num, _ in singles)
        if any(token_rows for _, token_rows in singles):
            counts = [sum(part.stop - part.start for part in parts) for num, parts in singles for _ in range(num)]
            columns = [np.arange(r.start, r.stop) for num, parts in singles for _ in range(num) for r in parts]
            pairs = Pairs(
                _to(np.concatenate(([0], np.cumsum(counts))), rows.device),
                _to(np.concatenate(columns), rows.device),
                rows.a[group].shape[1],
            )
            shrinks.append(_SampledShrink(slice(start, start + num_tokens), pairs))
        start += num_tokens
        singles.clear()

    for run in runs:
        num_tokens = run.stop - run.start
        parts = [placement[group] for placement, _ in run.parts if group in placement]
        slices = [slice(part.first_row, part.first_row + part.rows.num_rows) for part in parts]
        if slices and (len(runs) == 1 or num_tokens >= MIN_DENSE):
            flush()
            shrinks.append(_DenseShrink(slice(start, start + num_tokens), tuple(slices)))
            start += num_tokens
        else:
            singles.append((num_tokens, slices))
    flush()
    return tuple(shrinks)


def _entries(parts: Sequence[tuple[Run, float]], layout: GroupLayout) -> tuple[_Ints, _Ints, _Ints]:
    """Return the indices with which one token's outputs are summed from units of B.

    A unit is `layout.unit` successive features of a module's output, or the part of a row of B that adds to them.
    An output unit is a sum of terms. Each term is a unit of B times the product of the token with a row of A. The
    arrays are each term's product, counted from 0; each term's unit of B; and the number of terms of each output
    unit. Terms are in the order of the output units.
    """
    hidden: list[list[_Ints]] = [[] for _ in range(layout.units_per_token)]
    units: list[list[_Ints]] = [[] for _ in range(layout.units_per_token)]
    first_pair = 0
    for run, _ in parts:
        for rows in run.rows.modules:
            width = rows.out_features // layout.unit  # units of one row
            pair = np.arange(rows.rank) + first_pair + rows.row
            unit = np.arange(rows.rank) * width + run.first_unit + rows.unit
            for step in range(width):
                hidden[rows.out_start // layout.unit + step].append(pair)
                units[rows.out_start // layout.unit + step].append(unit + step)
        first_pair += run.rows.num_rows
    counts = np.array([sum(len(part) for part in unit) for unit in hidden], np.int64)
    empty = [np.empty(0, np.int64)]
    return (
        np.concatenate([part for unit in hidden for part in unit] or empty),
        np.concatenate([part for unit in units for part in unit] or empty),
        counts,
    )


def _to(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return to_device(torch.from_numpy(np.ascontiguousarray(array)), device)
