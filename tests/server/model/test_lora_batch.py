"""The served low-rank path compared with the dense `ops.lora.add_dense`, and with W + Σ w s B A itself."""

import sys
from collections import Counter
from collections.abc import Sequence
from types import FrameType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.lora import MODULES, BaseShape, LoraWeights, ModuleKey
from server.model import lora_batch
from server.model.device import to_device
from server.model.lora_batch import MIN_BLOCK, MIN_DENSE, LoraBatch, Parts, TokenRun
from server.model.ops.linear import add_dense
from server.model.rank_rows import GROUPS, Placement, RankRows, RowFormat, Run
from tests.kits.engines import place, random_adapter
from tests.kits.properties import num_examples
from tests.server.model.test_rank_rows import CPU, SHAPE

ADAPTERS: list[LoraWeights] = [
    random_adapter(SHAPE, 0, rank=1),
    random_adapter(SHAPE, 1, rank=8),
    random_adapter(SHAPE, 2, rank=3, modules=["q_proj", "down_proj"]),
    random_adapter(SHAPE, 3, rank=16, modules=["k_proj", "v_proj", "up_proj"], layers=[0, 2]),
    random_adapter(SHAPE, 4, rank=lambda key: 1 + (7 * key.layer + len(key.module)) % 6),
    random_adapter(SHAPE, 5, rank=2, modules=["gate_proj"], layers=[1]),
    random_adapter(SHAPE, 6, rank=5, modules=["o_proj"]),
]
Blend = tuple[tuple[int, float], ...]  # (adapter, weight)


def pool(dtype: torch.dtype = torch.float32) -> tuple[RankRows, list[Parts]]:
    """Return the adapters in a pool, each as a single part with weight 1."""
    rows = RankRows(SHAPE, max_rank=96, row_format=RowFormat.of_torch(dtype, CPU), device=CPU)
    return rows, [((placement, 1.0),) for placement in place(rows, ADAPTERS)]


ROWS, SINGLES = pool()


def parts_of(blend: Blend, singles: Sequence[Parts] = SINGLES) -> Parts:
    return tuple((singles[adapter][0][0], weight) for adapter, weight in blend)


def runs_of(blends: Sequence[tuple[Blend, int]], singles: Sequence[Parts] = SINGLES) -> tuple[list[TokenRun], int]:
    runs, start = [], 0
    for blend, length in blends:
        if blend:
            runs.append(TokenRun(start, start + length, parts_of(blend, singles)))
        start += length
    return runs, start


def by_hand(shape: BaseShape, layer: int, group: str, blend: Blend, x: torch.Tensor) -> torch.Tensor:
    """Compute Σ weight · scaling · B A x in double precision, with the modules' outputs concatenated."""
    outputs = []
    for name in GROUPS[group]:
        total = torch.zeros(x.shape[0], shape.features[name][0], dtype=torch.float64)
        for adapter, weight in blend:
            module = ADAPTERS[adapter].modules.get(ModuleKey(layer, name))
            if module is not None:
                total += weight * module.scaling * (x.double() @ module.a.double().t() @ module.b.double().t())
        outputs.append(total)
    return torch.cat(outputs, -1)


def dense_line(rows: RankRows, layer: int, group: str, runs: Sequence[TokenRun], x: torch.Tensor) -> torch.Tensor:
    """Compute `add_dense` over every row of the pool."""
    a = rows.a[group][layer].nan_to_num()
    b = torch.zeros(a.shape[0], sum(rows.layouts[group].out_features.values()))
    gates = torch.zeros(x.shape[0], a.shape[0])
    unit = rows.layouts[group].unit
    for run in runs:
        for placement, weight in run.parts:
            place = placement.get(group)
            if place is None:
                continue
            gates[run.start : run.stop, place.first_row : place.first_row + place.rows.num_rows] = weight
            for module in place.rows.modules:
                first = place.first_unit + module.unit
                units = rows.b[group][layer, first : first + module.rank * module.out_features // unit]
                row = place.first_row + module.row
                b[row : row + module.rank, module.out_start : module.out_start + module.out_features] = (
                    units.reshape(module.rank, module.out_features).float()
                )
    return add_dense(torch.zeros(x.shape[0], b.shape[1]), x.float(), a.float(), b, gates)


def check(blends: Sequence[tuple[Blend, int]], seed: int = 0) -> None:
    runs, tokens = runs_of(blends)
    batch = LoraBatch(ROWS, runs)
    generator = torch.Generator().manual_seed(seed)
    for group, layout in ROWS.layouts.items():
        for layer in range(SHAPE.num_layers):
            x = torch.randn(tokens, layout.in_features, generator=generator)
            y = torch.randn(tokens, sum(layout.out_features.values()), generator=generator)
            with torch.inference_mode():
                found = batch.add(layer, group, x, y.clone()) - y
            expected = torch.cat(
                [
                    by_hand(SHAPE, layer, group, blend, part)
                    for (blend, _), part in zip(blends, x.split([n for _, n in blends]), strict=True)
                ]
            )
            scale = 1 + float(expected.abs().max())
            assert (found - expected).abs().max() <= 1e-5 * scale
            assert (found - dense_line(ROWS, layer, group, runs, x)).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("length", [1, MIN_DENSE, MIN_BLOCK, 3 * MIN_BLOCK], ids="{} tokens".format)
@pytest.mark.parametrize("adapter", range(len(ADAPTERS)))
def test_one_adapter(adapter: int, length: int) -> None:
    check([(((adapter, 1.0),), length)])


@pytest.mark.parametrize("length", [1, MIN_DENSE - 1, MIN_DENSE, MIN_BLOCK - 1, MIN_BLOCK])
@pytest.mark.parametrize(
    "blend",
    [
        ((0, 0.5), (1, 0.5)),
        ((2, -1.0), (3, 2.0)),
        ((1, 0.7), (4, -0.3), (5, 1.0)),
        ((0, 1.0), (2, 1e-3), (3, -100.0), (6, 100.0)),
        ((6, 0.1), (5, 0.2), (4, 0.3), (3, 0.4), (2, -0.5)),
        tuple((i, (-1.0) ** i) for i in range(len(ADAPTERS))),
    ],
    ids=str,
)
def test_compositions(blend: Blend, length: int) -> None:
    check([(blend, length)])


def test_a_batch_of_everything() -> None:
    """Decodes of many adapters, base tokens between and around them, blocks and short runs."""
    check(
        [
            ((), 2),
            (((0, 1.0),), 1),
            (((1, -0.5), (4, 2.0)), 1),
            ((), 1),
            (((5, 1.0),), 2),
            (((6, 1.0), (2, 1.0)), MIN_DENSE + 2),
            (((3, 1.0),), 1),
            (((3, 1.0), (5, 1.0)), MIN_BLOCK),
            ((), 5),
            (((1, 1.0),), MIN_DENSE - 1),
            (((5, 1.0),), MIN_DENSE),
            (((0, -3.0), (1, 1.0)), MIN_BLOCK + 1),
        ]
    )


weights = st.floats(-100, 100, allow_nan=False, width=32).filter(lambda weight: abs(weight) > 1e-3)
blends = st.lists(
    st.tuples(st.integers(0, len(ADAPTERS) - 1), weights), max_size=5, unique_by=lambda part: part[0]
)


lengths = st.integers(1, MIN_DENSE + 2) | st.sampled_from((MIN_BLOCK - 1, MIN_BLOCK))


@settings(max_examples=num_examples(60), deadline=None)
@given(st.lists(st.tuples(blends.map(tuple), lengths), min_size=1, max_size=10), st.integers(0, 99))
def test_any_batch(batch: list[tuple[Blend, int]], seed: int) -> None:
    check(batch, seed)


def test_no_runs_change_nothing() -> None:
    y = torch.randn(3, 60)
    with torch.inference_mode():
        assert torch.equal(LoraBatch(ROWS, []).add(0, "qkv", torch.randn(3, 36), y.clone()), y)


def test_others_have_no_part_in_a_tokens_sums() -> None:
    """Not even through NaN or infinity."""
    blend: Blend = ((1, 0.5), (3, -2.0), (4, 1.0))
    for length in (1, MIN_DENSE, MIN_BLOCK):
        others = [(((0, 1.0),), 1), (((5, 1.0), (6, 1.0)), MIN_DENSE), (((2, 1.0),), MIN_BLOCK)]
        runs, tokens = runs_of([*others, (blend, length), *others])
        own = slice(tokens // 2 - length // 2, tokens // 2 - length // 2 + length)
        for group, layout in ROWS.layouts.items():
            out = sum(layout.out_features.values())
            x = torch.full((tokens, layout.in_features), float("nan"))
            x[own] = torch.randn(length, layout.in_features)
            with torch.inference_mode():
                alone = LoraBatch(ROWS, runs_of([(blend, length)])[0]).add(
                    1, group, x[own], torch.zeros(length, out)
                )
                found = LoraBatch(ROWS, runs).add(1, group, x, torch.zeros(tokens, out))[own]
            assert torch.allclose(found, alone, atol=1e-5 * float(1 + alone.abs().max()))


def test_bf16() -> None:
    rows, singles = pool(torch.bfloat16)
    batch_of: list[tuple[Blend, int]] = [
        (((1, 1.0),), 1),
        (((2, 0.5), (3, -0.5), (4, 1.0)), 1),
        ((), 1),
        (((1, 1.0), (4, -1.0)), MIN_DENSE),
        (((1, 1.0), (4, -1.0)), MIN_BLOCK),
    ]
    runs, tokens = runs_of(batch_of, singles)
    batch = LoraBatch(rows, runs)
    for group, layout in rows.layouts.items():
        x = torch.randn(tokens, layout.in_features).bfloat16()
        y = torch.zeros(tokens, sum(layout.out_features.values()), dtype=torch.bfloat16)
        with torch.inference_mode():
            found = batch.add(1, group, x, y)
        assert found.dtype is torch.bfloat16
        expected = torch.cat(
            [
                by_hand(SHAPE, 1, group, blend, part)
                for (blend, _), part in zip(batch_of, x.split([n for _, n in batch_of]), strict=True)
            ]
        )
        assert (found - expected).abs().max() <= 0.03 * expected.abs().max()
        assert (found - dense_line(rows, 1, group, runs, x)).abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("unit_sizes", [(6, 6, 6), (9, 3, 3), (7, 5, 3)], ids=str)
def test_output_sizes_of_any_ratio(unit_sizes: tuple[int, int, int]) -> None:
    features = dict(SHAPE.features)
    for name, out in zip(("q_proj", "k_proj", "v_proj"), unit_sizes, strict=True):
        features[name] = (out, 36)
    shape = BaseShape(1, features)
    weights = random_adapter(shape, 0, rank=3, modules=MODULES[:3])
    rows = RankRows(shape, max_rank=16, row_format=RowFormat.of_torch(torch.float32, CPU), device=CPU)
    (placement,) = place(rows, [weights])
    for length in (1, MIN_DENSE, MIN_BLOCK):
        x = torch.randn(length, 36)
        with torch.inference_mode():
            batch = LoraBatch(rows, [TokenRun(0, length, ((placement, -2.0),))])
            found = batch.add(0, "qkv", x, torch.zeros(length, sum(unit_sizes)))
        modules = [weights.modules[ModuleKey(0, name)] for name in MODULES[:3]]
        expected = torch.cat([-2.0 * m.scaling * (x @ m.a.t() @ m.b.t()) for m in modules], -1)
        assert torch.allclose(found, expected, atol=1e-4)


Term = tuple[int, int, int, int]
"""A token, a row of A, a unit of B, and the output unit of the token that this product adds to."""


def terms_of(rows: RankRows, group: str, runs: Sequence[TokenRun]) -> list[Term]:
    """Return the terms of short runs, in the order in which they are added, one adapter row at a time."""
    terms, layout, first_token = [], rows.layouts[group], 0
    for run in runs:
        if not run.parts or run.stop - run.start >= MIN_BLOCK:
            continue
        for token in range(first_token, first_token + run.stop - run.start):
            for output in range(layout.units_per_token):
                for placement, _ in run.parts:
                    for module in placement[group].rows.modules if group in placement else ():
                        step, width = output - module.out_start // layout.unit, module.out_features // layout.unit
                        if 0 <= step < width:
                            place = placement[group]
                            terms += [
                                (
                                    token,
                                    place.first_row + module.row + i,
                                    place.first_unit + module.unit + i * width + step,
                                    token * layout.units_per_token + output,
                                )
                                for i in range(module.rank)
                            ]
        first_token += run.stop - run.start
    return terms


@settings(max_examples=num_examples(40), deadline=None)
@given(st.lists(st.tuples(blends.map(tuple), lengths), min_size=1, max_size=10))
def test_terms_have_the_order_of_a_plain_loop(batch: list[tuple[Blend, int]]) -> None:
    """The order of the terms decides how sums are rounded."""
    runs, _ = runs_of(batch)
    planned = LoraBatch(ROWS, runs)._short
    for group in ROWS.layouts:
        expected = terms_of(ROWS, group, runs)
        assert (group in planned) == bool(expected)
        if not expected:
            continue
        plan = planned[group]
        pairs: list[tuple[int, int]] = []  # (token, row of A) in the order of the products with A
        for shrink in plan.shrinks:
            tokens = range(shrink.tokens.start, shrink.tokens.stop)
            if isinstance(shrink, lora_batch._DenseShrink):
                pairs += [(t, row) for t in tokens for at in shrink.rows for row in range(at.start, at.stop)]
            else:
                pairs += [
                    (t + tokens.start, row)
                    for t, row in zip(shrink.pairs.tokens.tolist(), shrink.pairs.rows.tolist(), strict=True)
                ]
        hidden = range(len(pairs)) if plan.hidden_index is None else plan.hidden_index.tolist()
        bags = plan.bags.tolist()
        outputs = [bag for bag in range(len(bags) - 1) for _ in range(bags[bag], bags[bag + 1])]
        found = [
            (*pairs[pair], unit, output)
            for pair, unit, output in zip(hidden, plan.unit_index.tolist(), outputs, strict=True)
        ]
        assert found == expected


@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_step_of_256_adapters_plans_without_a_loop_over_their_rows(
    num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One upload of at most 256 kB, and a bounded number of calls for each adapter."""
    width, inner, keys = 576, 1536, 192  # SmolLM-135M's
    outputs = (width, keys, keys, width, inner, inner, width)
    inputs = (width, width, width, width, width, width, inner)
    shape = BaseShape(1, dict(zip(MODULES, zip(outputs, inputs, strict=True), strict=True)))
    rows = RankRows(shape, max_rank=16 * 256, row_format=RowFormat.of_torch(torch.float32, CPU), device=CPU)
    needs = rows.layout.needs(dict.fromkeys(shape.features, 16))
    placements = [
        Placement({group: Run(need, i * need.num_rows, i * need.num_units) for group, need in needs.items()})
        for i in range(256)
    ]
    uploads: list[int] = []

    def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        uploads.append(tensor.nbytes)
        return to_device(tensor, device)

    monkeypatch.setattr(lora_batch, "to_device", upload)

    def calls(num: int) -> int:
        runs = [
            TokenRun(i, i + 1, tuple((placements[(i + part) % 256], 0.5) for part in range(num_parts)))
            for i in range(num)
        ]
        counts: Counter[str] = Counter()

        def count(frame: FrameType, event: str, argument: object) -> None:
            counts[event] += 1

        sys.setprofile(count)
        try:
            LoraBatch(rows, runs)
        finally:
            sys.setprofile(None)
        return counts["call"] + counts["c_call"]

    calls(2)
    few, many = calls(6), calls(256)
    assert len(uploads) == 3
    assert uploads[-1] <= 256_000
    assert many - few <= 3 * 250, "planned one row or unit after the other"
