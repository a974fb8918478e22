"""The benchmark of a cluster's overhead, reduced, on a tiny base."""

import json
from pathlib import Path

import pytest

from benchmarks.cluster.__main__ import main
from benchmarks.cluster.report import Results, Row, markdown, targets
from benchmarks.cluster.systems import CLIENT, KINDS, RAY, REPLICA, SINGLE
from tests.benchmarks.kit import MACHINE, figures, made
from tests.cluster.conftest import needs_ray


def results(*, quick: bool = False, one: tuple[float, ...] = (90.0, 70.0, 85.0)) -> Results:
    speeds = {SINGLE: (100.0, 100.0, 100.0), "1 replica": one}
    spent = dict.fromkeys(KINDS, 2.0)
    rows = tuple(Row(name, tuple(map(figures, found)), (spent,) * 3) for name, found in speeds.items())
    return Results(made(quick=quick), MACHINE, "work", 1.0, rows)


def test_target_uses_each_rounds_ratio() -> None:
    (found,) = targets(results())
    assert found.reached is True
    assert found.measured.startswith("0.85 ")
    assert targets(results(one=(90.0, 70.0, 75.0)))[0].reached is False
    assert targets(results(quick=True))[0].reached is None
    assert "|1 replica|85.0 (70.0" in markdown(results())


@pytest.mark.slow
@pytest.mark.cluster
@needs_ray
def test_reduced_run(long_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--quick", "--dtype=fp32", "--threads=1", "--streams=4", "--replicas=1"]
    found = main([*flags, f"--model={long_base}", f"--home={tmp_path / 'home'}", f"--out={out}"])
    single, one = found.rows
    assert (single.name, one.name) == (SINGLE, "1 replica")
    assert found.same == 1.0
    for row in found.rows:
        assert all(figure.tokens_per_second > 0 for figure in row.figures)
        (spent,) = row.processor_ms
        assert min(spent[CLIENT], spent[REPLICA]) > 0
    assert single.processor_ms[0][RAY] == 0
    assert json.loads((out / "cluster.json").read_text())["made"]["quick"] is True
    assert not list(out.glob("scratch-*"))
