"""Puts a backup into an empty HOME: all of it, or nothing.

It is unpacked into a folder in HOME, compared with its manifest, brought up to date, and looked at as `doctor`
does; then it is put in its place (`filling`).
"""

import io
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapters.catalog.catalog import Catalog
from adapters.catalog.records import Records
from adapters.durable import sync
from adapters.store.store import AdapterStore
from server import __version__
from server.backup.archive import FORMAT, Header, Reader, copy_hashed, reading
from server.backup.filling import filled
from server.database import FILE_NAME, connect, knows_schema
from server.doctor import Diagnosis, examine
from server.errors import StartupError
from server.home import Home
from server.training.queue.jobs import Jobs
from server.training.queue.moving import put_back


@dataclass(frozen=True)
class Restored:
    """What was done. `going_on` are the jobs that a worker had when the backup was made."""

    header: Header
    diagnosis: Diagnosis
    going_on: tuple[str, ...]


def restore(file: Path, home: Path) -> Restored:
    """Fill `home`, which must be empty or not there, from a backup. Raises StartupError, and nothing stays then.

    What `doctor` finds in the result was so before: the backup's maker was told.
    """
    try:
        with open(file, "rb") as backup:
            return restore_from(backup, home, str(file))
    except OSError as error:
        raise StartupError(f"can't read {file}: {error.strerror or error}") from None


def restore_from(backup: io.BufferedReader, home: Path, file: str) -> Restored:
    """The same of an open file, which is called `file`; it may be a pipe."""
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
        raise StartupError(f"it has {size} bytes, and the disk of {staging.parent} less than that free")
    with reading(backup) as reader:
        _check(reader.header)
        _unpack(reader, staging)
    going_on = _bring_up_to_date(staging)
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
    """What the manifest names, compared with it, and nothing else."""
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
            raise StartupError(f"{name!r} isn't what its manifest says: it is damaged")
    if FILE_NAME not in reader.manifest:
        raise StartupError("it has no database")
    for name in found.keys() - reader.manifest.keys():
        (staging / name).unlink()
    for folder, _, _ in os.walk(staging, topdown=False):
        with suppress(OSError):  # it has something
            os.rmdir(folder)
            continue
        sync(Path(folder))


def _bring_up_to_date(staging: Path) -> list[str]:
    """Run missing migrations, let go of jobs, and write the records of versions; the jobs that were let go of."""
    home = Home(staging)
    engine = connect(staging)
    try:
        going_on = put_back(engine, "restored from a backup, in which a worker had it")
        store = AdapterStore(home.adapters)
        Catalog(engine, Records(home.adapters)).recover(store.is_whole, Jobs(engine).is_known)
    finally:
        engine.dispose()
    return going_on
