"""The scaling curves: their loads, their report, and one reduced run on a tiny base."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from benchmarks.prompts import PromptSource
from benchmarks.scaling.__main__ import main
from benchmarks.scaling.loads import BASE, CURVES, EACH, UNIFORM, ZIPF, Load, Plan, Scale
from benchmarks.scaling.register import register
from benchmarks.scaling.report import markdown
from benchmarks.scaling.results import Curve, Point, Results
from benchmarks.scaling.run import Bench, measure
from benchmarks.serving.adapter_files import RANK, Sizes
from benchmarks.serving.systems.server_process import ServerConfig
from benchmarks.serving.systems.wires import Part
from server.model.base.weights import BaseModel
from tests.benchmarks.kit import figures, scaling


def plan(name: str) -> Plan:
    return CURVES[name](Scale.full(registered=1000, pool=256, max_positions=8192))


def load(name: str, series: str, x: int) -> Load:
    (found,) = (load for load in plan(name).loads if (load.series, load.x) == (series, x))
    return found


def drawn(load: Load) -> Counter[str]:
    draw = Random(0)
    return Counter(part.name for _ in range(2000) for part in load.parts(0, draw))


def test_requests_draw_distinct_adapters() -> None:
    adapters = plan("adapters")
    assert [load.x for load in adapters.loads if load.series == UNIFORM] == [1, 4, 16, 64, 250, 1000]
    assert (len(adapters.adapters), adapters.room) == (1000, 256 * RANK)
    assert load("adapters", BASE, 0).parts(3, Random(0)) == ()
    uniform, zipf = drawn(load("adapters", UNIFORM, 4)), drawn(load("adapters", ZIPF, 4))
    assert set(uniform) == set(zipf) == {"r16-0", "r16-1", "r16-2", "r16-3"}
    assert all(450 < count < 550 for count in uniform.values())
    # 1 / k of the first four, whose sum is 25/12
    assert [zipf[f"r16-{place}"] / 2000 for place in range(4)] == pytest.approx([0.48, 0.24, 0.16, 0.12], abs=0.03)


def test_every_stream_has_its_adapters() -> None:
    rank = load("ranks", "8 adapters", 512)
    assert [rank.parts(stream, Random(0)) for stream in (0, 7)] == [(Part("r512-0"),), (Part("r512-7"),)]
    assert {load("ranks", "1 adapter", 4).parts(stream, Random(0)) for stream in range(8)} == {(Part("r4-0"),)}
    blend = load("blends", "blends", 4)
    assert blend.parts(6, Random(0)) == tuple(Part(f"r16-{index}", 0.25) for index in (6, 7, 0, 1))
    assert plan("ranks").room == 8 * (4 + 16 + 64 + 256 + 512)
    streams = plan("streams")
    assert (streams.max_num_seqs, streams.room) == (64, 64 * RANK)
    assert len(load("streams", EACH, 64).adapters) == 64
    beside = [(load.series, load.x) for load in streams.loads[:4]]
    assert beside == [(BASE, 1), (EACH, 1), (BASE, 2), (EACH, 2)], "what is compared is measured together"


def test_contexts_include_the_answer() -> None:
    loads = plan("context").loads
    assert {(load.x, load.prompt_tokens + load.max_tokens) for load in loads} == {
        (length, length) for length in (128, 512, 2048, 8192)
    }
    shorter = CURVES["context"](Scale.full(registered=1000, pool=256, max_positions=2048))
    assert max(load.x for load in shorter.loads) == 2048


def test_fewer_adapters_may_be_registered() -> None:
    assert Scale.full(registered=100, pool=256, max_positions=8192).distinct == (1, 4, 16, 64, 100)


def point(series: str, x: int, *speeds: float) -> Point:
    return Point(series, x, tuple(map(figures, speeds)), (0,) * len(speeds), 10**9)


def test_report() -> None:
    text = markdown(scaling())
    assert "`python -m benchmarks.x`, 2026-01-01. A CPU, 2 threads" in text
    assert "### Distinct adapters\n\nDrawn.\n\n|adapters drawn from|uniform, tokens/s|" in text
    assert "|4|190|\n|1,000|150 (140–160)|\n|none, base|200|\n" in text
    assert "|tokens|1 stream, tokens/s|\n|---|---|\n|128|100|\n|8,192|50.0|\n" in text
    assert "sent again" not in text
    mixed = Curve("x", "X", "x", "x", (point("a", 1, 1.0), point("b", 1, 2.0), point("a", 2, 3.0)))
    shown = markdown(replace(scaling(), curves=(mixed,)))
    assert "|1|1.0|2.0|\n|2|3.0|–|\n" in shown, "a column for each series"
    resent = replace(figures(200.0), num_resent=2)
    again = Curve("context", "Context", "tokens", "so", (Point(BASE, 1, (resent, resent), (0, 0), 0),))
    assert "\n4 requests were sent again" in markdown(replace(scaling(), curves=(again,)))


def test_an_unknown_curve_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "ranks,spheres"])
    assert "--only: no spheres among adapters, ranks, blends, context, streams" in capsys.readouterr().err


@pytest.mark.slow
def test_reduced_run(tmp_path: Path, tiny_base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    places = ["--model", str(tiny_base_dir), "--home", str(tmp_path / "home"), "--out", str(out)]
    found: Results = main(["--quick", "--dtype", "fp32", "--threads", "1", *places])
    assert [curve.name for curve in found.curves] == list(CURVES)
    quick = Scale.quick()
    for curve in found.curves:
        assert [(one.series, one.x) for one in curve.points] == [
            (load.series, load.x) for load in CURVES[curve.name](quick).loads
        ]
        for one in curve.points:
            assert len(one.figures) == len(one.adapters_read) == 1
            assert one.figures[0].tokens_per_second > 0
            assert one.memory > 100e6
    adapters = found.curves[0]
    assert [one.adapters_read[0] for one in adapters.points if one.x <= quick.pool] == [0, 0], "they were resident"
    assert found.machine.threads == 1
    assert "A quick run" in capsys.readouterr().out
    assert json.loads((out / "scaling.json").read_text())["made"]["quick"] is True
    assert sorted(path.name for path in out.iterdir()) == ["scaling.json", "scaling.log"]


@pytest.mark.slow
def test_later_rounds_use_one_server(
    tmp_path: Path, tiny_base_dir: Path, converted_tiny: Path, tiny_base: BaseModel
) -> None:
    """The second round goes down, the third up; the pool has room for four of six adapters."""
    plan = CURVES["adapters"](Scale.quick())
    home, sizes, said = tmp_path / "home", Sizes.read(tiny_base_dir), list[str]()
    register(plan.adapters, home, tiny_base, sizes, tmp_path, said.append)
    assert not list(tmp_path.glob("r16-*")), "files are deleted once they are published"
    config = ServerConfig(
        *(home, converted_tiny.parent, str(tiny_base_dir), "fp32", "cpu", 1, tmp_path / "log"),
    )
    prompts = PromptSource(tiny_base.tokenizer, many=True)
    curve = measure(plan, Bench(config, tiny_base.config.shape, prompts, 3, said.append))
    order = [" ".join(line.split(": ")[1].split(", ")) for line in said if "round" in line]
    points = [f"{load.series} {load.x}" for load in plan.loads]
    assert order == [*points, *reversed(points), *points]
    assert {len(one.figures) for one in curve.points} == {3}
    assert [max(one.adapters_read) > 0 for one in curve.points] == [one.x == 6 for one in curve.points]
