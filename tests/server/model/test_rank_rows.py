"""Rows of adapters in a pool: their sizes, exact copies, and nothing else written."""

import ctypes
import mmap
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.lora import MODULES, BaseShape, LoraWeights, ModuleKey
from server.model.huge_pages import HUGE_PAGE, in_huge_pages, take_pages
from server.model.native.model import ROW_FORMAT
from server.model.rank_rows import GROUPS, GroupLayout, GroupRows, RankRows, RowFormat, Run
from tests.kits.engines import place, random_adapter

SHAPE = BaseShape(
    3,
    {
        "q_proj": (30, 36),
        "k_proj": (10, 36),
        "v_proj": (20, 36),
        "o_proj": (36, 30),
        "gate_proj": (50, 36),
        "up_proj": (50, 36),
        "down_proj": (36, 50),
    },
)
CPU = torch.device("cpu")


def pool(max_rank: int = 32, dtype: torch.dtype = torch.float32) -> RankRows:
    return RankRows(SHAPE, max_rank=max_rank, row_format=RowFormat.of_torch(dtype, CPU), device=CPU)


def dense(rows: RankRows, layer: int, group: str, run: Run) -> dict[str, torch.Tensor]:
    """Return each module's (out, in) matrix in an adapter's run, including scaling."""
    found = {}
    unit = rows.layouts[group].unit
    for module in run.rows.modules:
        a = rows.a[group][layer, run.first_row + module.row :][: module.rank].double()
        first = run.first_unit + module.unit
        b = rows.b[group][layer, first : first + module.rank * module.out_features // unit].double()
        found[module.module] = b.reshape(module.rank, module.out_features).t() @ a
    return found


def assert_holds(rows: RankRows, weights: LoraWeights, placement: dict[str, Run] | object) -> None:
    assert isinstance(placement, dict)
    seen = set()
    for group, run in placement.items():
        for layer in range(SHAPE.num_layers):
            for name, matrix in dense(rows, layer, group, run).items():
                module = weights.modules.get(ModuleKey(layer, name))
                if module is None:
                    assert not matrix.any()
                    continue
                seen.add(ModuleKey(layer, name))
                expected = module.scaling * (module.b.double() @ module.a.double())
                assert torch.allclose(matrix, expected, atol=1e-5)
    assert seen == set(weights.modules)


def test_layouts_are_the_fused_groups() -> None:
    assert sum(GROUPS.values(), ()) == MODULES
    qkv = GroupLayout.of("qkv", SHAPE)
    assert (qkv.in_features, qkv.unit, qkv.units_per_token) == (36, 10, 6)
    gate_up = GroupLayout.of("gate_up", SHAPE)
    assert (gate_up.in_features, gate_up.unit, gate_up.units_per_token) == (36, 50, 2)


def test_needs_follow_each_modules_rank() -> None:
    ranks = {"q_proj": 4, "v_proj": 2, "down_proj": 3}
    weights = random_adapter(SHAPE, 0, rank=lambda key: ranks[key.module], modules=ranks)
    needs = pool().needs(weights)
    assert set(needs) == {"qkv", "down"}
    assert (needs["qkv"].num_rows, needs["qkv"].num_units) == (6, 4 * 3 + 2 * 2)
    assert [(m.module, m.row, m.unit, m.out_start) for m in needs["qkv"].modules] == [
        ("q_proj", 0, 0, 0),
        ("v_proj", 4, 12, 40),
    ]
    assert (needs["down"].num_rows, needs["down"].num_units) == (3, 3)


def test_a_module_needs_the_largest_of_its_layers_ranks() -> None:
    weights = random_adapter(SHAPE, 0, rank=lambda key: 1 + 3 * key.layer, modules=["o_proj"])
    assert pool().needs(weights)["o"].num_rows == 7


def test_an_adapter_without_modules_needs_nothing() -> None:
    assert pool().needs(LoraWeights({})) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_adapters_lie_exactly_in_their_rows(dtype: torch.dtype) -> None:
    adapters = [
        random_adapter(SHAPE, 0, rank=5),
        random_adapter(SHAPE, 1, rank=lambda key: 1 + (key.layer * 5 + len(key.module)) % 4, dtype=dtype),
        random_adapter(SHAPE, 2, rank=1, modules=["k_proj", "up_proj"], layers=[2], dtype=dtype),
        random_adapter(SHAPE, 3, rank=8, modules=["v_proj"], layers=[0, 2]),
    ]
    rows = pool()
    for weights, placement in zip(adapters, place(rows, adapters), strict=True):
        assert_holds(rows, weights, placement)


def test_placing_touches_no_other_row() -> None:
    rows = pool()
    (placement,) = place(rows, [random_adapter(SHAPE, 0, rank=3)])
    for group, run in placement.items():
        inside_a = slice(run.first_row, run.first_row + run.rows.num_rows)
        inside_b = slice(run.first_unit, run.first_unit + run.rows.num_units)
        for tensor, inside in ((rows.a[group], inside_a), (rows.b[group], inside_b)):
            assert tensor[:, inside].isfinite().all()
            touched = tensor.isfinite().any(-1).any(0)
            assert touched.sum() == inside.stop - inside.start


def test_rows_can_be_written_again() -> None:
    rows = pool()
    first, second = random_adapter(SHAPE, 0, rank=4), random_adapter(SHAPE, 1, rank=4, layers=[1])
    (placement,) = place(rows, [first])
    rows.place(second, placement)
    assert_holds(rows, second, placement)


def test_an_adapter_of_another_base_is_an_error() -> None:
    features = dict(SHAPE.features) | {"o_proj": (36, 31)}
    weights = random_adapter(BaseShape(3, features), 0, rank=2)
    rows = pool()
    placement = {group: Run(needs, 0, 0) for group, needs in rows.needs(weights).items()}
    with pytest.raises(RuntimeError):
        rows.place(weights, placement)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reported_bytes_equal_the_allocation(dtype: torch.dtype) -> None:
    rows = pool(max_rank=7, dtype=dtype)
    allocated = sum(tensor.nbytes for tensor in (*rows.a.values(), *rows.b.values()))
    assert allocated == 7 * RowFormat.of_torch(dtype, CPU).bytes_per_rank(SHAPE)
    full = rows.needs(random_adapter(SHAPE, 0, rank=7))
    assert all(full[group].num_rows == rows.num_rows(group) for group in GROUPS)
    assert all(full[group].num_units == rows.num_units(group) for group in GROUPS)


def test_packed_rows_are_pairs() -> None:
    """As read by `lora/group.h`: an odd rank gets a row of zeros, a pool of odd size has room for one adapter of
    that rank, and a run's layers are contiguous."""
    shape = BaseShape(2, dict.fromkeys(MODULES, (64, 32)))
    packed = RowFormat(torch.bfloat16, torch.bfloat16, 32)
    rows = RankRows(shape, max_rank=7, row_format=packed, device=CPU)
    weights = random_adapter(shape, 0, rank=3, modules=["q_proj", "k_proj"], dtype=torch.bfloat16)
    needs = rows.needs(weights)["qkv"]
    assert [(module.rank, module.row) for module in needs.modules] == [(4, 0), (4, 4)]
    for tensor in (rows.a["qkv"], rows.b["qkv"]):
        tensor.fill_(float("nan"))
    run = Run(needs, 6, 5)
    rows.place(weights, {"qkv": run})
    for layer in range(2):
        a = rows.a["qkv"][2 * 6 + layer * 8 :][:8].reshape(16, 8, 2)
        b_of_layer = rows.b["qkv"].flatten()[(2 * 5 + layer * needs.num_units) * 64 :]
        for module in needs.modules:
            whole = weights.modules[ModuleKey(layer, module.module)]
            b = b_of_layer[module.unit * 64 :][: 4 * 64].view(2, 2, 32, 2)
            for row in range(4):
                found_a, found_b = a[:, module.row + row].flatten(), b[:, row // 2, :, row % 2].flatten()
                if row == 3:
                    assert not found_a.any()
                    assert not found_b.any()
                else:
                    assert torch.equal(found_a, (whole.a[row].float() * whole.scaling).bfloat16())
                    assert torch.equal(found_b, whole.b[:, row])
    for tensor, of_run in zip((rows.a["qkv"], rows.b["qkv"]), rows.run("qkv", run), strict=True):
        assert tensor.isfinite().sum() == of_run.numel()  # nothing else was written


def pages_there(part: torch.Tensor) -> float:
    """Return the share of the part's pages that the system has allocated."""
    first = part.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = part.data_ptr() + part.nbytes - first
    found = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    assert not ctypes.CDLL(None).mincore(
        ctypes.c_void_p(first), ctypes.c_size_t(size), ctypes.c_void_p(found.ctypes.data)
    )
    return float((found & 1).mean())


def flags_of(tensor: torch.Tensor) -> set[str]:
    """Return the kernel's flags of the tensor's memory."""
    is_in = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            start, end = (int(border, 16) for border in name.split("-"))
            is_in = start <= tensor.data_ptr() < end
        elif is_in and name == "VmFlags:":
            return set(rest)
    raise AssertionError("it lies nowhere")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is read")
def test_huge_pages_are_requested_if_the_kernel_has_them() -> None:
    """The kernel uses huge pages for shared memory (`sh`) only if another setting, off by default, allows it."""
    flags = flags_of(in_huge_pages(4, HUGE_PAGE // 2, dtype=torch.float16))
    assert "sh" not in flags
    assert "hg" in flags or not Path("/sys/kernel/mm/transparent_hugepage").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="mincore is asked")
def test_pages_taken_ahead_keep_their_contents() -> None:
    rows = in_huge_pages(16, HUGE_PAGE // 2, dtype=torch.float16)  # sixteen huge pages
    assert pages_there(rows) == 0
    rows[3].fill_(7.0)
    take_pages(rows[2:5])
    assert [pages_there(row) for row in rows[1:6]] == [0, 1, 1, 1, 0]
    assert (rows[3] == 7).all()
    take_pages(rows[16:])  # of nothing


@pytest.mark.skipif(sys.platform != "linux", reason="mincore is asked")
def test_the_next_adapter_finds_its_pages_taken() -> None:
    """At first for rank 16 on all modules, then for as many ranks as the last adapter; never more than one
    ahead."""
    shape = BaseShape(30, dict.fromkeys(MODULES, (1536, 1536)))
    packed = RowFormat(torch.bfloat16, torch.bfloat16, 32)
    rows = RankRows(shape, max_rank=512, row_format=packed, device=CPU)
    weights = random_adapter(shape, 0, rank=64, modules=["q_proj"], dtype=torch.bfloat16)
    need = rows.needs(weights)["qkv"]
    ranks = 3 * 16  # a third of the pool's rows for one module
    one = replace(need, num_rows=1)
    more = HUGE_PAGE // rows.run("qkv", Run(one, 0, 0))[0].nbytes + 1  # more than the rest of a huge page
    for rank, there in ((0, True), (ranks - 1, True), (ranks + more, False)):
        run = Run(one, rank, 0)
        assert (pages_there(rows.run("qkv", run)[0]) == 1) == there
    first, second, third = (Run(need, 64 * i, 64 * i) for i in range(3))
    rows.place(weights, {"qkv": first})
    rows.take_ahead()
    for part in rows.run("qkv", second):
        assert pages_there(part) == 1
    for part in rows.run("qkv", third):
        assert pages_there(part) < 0.5
    expected = rows.run("qkv", first)[0].clone()
    assert expected.any()
    rows.take_ahead()
    assert torch.equal(rows.run("qkv", first)[0], expected)


@pytest.mark.parametrize(
    "row_format", [RowFormat.of_torch(torch.float32, CPU), ROW_FORMAT], ids=["torch", "native"]
)
def test_a_run_is_moved_with_all_of_its_layers_also_to_rows_that_it_overlaps(row_format: RowFormat) -> None:
    rows = RankRows(SHAPE, max_rank=16, row_format=row_format, device=CPU)
    for tensor in (*rows.a.values(), *rows.b.values()):
        tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) % 251)
    for group, layout in rows.layouts.items():
        needs = GroupRows((), 6, 2 * layout.units_per_token)
        before = Run(needs, 5, 3 * layout.units_per_token)
        after = Run(needs, 3, layout.units_per_token)  # rows 3 to 8 were 5 to 10
        expected = [tensor.clone() for tensor in rows.run(group, before)]
        rows.move(group, "rows", before.first_row, needs.num_rows, after.first_row)
        rows.move(group, "units", before.first_unit, needs.num_units, after.first_unit)
        for moved, tensor in zip(rows.run(group, after), expected, strict=True):
            assert torch.equal(moved, tensor)
