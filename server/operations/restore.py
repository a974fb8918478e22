"""Fills an empty HOME, whole or not at all, for example from a backup.

All contents are collected in a folder in HOME, and then renamed to their places in HOME, the database last. Until
the folder is gone, no command works on that HOME. If the process is killed, the next process that fills HOME
removes what was left.

A backup is unpacked, compared with its manifest, migrated, and examined as `smolora doctor` does, before the
renames.
"""

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from adapters.catalog.catalog import Catalog
from adapters.catalog.records import Records
from adapters.storage.durable import sync
from adapters.store.store import AdapterStore
from server import __version__
from server.database import FILE_NAME, connect, knows_schema
from server.errors import StartupError
from server.jobs.files import requeue_running
from server.jobs.jobs import Jobs
from server.operations.archive import FORMAT, Header, Reader, copy_hashed, reading
from server.operations.doctor import Diagnosis, examine
from server.storage.home import LOCK_NAME, RESTORING, Home, make, serving

_PARTS = ("adapters", "datasets", "files", "jobs", "keyed", "projects")
_OTHERS = frozenset({LOCK_NAME, "lost+found"})  # a new file system has the latter


@contextmanager
def filled(home: Path) -> Iterator[Path]:
    """Yield an empty folder, and move its contents into `home` when the block ends.

    If the block fails, `home` stays empty. Raise StartupError if `home` isn't empty or is being served, and
    OSError if the disk fails.
    """
    is_new = not home.exists()
    try:
        make(home, to_restore=True)
        with serving(home):
            _clear(home)
            staging = Path(tempfile.mkdtemp(prefix=RESTORING, dir=home))
            try:
                yield staging
                _put_in_place(staging, home)
            except BaseException:
                _clear(home)
                raise
    finally:
        if is_new and {path.name for path in home.glob("*")} <= {LOCK_NAME}:
            shutil.rmtree(home, ignore_errors=True)


def _clear(home: Path) -> None:
    """Remove what a killed process left in `home`. Raise StartupError if `home` has anything else."""
    if any(home.glob(f"{RESTORING}*")):
        moved = [home / name for name in _PARTS] + list(home.glob(f"{FILE_NAME}*"))
        for path in [*moved, *home.glob(f"{RESTORING}*")]:  # the folder that marks the interruption goes last
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    if others := sorted(path.name for path in home.iterdir() if path.name not in _OTHERS):
        named = ", ".join(others[:3])
        raise StartupError(f"{home} isn't empty, it has {named}: give another --home or SMOLORA_HOME")


def _put_in_place(staging: Path, home: Path) -> None:
    names = sorted(path.name for path in staging.iterdir())
    for name in [*(name for name in names if name != FILE_NAME), FILE_NAME]:
        (staging / name).rename(home / name)
    sync(home)
    staging.rmdir()
    sync(home)


def recover_jobs_and_records(home: Home, engine: sa.Engine, reason: str) -> list[str]:
    """Requeue running jobs, and write the JSON records of adapters' versions, in a HOME that has just been filled.

    `reason` is the text of the event that each requeued job gets. Return the requeued jobs' ids.
    """
    requeued = requeue_running(engine, reason)
    store = AdapterStore(home.adapters)
    Catalog(engine, Records(home.adapters)).recover(store.is_whole, Jobs(engine).is_known)
    return requeued


@dataclass(frozen=True)
class Restored:
    """The result of `restore`. `going_on` are the jobs that were running when the backup was made."""

    header: Header
    diagnosis: Diagnosis
    going_on: tuple[str, ...]


def restore(file: Path, home: Path) -> Restored:
    """Fill `home`, which must be empty or absent, from a backup.

    Raise StartupError if that fails, and leave nothing in `home`. If the result's `diagnosis` reports damage, it
    was in the backup, and was reported when the backup was made.
    """
    try:
        with open(file, "rb") as backup:
            return restore_from(backup, home, str(file))
    except OSError as error:
        raise StartupError(f"can't read {file}: {error.strerror or error}") from None


def restore_from(backup: io.BufferedReader, home: Path, file: str) -> Restored:
    """Restore a backup from an open file, possibly a pipe, as `restore` does. `file` is its name in messages."""
    try:
        with filled(home) as staging:
            try:
                return _restore(backup, staging)
            except StartupError as error:
                raise StartupError(f"{file}: {error}") from None
    except OSError as error:
        raise StartupError(f"can't restore {file} to {home}: {error.strerror or error}") from None


def _restore(backup: io.BufferedReader, staging: Path) -> Restored:
    if (size := os.fstat(backup.fileno()).st_size) > shutil.disk_usage(staging).free:
        raise StartupError(f"it has {size} bytes, and the disk of {staging.parent} has less free space")
    with reading(backup) as reader:
        _check(reader.header)
        _unpack(reader, staging)
    engine = connect(staging)  # which runs missing migrations
    try:
        going_on = recover_jobs_and_records(
            Home(staging), engine, "restored from a backup, in which a worker had it"
        )
    finally:
        engine.dispose()
    diagnosis = examine(staging)
    if any(finding.about == "database" for finding in diagnosis.findings):
        raise StartupError(f"its database is damaged: {diagnosis.findings[0].message}")
    return Restored(reader.header, diagnosis, tuple(going_on))


def _check(header: Header) -> None:
    if header.format > FORMAT or not knows_schema(header.schema):
        raise StartupError(
            f"it was written by smolora {header.smolora} (schema {header.schema}), which is newer than this one "
            f"({__version__}): restore it with that one"
        )


def _unpack(reader: Reader, staging: Path) -> None:
    """Write the members that the manifest names, and compare their digests and sizes with the manifest."""
    found = {}
    for name, content in reader.members():
        place = staging / name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(place, "xb") as file:
                found[name] = copy_hashed(content, file)
                file.flush()
                os.fsync(file.fileno())
        except (FileExistsError, NotADirectoryError):
            raise StartupError(f"{name!r} is a file and a folder in it") from None
    for name, member in reader.manifest.items():
        if name not in found:
            raise StartupError(f"{name!r} is missing from it")
        if found[name] != member:
            raise StartupError(f"{name!r} doesn't match its manifest: it is damaged")
    if FILE_NAME not in reader.manifest:
        raise StartupError("it has no database")
    for name in found.keys() - reader.manifest.keys():
        (staging / name).unlink()
    for folder, _, _ in os.walk(staging, topdown=False):
        with suppress(OSError):  # it isn't empty
            os.rmdir(folder)
            continue
        sync(Path(folder))
