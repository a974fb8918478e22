"""The lists of work of one step, in int32, as the kernels read them. They are made with numpy on the host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.model.cuda.attention import SPLIT
from server.model.cuda.lora import TILE
from server.model.lora_batch import TokenRun
from server.model.rank_rows import GroupLayout

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class GroupItems:
    """The work of one group of modules: `lora_shrink`'s and `lora_expand`'s items, and where modules begin."""

    items: Ints  # (items, lora.FIELDS)
    ranges: Ints  # (chunks, modules + 1)


def lora_work(runs: Sequence[TokenRun], layouts: Mapping[str, GroupLayout]) -> tuple[Ints, dict[str, GroupItems]]:
    """Return the chunks (chunks, 2) of the runs' tokens, and each group's items.

    Runs must have adapters. Items are in the order of chunks, modules, adapters and rows of A.
    """
    lengths = np.array([run.stop - run.start for run in runs], np.int64)
    num_chunks = -(-lengths // TILE)
    run_of = np.repeat(np.arange(len(runs)), num_chunks)  # (chunks,)
    offsets = TILE * (np.arange(len(run_of)) - _starts(num_chunks)[run_of])
    first_tokens = np.array([run.start for run in runs], np.int64)[run_of] + offsets
    num_tokens = np.minimum(lengths[run_of] - offsets, TILE)

    counts = np.array([len(run.parts) for run in runs])
    tables = np.concatenate([placement.table for run in runs for placement, _ in run.parts])
    weights = np.array([weight for run in runs for _, weight in run.parts], np.float32).view(np.int32)
    num_parts = counts[run_of]  # of each chunk
    firsts = _starts(num_parts)
    chunk = np.repeat(np.arange(len(run_of)), num_parts)  # (parts,)
    nth = np.arange(len(chunk)) - firsts[chunk]
    part = _starts(counts)[run_of][chunk] + nth
    table = tables.reshape(len(weights), -1, 3)[part]  # (parts, modules, 3)

    groups, module = {}, 0
    for group, layout in layouts.items():
        num_modules = len(layout.modules)
        own = table[:, module : module + num_modules]
        module += num_modules
        place = num_modules * firsts[chunk, None] + np.arange(num_modules) * num_parts[chunk, None] + nth[:, None]
        segments = np.empty((own.shape[0] * num_modules, 5), np.int64)  # one for each chunk, module and part
        segments[place.ravel(), :3] = own.reshape(-1, 3)
        segments[place.ravel(), 3] = np.repeat(chunk, num_modules)
        segments[place.ravel(), 4] = np.repeat(weights[part], num_modules)
        ranks, rows, units, chunks, bits = segments.T
        tiles = -(-ranks // TILE)
        segment = np.repeat(np.arange(len(ranks)), tiles)
        row = TILE * (np.arange(len(segment)) - _starts(tiles)[segment])
        widths = np.array([layout.out_features[name] // layout.unit for name in layout.modules])
        width = widths[(segment - num_modules * firsts[chunks[segment]]) // num_parts[chunks[segment]]]
        items = np.stack(
            (
                first_tokens[chunks[segment]],
                num_tokens[chunks[segment]],
                rows[segment] + row,
                np.minimum(ranks[segment] - row, TILE),
                units[segment] + row * width,
                bits[segment],
            ),
            axis=1,
        )
        ends = np.concatenate(([0], tiles.cumsum()))
        borders = num_modules * firsts[:, None] + np.arange(num_modules + 1) * num_parts[:, None]
        groups[group] = GroupItems(items.astype(np.int32), ends[borders].astype(np.int32))
    return np.stack((first_tokens, num_tokens), axis=1).astype(np.int32), groups


@dataclass(frozen=True, eq=False)
class AttentionWork:
    """The lists of `attention_split` and `attention_combine`, and the number of parts between them."""

    works: Ints  # (works, attention.FIELDS)
    parts: Ints  # (tokens, 2)
    num_parts: int


def attention_work(
    starts: npt.ArrayLike, stops: npt.ArrayLike, tables: npt.ArrayLike, group: int
) -> AttentionWork:
    """Return the work for new tokens at positions [start, stop) of each sequence, in the order of the sequences.

    `tables` has where each sequence's pages begin. `group` is how many query heads share a key head.
    """
    per_work = TILE // group  # tokens
    first, new = np.array(starts, np.int64), np.array(stops, np.int64) - np.array(starts, np.int64)
    num_blocks = -(-new // per_work)
    sequence = np.repeat(np.arange(len(new)), num_blocks)  # (blocks,): of up to per_work tokens
    offset = per_work * (np.arange(len(sequence)) - _starts(num_blocks)[sequence])
    tokens = np.minimum(new[sequence] - offset, per_work)
    position = first[sequence] + offset
    splits = -(-(position + tokens) // SPLIT)
    parts = _starts(splits * tokens)  # a block's first part
    block = np.repeat(np.arange(len(sequence)), splits)  # (works,)
    split = np.arange(len(block)) - _starts(splits)[block]
    works = np.stack(
        (
            (_starts(new)[sequence] + offset)[block],
            tokens[block],
            position[block],
            np.array(tables, np.int64)[sequence][block],
            split,
            parts[block] + split,
            splits[block],
        ),
        axis=1,
    )
    token_block = np.repeat(np.arange(len(sequence)), tokens)
    nth = np.arange(len(token_block)) - _starts(tokens)[token_block]
    of_tokens = np.stack((parts[token_block] + nth * splits[token_block], splits[token_block]), axis=1)
    return AttentionWork(works.astype(np.int32), of_tokens.astype(np.int32), int((splits * tokens).sum()))


def _starts(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where each range begins, if ranges of these lengths follow each other."""
    return lengths.cumsum() - lengths
