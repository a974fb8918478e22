"""Statistics, and the storage and formatting of figures."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from benchmarks import command
from benchmarks.measure import (
    Figure,
    Figures,
    Interval,
    Run,
    Spread,
    join,
    median_ratio,
    percentile,
    standard_error,
)
from benchmarks.tables import spread, table, with_range
from benchmarks.targets import at_least, at_most, target_table, unmeasured


def test_percentiles() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, percent) for percent in (0, 50, 90, 100)] == [1.0, 3.0, 4.6, 5.0]
    assert percentile([7.0], 99) == 7.0
    assert math.isnan(percentile([], 50))


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # the machine halves its speed in the last round; the medians' ratio would be 20/10
    assert median_ratio([20.0, 30.0, 10.0], [10.0, 10.0, 5.0]) == Spread(2.0, 2.0, 3.0)
    assert median_ratio([20.0], []) is None
    assert median_ratio([math.nan, 20.0, 8.0], [10.0, math.nan, 4.0]) == Spread(2.0, 2.0, 2.0)
    assert median_ratio([math.nan], [10.0]) is None
    assert median_ratio([1.0, 6.0], [0.0, 2.0]) == Spread(3.0, 3.0, 3.0)


def test_runs_are_joined() -> None:
    run = Run(8, 2.0, (0.5,), (0.1, 0.3), ("a",), 1)
    joined = join([run, replace(run, seconds=6.0, texts=("b",))])
    assert joined == Run(16, 8.0, (0.5, 0.5), (0.1, 0.3, 0.1, 0.3), ("a", "b"), 2)
    assert Figures.of(joined).tokens_per_second == 2.0


def test_intervals_and_errors() -> None:
    # 8, 10, 12: deviation 2, times 4.303 / sqrt(3)
    found = Interval.of([8.0, 10.0, 12.0])
    assert found.mean == 10.0
    assert found.half == pytest.approx(4.9687, abs=1e-4)
    assert found.text("{:.1f}") == "10.0 ± 5.0"
    assert Interval.of([8.0]).text("{:.1f}") == "8.0"
    # the least certain accuracy of 250 rows, and one of nine in ten
    assert standard_error(0.5, 250) == pytest.approx(0.0316, abs=1e-4)
    assert standard_error(0.9, 250) == pytest.approx(0.0190, abs=1e-4)


def test_figures_show_their_range() -> None:
    assert with_range([3.0, 1.0, 2.0], "{:.0f}".format) == "2 (1–3)"
    assert with_range([2.01, 2.02], "{:.1f}".format) == "2.0"
    assert with_range([], "{:.0f}".format) == "–"
    assert with_range([math.nan], "{:.0f}".format) == "–"
    assert spread(Spread(2.0, 1.5, 3.0), "× llama.cpp") == "2.00 × llama.cpp (1.50–3.00)"
    assert spread(Spread(2.0, 2.0, 2.0), "") == "2.00"
    assert table(("a", "b"), [("1", "2")]) == "|a|b|\n|---|---|\n|1|2|"


def test_targets_use_the_median() -> None:
    found = [
        at_least("a", Spread(1.6, 1.0, 2.0), 1.6, "×"),
        at_least("b", Spread(1.59, 1.0, 2.0), 1.6, "×"),
        at_most("c", Spread(0.5, 0.4, 0.9), 0.5, "×"),
        at_most("d", Spread(0.51, 0.4, 0.9), 0.5, "×"),
        at_least("e", None, 1.6, "×"),
    ]
    assert [target.reached for target in found] == [True, False, True, False, None]
    assert "|b|≥ 1.6 ×|**1.59 (1.00–2.00)**|" in target_table(found)
    assert "|e|≥ 1.6 ×|–|" in target_table(found)
    near = [
        at_most("f", Spread(0.3322, 0.269, 0.3335), 1 / 3, "×"),
        at_most("g", Spread(0.5004, 0.4, 0.6), 0.5, "×"),
    ]
    assert "|f|≤ 0.333 ×|0.33 (0.27–0.33)|" in target_table(near)
    assert "|g|≤ 0.5 ×|**0.5004 (0.4000–0.6000)**|" in target_table(near)
    assert {target.reached for target in unmeasured(found)} == {None}


@dataclass(frozen=True)
class Some:
    values: tuple[Figure, ...]
    names: dict[str, Figures]


def test_results_round_trip(tmp_path: Path) -> None:
    some = Some((1.5, math.nan), {"a": Figures(1.0, 2.0, 3.0, 4.0, math.nan)})
    assert command.read(tmp_path, "some", Some) is None
    command.write(tmp_path, "some", some)
    assert [path.name for path in tmp_path.iterdir()] == ["some.json"]
    assert "NaN" not in (tmp_path / "some.json").read_text(), "JSON knows none"
    found = command.read(tmp_path, "some", Some)
    assert found is not None
    assert found.values[0] == 1.5
    assert math.isnan(found.values[1])
    assert math.isnan(found.names["a"].itl_p99)
    assert replace(found.names["a"], itl_p99=0.0) == Figures(1.0, 2.0, 3.0, 4.0, 0.0)
