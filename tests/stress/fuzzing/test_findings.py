"""What `make attack` counts as a finding, and how findings are saved."""

import sys
import time
from dataclasses import replace
from mmap import mmap
from pathlib import Path

import pytest

from tests.stress.fuzzing.__main__ import attack, replay
from tests.stress.fuzzing.app import Answer, BadAnswerError
from tests.stress.fuzzing.bounds import Meter, TooMuchError
from tests.stress.fuzzing.choices import Choices
from tests.stress.fuzzing.findings import Book, Tally, before_of, place_of
from tests.stress.fuzzing.guided import one_of
from tests.stress.fuzzing.target import Target

MIB = 1 << 20


def bad(data: bytes) -> str:
    if data == b"slow":
        until = time.process_time() + 0.1
        while time.process_time() < until:
            pass
    if data == b"large":
        with mmap(-1, 24 * MIB) as touched:  # other bytes may reuse memory that earlier tests freed
            touched[:: 1 << 12] = bytes(len(touched) >> 12)
    if data == b"":
        raise IndexError
    if data.startswith(b"x"):
        raise KeyError(data)
    return "fine"


BAD = Target(bad, lambda: [b"a"], cpu_seconds=0.05, memory=16 * MIB)


@pytest.mark.parametrize(
    ("data", "target", "reason"),
    [
        (b"slow", BAD, "s of a processor"),
        (b"large", replace(BAD, cpu_seconds=5.0), "MiB of memory"),  # touching it may take over 0.05 s
    ],
)
def test_bounds(data: bytes, target: Target, reason: str) -> None:
    meter = Meter(target)
    outcome, cost = meter.run(b"a")
    assert outcome == "fine"
    assert cost.cpu_seconds < 0.05
    with pytest.raises(TooMuchError, match=reason):
        meter.run(data)
    meter.close()


def test_finding_is_saved_once_per_place(tmp_path: Path) -> None:
    book = Book("bad", 2, tmp_path)
    one = one_of(Meter(BAD), book)
    for data in (b"a", b"xa", b"", b"xb", b"b", b"slow"):
        one(data)
    book.keep()
    tally = Tally.read(book.path)
    assert tally.inputs == 6
    assert tally.outcomes == {"fine": 2, "finding": 4}
    kinds = sorted((where.split()[0], finding.count) for where, finding in tally.findings.items())
    assert kinds == [("IndexError", 1), ("KeyError", 2), ("TooMuchError", 1)]
    saved = {Path(finding.file).read_bytes() for finding in tally.findings.values()}
    assert saved == {b"xa", b"", b"slow"}
    folder = next(before_of(Path(f.file)) for where, f in tally.findings.items() if where.startswith("TooMuch"))
    assert [path.read_bytes() for path in sorted(folder.iterdir())] == [b"xb", b"b"]
    tally.merge(Tally.read(book.path))
    assert tally.inputs == 12
    assert {finding.count for finding in tally.findings.values()} == {2, 4}


def test_file_name_selects_the_target_to_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "expressions-KeyError-0123"
    path.write_bytes(b"a*0.5")
    replay(path)
    assert capsys.readouterr().out.startswith("expressions: read, ")


def test_missing_atheris_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "atheris", None)
    assert attack(["expressions"], 10, None) == 2
    assert capsys.readouterr().err.startswith("make attack: atheris is not installed")


def test_findings_at_one_line_are_distinguished() -> None:
    answer = Answer(500, {}, b"")
    assert place_of(BadAnswerError("500, KeyError at a.py:1", answer)) == "BadAnswerError: 500, KeyError at a.py:1"
    with pytest.raises(IndexError) as caught:
        bad(b"")
    assert place_of(caught.value).startswith("IndexError at tests/stress/fuzzing/test_findings.py:")


def test_choices_are_the_first_after_the_last_byte() -> None:
    choices = Choices(b"\x05\x01\x00ab")
    assert choices.below(4) == 1
    assert choices.below(1000) == 1
    assert choices.rest == b"ab"
    assert [choices.below(9), choices.one_in(2), choices.some(), choices.json()] == [0, False, b"", None]
