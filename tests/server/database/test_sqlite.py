"""The choice of an SQLite build, and the features enabled in it."""

import sys
from types import ModuleType

import pytest

from server.database.file import Build, choose_driver, driver, has_wal_reset_bug, safe_journal_mode

OTHER = "a_driver_of_another_build"


@pytest.mark.parametrize(
    ("version", "has_bug"),
    [
        ((3, 6, 23), False),  # without WAL
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 46, 1), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 0), True),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 53, 4), False),
        ((4, 0, 0), False),
    ],
)
def test_releases_with_the_bug(version: tuple[int, int, int], has_bug: bool) -> None:
    """According to https:

    sqlite.org/wal.html#walresetbug.
    """
    assert has_wal_reset_bug(version) is has_bug
    assert safe_journal_mode(version) == ("delete" if has_bug else "wal")


def build(version: tuple[int, int, int]) -> ModuleType:
    module = ModuleType("build")
    module.__dict__["sqlite_version_info"] = version
    return module


@pytest.mark.parametrize(
    ("standard", "other", "is_standard"),
    [
        ((3, 46, 1), (3, 53, 4), False),
        ((3, 46, 1), (3, 51, 1), True),  # no better
        ((3, 46, 1), None, True),
        ((3, 53, 0), (3, 53, 4), True),
    ],
)
def test_a_sound_build_is_preferred(
    monkeypatch: pytest.MonkeyPatch,
    standard: tuple[int, int, int],
    other: tuple[int, int, int] | None,
    is_standard: bool,
) -> None:
    ours = build(standard)
    if other is not None:
        monkeypatch.setitem(sys.modules, OTHER, build(other))
    assert (choose_driver(ours, OTHER) is ours) is is_standard


def test_the_driver_is_sound_wherever_the_package_has_a_wheel() -> None:
    pytest.importorskip("pysqlite3")
    assert not has_wal_reset_bug(driver.sqlite_version_info)


def test_error_of_a_buggy_sqlite() -> None:
    assert str(Build("3.53.4", "wal")) == "SQLite 3.53.4 with a write-ahead log"
    assert str(Build("3.46.1", "delete")) == "SQLite 3.46.1 with a rollback journal"
    assert "may damage" in str(Build("3.46.1", "wal"))
    assert [Build(*of).is_sound for of in (("3.46.1", "wal"), ("3.46.1", "delete"), ("3.53.4", "wal"))] == [
        False,
        True,
        True,
    ]
