"""Which build of SQLite drives the database, and whether a write-ahead log is safe with it.

SQLite 3.7.0 to 3.51.2 has a race in WAL mode, the "WAL-reset bug" (https://sqlite.org/wal.html#walresetbug): where
one connection checkpoints while another one commits, pages of a later commit may never reach the database, which
is corrupt then. So the standard library's build is used where it has the fix; else that of pysqlite3, which brings
one of its own; and where that is missing too, the database has a rollback journal, in which the race isn't.
"""

import importlib
import sqlite3
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal

JournalMode = Literal["wal", "delete"]
"""SQLite's names: a write-ahead log, or a rollback journal, which each commit deletes."""

_KINDS = {"wal": "a write-ahead log", "delete": "a rollback journal"}


def has_wal_reset_bug(version: tuple[int, int, int]) -> bool:
    """Whether that release of SQLite has it. 3.44.6 and 3.50.7 are older branches that got the fix, too."""
    has_fix = (3, 44, 6) <= version < (3, 45) or (3, 50, 7) <= version < (3, 51)
    return (3, 7) <= version < (3, 51, 3) and not has_fix


def choose_driver(standard: ModuleType, other: str) -> ModuleType:
    """`standard` where its build is sound, or where the module called `other` isn't installed or no better."""
    if not has_wal_reset_bug(standard.sqlite_version_info):
        return standard
    try:
        found = importlib.import_module(other)
    except ImportError:  # there is no wheel for this machine
        return standard
    return standard if has_wal_reset_bug(found.sqlite_version_info) else found


if TYPE_CHECKING:
    driver = sqlite3
else:
    driver = choose_driver(sqlite3, "pysqlite3.dbapi2")


def safe_journal_mode(version: tuple[int, int, int]) -> JournalMode:
    """What a build of that release can be trusted with."""
    return "delete" if has_wal_reset_bug(version) else "wal"


@dataclass(frozen=True)
class Build:
    """What drives a database, and how that keeps its commits."""

    version: str
    journal_mode: str

    @property
    def is_sound(self) -> bool:
        """Whether the write-ahead log, if there is one, is safe."""
        major, minor, patch = map(int, self.version.split("."))
        return self.journal_mode != "wal" or not has_wal_reset_bug((major, minor, patch))

    def __str__(self) -> str:
        text = f"SQLite {self.version} with {_KINDS.get(self.journal_mode, self.journal_mode)}"
        if self.is_sound:
            return text
        return f"{text}, which this release may damage: stop all that use this home, then start again"
