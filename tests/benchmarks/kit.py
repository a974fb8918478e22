"""Invented results for the tests of reports and targets."""

from benchmarks.command import Made
from benchmarks.instruction_sets.report import Results as InstructionSets
from benchmarks.machine import Machine
from benchmarks.measure import Figures
from benchmarks.scaling.results import Curve, Point
from benchmarks.scaling.results import Results as Scaling
from benchmarks.serving.results import Results, Row, Settings
from benchmarks.serving.systems.systems import OURS, Facts, Load
from benchmarks.shapes.report import Results as Shapes

MACHINE = Machine("A CPU", 2, 2, 8 << 30, "3.11", "c++ 12", "abc", {"torch": "2"})
LLAMA_CPP, OPENVINO = "llama.cpp", "OpenVINO GenAI"


def made(*, quick: bool = False) -> Made:
    return Made("python -m benchmarks.x", "2026-01-01", quick)


def figures(speed: float, itl: float = 0.01) -> Figures:
    return Figures(speed, 0.1, 0.2, itl, 0.05)


def row(streams: int, kind: str, **speeds: list[float]) -> Row:
    """Return a row. `ours`, `llama` and `openvino` are the tokens per second of each round."""
    names = {"ours": OURS, "llama": LLAMA_CPP, "openvino": OPENVINO}
    found = {names[key]: tuple(map(figures, values)) for key, values in speeds.items()}
    return Row(Load(streams, kind), found, 0, {LLAMA_CPP: 0.75} if "llama" in speeds else {})


def results(rows: list[Row], *, quick: bool = False) -> Results:
    settings = Settings("tiny", "bf16", "cpu", 3, 120, 64, 270_000_000, 270_000_000)
    names = (OURS, LLAMA_CPP, OPENVINO)
    systems = [Facts(name, "1", name != OPENVINO, "its defaults", {}) for name in names]
    return Results(made(quick=quick), MACHINE, settings, systems, {"ik": "no package"}, rows)


def scaling(*, quick: bool = False) -> Scaling:
    """Return a curve with adapters read at its last point, and one without."""
    adapters = (
        Point("base", 0, (figures(200.0), figures(200.0)), (0, 0), 10**9),
        Point("uniform", 4, (figures(190.0), figures(190.0)), (0, 0), 2 * 10**9),
        Point("uniform", 1000, (figures(140.0), figures(160.0)), (39, 41), 4 * 10**9),
    )
    contexts = (
        Point("1 stream", 128, (figures(100.0), figures(100.0)), (0, 0), 10**9),
        Point("1 stream", 8192, (figures(50.0, 0.02), figures(50.0, 0.02)), (0, 0), 10**9),
    )
    found = (
        Curve("adapters", "Distinct adapters", "adapters drawn from", "drawn", adapters),
        Curve("context", "Context", "tokens", "grown", contexts),
    )
    return Scaling(made(quick=quick), MACHINE, "tiny", "bf16", 2, 64, 32, found)


def instruction_sets(*, quick: bool = False) -> InstructionSets:
    (found,) = shapes(quick=quick).sizes.values()
    return InstructionSets({"avx2": found})


def shapes(*, quick: bool = False) -> Shapes:
    rows = [row(1, "base", ours=[30.0, 40.0], llama=[20.0, 20.0]), row(1, "one", ours=[27.0, 36.0])]
    return Shapes({"9B": results(rows, quick=quick)})
