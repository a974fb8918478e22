"""The report writes docs/benchmarks.md and the README's figures from the benchmarks' results alone."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import command, report
from benchmarks.serving.report import details
from benchmarks.serving.results import Results
from benchmarks.serving.systems.systems import BASE, BLENDS, WIDE
from benchmarks.training import train_and_serve_report, train_report
from benchmarks.training.peer import COMPILED, EAGER
from benchmarks.training.runs import NATIVE, Measured
from benchmarks.training.train_report import Row
from benchmarks.training.works import WORKS
from tests.benchmarks.kit import MACHINE, figures, instruction_sets, made, results, row, scaling, shapes

README = f"# smolora\n\nBefore.\n\n{report.BEGIN}\n## How fast\n\nOld.\n{report.END}\n\n## Reading on\n"


def serving(*, quick: bool = False) -> Results:
    loads = [
        row(1, BASE, ours=[170.0, 160.0], llama=[100.0, 100.0], openvino=[110.0, 110.0]),
        row(8, BASE, ours=[500.0, 500.0], llama=[280.0, 280.0]),
        row(32, BLENDS, ours=[600.0, 600.0], llama=[50.0, 50.0]),
    ]
    found = results(loads, quick=quick)
    wide = replace(found.systems[0], name=WIDE, max_streams=1)
    found.systems.append(wide)
    found.rows[0].figures[WIDE] = (figures(150.0), figures(150.0))
    return found


def write_all(out: Path) -> None:
    command.write(out, "serve", serving())
    command.write(out, "scaling", scaling())
    command.write(out, "shapes", shapes())
    command.write(out, "instruction_sets", instruction_sets())
    speeds: dict[str, tuple[Measured, ...]] = {
        NATIVE: (Measured(300.0, 10**9, 3.0, 1.0, True),),
        EAGER: (Measured(150.0, 10**9, 3.0, 1.0, True),),
        COMPILED: (Measured(200.0, 10**9, 3.0, 90.0),),
    }
    trained = Row(WORKS[0], speeds)
    command.write(out, "train", train_report.Results(made(), MACHINE, "tiny", 1, [trained]))
    beside = (train_and_serve_report.Round(figures(300.0), figures(200.0), 500.0, math.nan),)
    command.write(out, "train_and_serve", train_and_serve_report.Results(made(), MACHINE, "work", beside))


def write(tmp_path: Path, readme: Path) -> None:
    places = [f"--{name}={tmp_path / name}" for name in ("out", "results", "docs")]
    report.main([*places, f"--readme={readme}"])


def run(tmp_path: Path) -> tuple[str, str]:
    """Return docs/benchmarks.md and the README, made from what is under `out`."""
    readme = tmp_path / "README.md"
    readme.write_text(README)
    write(tmp_path, readme)
    return (tmp_path / "docs/benchmarks.md").read_text(), readme.read_text()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    place = tmp_path / "out"
    place.mkdir()
    return place


def test_pages_are_made_from_the_results(tmp_path: Path, out: Path) -> None:
    write_all(out)
    page, readme = run(tmp_path)
    for heading in (
        "## Serving",
        "## Scaling curves",
        "### Distinct adapters",
        "## Larger bases",
        "### 9B",
        "## Training",
        "## Restricted instruction sets",
        "## Training while serving",
    ):
        assert heading in page
    assert page.count("`python -m benchmarks.x`, 2026-01-01. A CPU, 2 threads") == 6
    assert "Not measured yet" not in page
    assert "|1 stream, base|≥ 1.6 × llama.cpp|1.65 (1.60–1.70)|" in page
    assert "|the job's tokens/s|500|–|–|" in page
    for name in ("serve", "scaling", "train"):
        assert f"]({name}.png)" in page
        assert (tmp_path / f"docs/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert readme.startswith(f"# smolora\n\nBefore.\n\n{report.BEGIN}\n## How fast\n")
    assert readme.endswith(f"{report.END}\n\n## Reading on\n")
    assert "Old." not in readme
    assert "|1 stream, base|165 (160–170)|100|110|" in readme
    for text in (page, readme):
        assert "8 streams" not in text, "only the loads with one stream and with the most"
        assert WIDE not in text, "only the systems that take all of them"
    for name in (
        "serve",
        "scaling",
        "shapes",
        "instruction_sets",
        "train",
        "train_and_serve",
    ):
        assert (tmp_path / f"results/{name}.json").read_bytes() == (out / f"{name}.json").read_bytes()


def test_missing_parts_are_named(tmp_path: Path, out: Path) -> None:
    command.write(out, "serve", serving())
    page, _ = run(tmp_path)
    for name in ("scaling", "train"):
        assert f"Not measured yet: `python -m benchmarks.{name}`." in page


def test_parts_not_measured_again_stay(tmp_path: Path, out: Path) -> None:
    write_all(out)
    whole, readme = run(tmp_path)
    for path in out.glob("*.json"):
        path.unlink()
    command.write(out, "serve", results([row(1, BASE, ours=[333.0, 333.0], llama=[100.0, 100.0])]))
    standing = tmp_path / "standing.md"
    standing.write_text(readme)
    write(tmp_path, standing)
    page = (tmp_path / "docs/benchmarks.md").read_text()
    rest = whole[whole.index("## Scaling curves") :]
    assert page.endswith(rest)
    assert "333" in page
    assert "333" in standing.read_text()
    comparison = readme[readme.index("## LoRA against full fine-tuning") :]
    assert standing.read_text().endswith(comparison)
    for path in out.glob("*.json"):
        path.unlink()
    write(tmp_path, standing)
    assert (tmp_path / "docs/benchmarks.md").read_text() == page
    assert "333" in standing.read_text()


def test_details_count_resent_requests() -> None:
    found = serving()
    assert "sent again" not in details(found)
    found.resent = {"llama.cpp": 2}
    assert "- Requests that were sent again, as the server had dropped their connection: llama.cpp 2." in details(
        found
    )


@pytest.mark.parametrize(
    ("name", "quick"),
    [
        ("serve", serving(quick=True)),
        ("scaling", scaling(quick=True)),
        ("shapes", shapes(quick=True)),
        ("instruction_sets", instruction_sets(quick=True)),
    ],
    ids=["serve", "scaling", "shapes", "instruction_sets"],
)
def test_quick_runs_are_not_published(name: str, quick: object, tmp_path: Path, out: Path) -> None:
    command.write(out, name, quick)
    with pytest.raises(SystemExit, match="a quick run measures nothing"):
        run(tmp_path)
    assert not (tmp_path / "docs").exists()
    assert (tmp_path / "README.md").read_text() == README


def test_figures_are_replaced_in_place() -> None:
    once = report.with_figures(README, "## New")
    assert report.with_figures(once, "## New") == once
    with pytest.raises(ValueError, match="the README has no"):
        report.with_figures("# smolora\n", "## New")
    readme = Path(__file__).parents[2] / "README.md"
    assert report.with_figures(readme.read_text(), "## New").count("## How fast") == 0
