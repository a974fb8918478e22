"""The lists of work against plain loops."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs triton")

from server.model.cuda.attention import SPLIT
from server.model.cuda.lora import TILE
from server.model.cuda.work import attention_work, lora_work
from server.model.lora_batch import TokenRun
from server.model.rank_rows import RankRows, RowFormat
from tests.kits.engines import place, random_adapter
from tests.kits.properties import num_examples
from tests.server.model.test_rank_rows import SHAPE

ROWS = RankRows(
    SHAPE, max_rank=160, row_format=RowFormat(torch.float32, torch.float32), device=torch.device("cpu")
)
PLACEMENTS = place(
    ROWS,
    [
        random_adapter(SHAPE, 0, rank=1),
        random_adapter(SHAPE, 1, rank=40),
        random_adapter(SHAPE, 2, rank=17, modules=["q_proj", "v_proj", "down_proj"]),
        random_adapter(SHAPE, 3, rank=16, modules=["k_proj", "up_proj"]),
    ],
)
blends = st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True)


def items_by_loops(runs: Sequence[TokenRun], group: str) -> tuple[list[list[int]], list[list[int]]]:
    items: list[list[int]] = []
    ranges: list[list[int]] = []
    layout = ROWS.layouts[group]
    for run in runs:
        for first in range(run.start, run.stop, TILE):
            borders = [len(items)]
            for name in layout.modules:
                for placement, weight in run.parts:
                    if group not in placement:
                        continue
                    at = placement[group]
                    for module in at.rows.modules:
                        for row in range(0, module.rank if module.module == name else 0, TILE):
                            width = module.out_features // layout.unit
                            items.append(
                                [
                                    first,
                                    min(TILE, run.stop - first),
                                    at.first_row + module.row + row,
                                    min(TILE, module.rank - row),
                                    at.first_unit + module.unit + row * width,
                                    int(np.float32(weight).view(np.int32)),
                                ]
                            )
                borders.append(len(items))
            ranges.append(borders)
    return items, ranges


@settings(max_examples=num_examples(40), deadline=None)
@given(st.lists(st.tuples(blends, st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=6))
def test_items_are_those_of_a_plain_loop(batch: list[tuple[list[int], int, int]]) -> None:
    runs, start = [], 0
    for blend, length, gap in batch:
        parts = tuple((PLACEMENTS[adapter], 0.5 - adapter) for adapter in blend)
        runs.append(TokenRun(start, start + length, parts))
        start += length + gap
    chunks, groups = lora_work(runs, ROWS.layouts)
    assert chunks.tolist() == [
        [first, min(TILE, run.stop - first)] for run in runs for first in range(run.start, run.stop, TILE)
    ]
    for group, found in groups.items():
        items, ranges = items_by_loops(runs, group)
        assert found.items.tolist() == items
        assert found.ranges.tolist() == ranges


@settings(max_examples=num_examples(40), deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3 * SPLIT), st.integers(1, 40)), min_size=1, max_size=6),
    st.sampled_from((1, 3, 4, 8)),
)
def test_every_token_attends_to_its_splits_once(sequences: list[tuple[int, int]], group: int) -> None:
    tables = [100 * row for row in range(len(sequences))]
    work = attention_work([a for a, _ in sequences], [a + n for a, n in sequences], tables, group)
    positions = [
        (row, position) for row, (start, new) in enumerate(sequences) for position in range(start, start + new)
    ]
    written: dict[int, tuple[int, int]] = {}  # the token and split of each part
    for first, tokens, position, table, split, part, stride in work.works.tolist():
        assert tokens <= TILE // group
        for i in range(tokens):
            assert positions[first + i] == (table // 100, position + i)
            assert part + i * stride not in written
            written[part + i * stride] = first + i, split
    assert sorted(written) == list(range(work.num_parts))
    for token, (first, num) in enumerate(work.parts.tolist()):
        assert [written[first + i] for i in range(num)] == [(token, split) for split in range(num)]
        assert num * SPLIT > positions[token][1]
