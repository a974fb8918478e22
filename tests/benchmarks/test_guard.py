"""The regression check of quick runs: what it compares, and what it accepts."""

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks import serve
from benchmarks.command import Made
from benchmarks.guard.__main__ import main
from benchmarks.guard.ratios import LEAST, compare, markdown, ratios_of, record
from benchmarks.machine import Machine
from benchmarks.measure import Figures
from benchmarks.serving.results import Results, Row, Settings
from benchmarks.serving.systems.systems import BASE, DISTINCT, OURS, Load

PEER = "a peer"


def results(speeds: Mapping[str, float], cpu: str = "a processor") -> Results:
    """Return results with four streams: our base, our adapters, and a peer's base."""
    machine = Machine(cpu, 2, 2, 1 << 34, "3.11", "", "", {})
    found = Results(Made("", "", quick=True), machine, Settings("base", "bf16", "cpu", 1, 32, 8, 1, 1))

    def figures(name: str) -> tuple[Figures, ...]:
        return (Figures(speeds[name], 0.1, 0.1, 0.1, 0.1),)

    found.rows = [
        Row(Load(4, BASE), {OURS: figures("base"), PEER: figures("peer")}, 0, {}),
        Row(Load(4, DISTINCT), {OURS: figures("adapters")}, 0, {}),
    ]
    return found


def test_ratios_are_within_one_run() -> None:
    found = ratios_of(results({"base": 200.0, "peer": 50.0, "adapters": 150.0}))
    assert found == {"4 streams, base: of a peer": 4.0, "4 streams, 4 adapters: of own base": 0.75}


def test_slowdown_is_noticed(tmp_path: Path) -> None:
    kept = tmp_path / "recorded.json"
    before = results({"base": 200.0, "peer": 50.0, "adapters": 150.0})
    assert compare(before, kept) is None
    record(before, kept)
    record(results({"base": 1.0, "peer": 1.0, "adapters": 1.0}, cpu="another"), kept)
    slower_machine = results({"base": 20.0, "peer": 5.0, "adapters": 15.0})
    same = compare(slower_machine, kept)
    assert same is not None
    assert [each.holds for each in same] == [True, True]
    slow = results({"base": 200.0, "peer": 50.0, "adapters": 0.99 * LEAST * 150.0})
    compared = compare(slow, kept)
    assert compared is not None
    assert [each.name for each in compared if not each.holds] == ["4 streams, 4 adapters: of own base"]
    assert "|0.75|0.37|**no**|" in markdown(compared, slow)
    assert compare(results({"base": 1.0, "peer": 1.0, "adapters": 1.0}, cpu="a third"), kept) is None


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: list[list[str]] = []
    found = results({"base": 200.0, "peer": 50.0, "adapters": 150.0})

    def run(arguments: list[str]) -> Results:
        given.append(arguments)
        return found

    monkeypatch.setattr(serve, "main", run)
    monkeypatch.setattr(sys, "argv", ["benchmarks.guard"])
    kept = f"--recorded={tmp_path / 'recorded.json'}"
    assert main([kept]) == 0
    assert "No ratios are recorded for base in bf16, a processor, 2 threads" in capsys.readouterr().out
    assert main([kept, "--record", "--threads=1"]) == 0
    assert "--quick" in given[-1]
    assert "--threads=1" in given[-1]
    found = results({"base": 80.0, "peer": 50.0, "adapters": 60.0})
    assert main([kept]) == 1, "2.5 times as slow, beside a peer that isn't"
