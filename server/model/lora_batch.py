"""The adapters of one flat batch: the rows of A and B that each token uses, and the adapters' weights.

Successive tokens that share their adapters are a run. A long run, of `MIN_BLOCK` tokens or more, uses dense
products, one adapter after the other. All short runs are computed together. Their products with A are dense for
each run of `MIN_DENSE` tokens or more; for the others, only the products of each token with its adapters' rows are
computed. One call then sums the rows of B for all short runs. The indices are built once per step and serve every
layer: the host adds up tables that each adapter got when it was placed (`Placement.table`), and the device expands
them. On 2 cores, for q·k·v at rank 16, the sum over B takes 7 µs for one token and 20 µs for 32 tokens; a bf16
matrix product takes 22–30 µs for each of q, k and v. `rank_rows` explains rows, units and groups.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

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


class TokenRun(NamedTuple):
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
        long = [run for run in runs if run.stop - run.start >= MIN_BLOCK]
        self._blocks = {
            group: [
                _Block(run.start, run.stop, placement[group], weight)
                for run in long
                for placement, weight in run.parts
                if group in placement
            ]
            for group in rows.layouts
        }
        self._tokens, self._short = _plan_short(short, rows) if short else (slice(0, 0), {})

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


@dataclass(frozen=True, eq=False)
class _TokenParts:
    """The tokens of all short runs, numbered from 0, and each token's parts, in the order of the tokens."""

    lengths: _Ints  # (runs,): each run's number of tokens
    num_parts: _Ints  # (tokens,): at least 1
    table: _Ints  # (parts, modules, 3): `Placement.table` of each token's parts
    weights: npt.NDArray[np.float64]  # (parts,)

    @classmethod
    def of(cls, runs: Sequence[TokenRun]) -> "_TokenParts":
        lengths = np.array([run.stop - run.start for run in runs])
        counts = np.array([len(run.parts) for run in runs])
        tables = np.concatenate([placement.table for run in runs for placement, _ in run.parts])
        table, weights = tables.reshape(counts.sum(), -1, 3), np.array([w for run in runs for _, w in run.parts])
        num_parts = np.repeat(counts, lengths)
        if len(num_parts) > len(runs):  # a run's tokens share its parts
            firsts = np.repeat(_starts(counts), lengths) - _starts(num_parts)
            index = np.arange(num_parts.sum()) + np.repeat(firsts, num_parts)
            table, weights = table[index], weights[index]
        return cls(lengths, num_parts, table, weights)


class _Segments:
    """The terms of one group's sums, in segments.

    A unit is `layout.unit` successive features of a module's output, or the part of a row of B that adds to them.
    An output unit of a token is a sum of terms. Each term is a unit of B times the product of the token with a row
    of A. The rows of one part's module are successive, and their terms are a segment. Segments are in the order of
    tokens, output units and parts.
    """

    def __init__(self, parts: _TokenParts, modules: slice, layout: GroupLayout) -> None:
        ranks, rows, units = np.moveaxis(parts.table[:, modules], 2, 0)  # each (parts, modules)
        self.first_rows, self.num_rows = rows[:, 0], ranks.sum(1)  # (parts,): rows of A
        self.num_pairs = int(self.num_rows.sum())
        pairs = _starts(self.num_rows)[:, None] + ranks.cumsum(1) - ranks  # (parts, modules)
        widths = np.array([layout.out_features[name] // layout.unit for name in layout.modules])  # units of a row
        module = np.repeat(np.arange(len(widths)), widths)  # (units,): of one token
        steps = np.arange(len(module)) - _starts(widths)[module]
        segments = np.empty((*ranks.shape[:1], len(module), 4), np.int64)
        for field, values in enumerate((ranks, pairs, units)):
            segments[..., field] = values[:, module]
        segments[..., 2] += steps
        segments[..., 3] = widths[module]
        counts, firsts = parts.num_parts, _starts(parts.num_parts)
        if len(ranks) > len(counts):  # a token's parts change places with its units
            token = np.repeat(np.arange(len(counts)), counts)
            nth = np.arange(len(ranks)) - firsts[token]
            place = (len(module) * firsts[token] + nth)[:, None] + np.arange(len(module)) * counts[token][:, None]
            ordered = np.empty((segments.shape[0] * len(module), 4), np.int64)
            ordered[place.ravel()] = segments.reshape(-1, 4)
        else:
            ordered = segments.reshape(-1, 4)
        self.lengths, self.pairs, self.units, self.widths = ordered.T  # each (segments,)
        ends = np.concatenate(([0], self.lengths.cumsum()))
        self.starts, self.num_terms = ends[:-1], int(ends[-1])
        units_before = (len(module) * firsts[:, None] + np.arange(len(module)) * counts[:, None]).ravel()
        self.bags = np.append(ends[units_before], ends[-1])  # (tokens * units + 1,)
        is_used = self.lengths > 0
        self.is_identity = bool((self.pairs == self.starts)[is_used].all())  # term i has pair i
        self.pairs_before = np.append(_starts(self.num_rows)[firsts], self.num_pairs)  # (tokens + 1,)

    def shrinks(self, runs: Sequence[TokenRun], lengths: _Ints) -> Iterator[tuple[slice, TokenRun | None]]:
        """Yield the ranges of tokens whose products with A are computed at once.

        A range is one run, if its products are dense, or else tokens of successive runs.
        """
        ends = lengths.cumsum()
        has_rows = self.pairs_before[ends] > self.pairs_before[ends - lengths]
        start = 0
        for index in np.flatnonzero(has_rows & ((lengths >= MIN_DENSE) | (len(runs) == 1))).tolist():
            stop = int(ends[index])
            first = stop - int(lengths[index])
            if self.pairs_before[first] > self.pairs_before[start]:
                yield slice(start, first), None
            yield slice(first, stop), runs[index]
            start = stop
        if self.num_pairs > self.pairs_before[start]:
            yield slice(start, int(ends[-1])), None

    def offsets(self, tokens: slice) -> _Ints:
        """Return how many pairs precede each of the tokens within their range, and how many the range has."""
        before: _Ints = self.pairs_before[tokens.start : tokens.stop + 1] - self.pairs_before[tokens.start]
        return before


def _plan_short(runs: Sequence[TokenRun], rows: RankRows) -> tuple[slice | torch.Tensor, dict[str, _Short]]:
    """Return the indices of the runs' tokens in the flat batch, and each group's products.

    The host plans segments and uploads them in one piece. The device expands them into the many
    more terms.
    """
    parts, groups, module = _TokenParts.of(runs), dict[str, _Segments](), 0
    for group, layout in rows.layouts.items():
        segments = _Segments(parts, slice(module, module + len(layout.modules)), layout)
        module += len(layout.modules)
        if segments.num_pairs:
            groups[group] = segments
    if not groups:
        return slice(0, 0), {}
    each = list(groups.values())
    ranges = {group: list(segments.shrinks(runs, parts.lengths)) for group, segments in groups.items()}
    sampled = [(groups[group], tokens) for group in groups for tokens, run in ranges[group] if run is None]
    is_contiguous = all(before.stop == after.start for before, after in pairwise(runs))
    is_weighted = bool((parts.weights != 1).any())

    lengths, widths = _joined(one.lengths for one in each), _joined(one.widths for one in each)
    starts, num_rows = _starts(lengths), _joined(one.num_rows for one in each)
    tables = [
        lengths,
        np.stack(
            (
                _joined(one.pairs for one in each) - starts,
                _joined(one.units for one in each) - starts * widths,
                widths,
            )
        ),
        num_rows,
        _joined(one.first_rows for one in each) - _starts(num_rows),
        np.tile(parts.weights, len(each) if is_weighted else 0).view(np.int64),
        *(() if is_contiguous else (np.concatenate([np.arange(run.start, run.stop) for run in runs]),)),
        *(segments.bags for segments in each),
        *(segments.offsets(tokens) for segments, tokens in sampled),
    ]
    sent = iter(_upload(tables, rows.device))
    num_terms, num_pairs = int(lengths.sum()), int(num_rows.sum())
    terms = torch.arange(num_terms, device=rows.device)
    segment = torch.repeat_interleave(next(sent), output_size=num_terms)
    pairs, units, steps = next(sent).view(3, -1).index_select(1, segment)
    pairs, units = pairs + terms, units + steps * terms
    part = torch.repeat_interleave(next(sent), output_size=num_pairs)
    a_rows = next(sent).index_select(0, part) + terms[:num_pairs]
    part_weights = next(sent).view(torch.float64).float()
    weights = part_weights.index_select(0, part) if is_weighted else None
    all_tokens = slice(runs[0].start, runs[-1].stop) if is_contiguous else next(sent)
    bags = [next(sent) for _ in each]
    plans, first_pair, first_term = {}, 0, 0
    for (group, segments), group_bags in zip(groups.items(), bags, strict=True):
        own = slice(first_pair, first_pair + segments.num_pairs)
        own_terms = slice(first_term, first_term + segments.num_terms)
        shrinks: list[_DenseShrink | _SampledShrink] = []
        for tokens, run in ranges[group]:
            if run is None:
                first, stop = segments.pairs_before[[tokens.start, tokens.stop]].tolist()
                chosen = Pairs(next(sent), a_rows[own][first:stop], rows.a[group].shape[1])
                shrinks.append(_SampledShrink(tokens, chosen))
            else:
                placed = [placement[group] for placement, _ in run.parts if group in placement]
                slices = (slice(at.first_row, at.first_row + at.rows.num_rows) for at in placed)
                shrinks.append(_DenseShrink(tokens, tuple(slices)))
        plans[group] = _Short(
            shrinks=tuple(shrinks),
            weights=None if weights is None else weights[own],
            hidden_index=None if segments.is_identity else pairs[own_terms],
            unit_index=units[own_terms],
            bags=group_bags,
        )
        first_pair, first_term = own.stop, own_terms.stop
    return all_tokens, plans


def _upload(arrays: Sequence[_Ints], device: torch.device) -> Sequence[torch.Tensor]:
    """Return the arrays on the device, flat, after one copy."""
    joined = to_device(torch.from_numpy(np.concatenate([array.ravel() for array in arrays])), device)
    parts: tuple[torch.Tensor, ...] = joined.split([array.size for array in arrays])
    return parts


def _joined(arrays: Iterable[_Ints]) -> _Ints:
    return np.concatenate(list(arrays))


def _starts(lengths: _Ints) -> _Ints:
    """Return where each range begins, if ranges of these lengths follow each other."""
    return lengths.cumsum() - lengths
