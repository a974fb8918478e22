"""Makes a backup of a HOME while servers and workers use it. None of them waits for the backup.

The database is copied as it is at one moment. Then the bytes that this copy refers to are copied: adapters, jobs'
training rows and models, uploads. Bytes exist before a row of the database names them, and never change. So only
bytes that are deleted in between can be missing. If some are, another round adds a newer copy of the database,
which no longer refers to them, and other bytes that the newer copy refers to. The manifest leaves out what became
obsolete.

Checkpoints are copied before the database, since a job's events may be ahead of its checkpoint, but never behind.
The JSON files that record versions (`Records`) aren't copied: a restore writes them from the database. Converted
bases and native code are created again, too.
"""

import fcntl
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import IO, BinaryIO

from adapters.catalog.catalog import Catalog
from adapters.errors import CorruptAdapter
from adapters.names import Viewpoint
from adapters.storage.durable import UNFINISHED, sync
from adapters.store.store import AdapterStore, lock_folder
from server import __version__
from server.database import FILE_NAME, copy, existing, faults, opened_copy, schema_of
from server.database.opening import refuse_elsewhere
from server.errors import StartupError
from server.jobs.files import CHECKPOINTS_NAME, JobFiles, used_by_unended, with_folders
from server.jobs.tables import Status
from server.operations.archive import Header, Writer, is_place, writing
from server.storage.home import Home
from server.storage.places import Storage
from server.training.checkpoint import FILE_NAMES, Checkpoints
from server.training.files import checked_uploads
from server.training.job_data import DATA_NAME

_MAX_ROUNDS = 100
_ALONE = fcntl.LOCK_EX | fcntl.LOCK_NB
_COMPRESSED = (".gz", ".tgz")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Made:
    """What a finished backup contains.

    `damaged` describes bytes that were already damaged in HOME. The backup has them unchanged.
    """

    num_versions: int
    num_adapters: int
    num_jobs: int
    num_unended_jobs: int
    num_uploads: int  # data sets and files
    num_bytes: int  # of all members
    num_rounds: int
    damaged: tuple[str, ...]


@dataclass(frozen=True)
class _Needs:
    """What a copy of the database refers to, as pairs of an owner and what the owner uses.

    Owners are versions, jobs that haven't ended, and ended jobs whose files weren't removed. An ended job uses its
    own folder only. Once an owner is deleted, it is never recreated.
    """

    uses: frozenset[tuple[str, str]]  # such as ("a@2", digest), ("job-7", "ds-1"), ("job-7", "job-7")
    num_versions: int
    jobs: Mapping[str, Status]  # jobs that have files

    @property
    def digests(self) -> list[str]:
        """The digests of the adapters whose bytes are needed."""
        return sorted({what for _, what in self.uses if _DIGEST.fullmatch(what)})


def back_up(home: Path, target: Path) -> Made:
    """Write a backup of `home` to `target`, whole or not at all. Compress it if its name ends in .gz or .tgz.

    Raise StartupError if that fails, for example because the disk is full.
    """
    existing(home)
    with _startup_errors(target), workspace(target) as space:
        archive = space / "archive"
        with open(archive, "xb", opener=_private) as file:
            with writing(file, target.name.endswith(_COMPRESSED)) as writer:
                made = _Backup(home, space, writer).run()
            file.flush()
            os.fsync(file.fileno())
        archive.replace(target)
        sync(target.parent)
        _note(home)
        return made


def stream(home: Path, target: IO[bytes]) -> Made:
    """Write a backup of `home` to an open file, uncompressed. Raise StartupError if that fails.

    After such an error, the file has a truncated backup without a manifest.
    """
    existing(home)
    scratch = home / "tmp"
    with _startup_errors("standard output"):
        scratch.mkdir(exist_ok=True)
        with workspace(scratch / "backup") as space, writing(target, compressed=False) as writer:
            made = _Backup(home, space, writer).run()
        target.flush()
        _note(home)
        return made


def _note(home: Path) -> None:
    """Record the time of a complete backup, for /metrics. A full disk doesn't fail the backup."""
    with suppress(OSError):
        Home(home).backed_up.touch()


@contextmanager
def _startup_errors(target: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise StartupError(f"can't make {target}: {where}{error.strerror or error}") from None


class _Backup:
    """Runs the rounds of a backup. File names are paths relative to HOME, with slashes."""

    def __init__(self, home: Path, space: Path, writer: Writer) -> None:
        self._home = Home(home)
        self._files = JobFiles(home)
        self._store = AdapterStore(self._home.adapters)
        self._space = space
        self._writer = writer
        self._folders: dict[str, set[str]] = defaultdict(set)  # names of the members added so far, by folder
        self._checkpoints: dict[str, Path] = {}  # the newest added checkpoint, by job
        self._num_uploads = 0
        self._numbers = count(1)

    def run(self) -> Made:
        """Run all rounds, write the manifest, and return the report."""
        schema = schema_of(existing(self._home.path))
        self._writer.begin(Header(__version__, schema, datetime.now(UTC).isoformat(timespec="seconds")))
        num_rounds = 0
        while True:
            num_rounds += 1
            for job_id in self._files.stored():
                self._add_checkpoint(job_id)
            copied = self._copied()
            needs = self._needs_of(copied)
            kept, missing = self._add_needed(needs)
            if not self._was_overtaken(needs, missing):
                break
            if num_rounds == _MAX_ROUNDS:
                raise StartupError("things are deleted faster than they can be copied: try again")
            copied.unlink()
        with open(copied, "rb") as database:
            kept.add(self._add(FILE_NAME, database))
        self._writer.end(kept)
        return Made(
            num_versions=needs.num_versions,
            num_adapters=len(needs.digests),
            num_jobs=len(needs.jobs),
            num_unended_jobs=sum(not status.has_ended for status in needs.jobs.values()),
            num_uploads=self._num_uploads,
            num_bytes=sum(self._writer.members[name].size for name in kept),
            num_rounds=num_rounds,
            damaged=tuple(self._damaged(needs)),
        )

    def _copied(self) -> Path:
        """Copy the database as it is now. Return the path of the copy."""
        copied = self._space / f"database-{next(self._numbers)}"
        copy(self._home.path, copied)
        return copied

    def _needs_of(self, copied: Path) -> _Needs:
        """Return what a copy of the database refers to.

        Raise StartupError if the database is damaged, or if the bytes that it refers to are in a bucket.
        """
        with opened_copy(copied, self._space) as (engine, place):
            if found := faults(place):
                raise StartupError(f"the database is damaged ({found[0]}): see smolora doctor")
            refuse_elsewhere(engine, "HOME only caches some of them, so a backup of it would lack the rest")
            listed = Catalog(engine, of=Viewpoint(sees_all=True)).list()
            versions = [version for adapter in listed for version in adapter.versions]
            jobs = with_folders(engine)
            used = {
                (f"{version.name}@{version.version}", version.digest) for version in versions if not version.parts
            }
            used |= {*used_by_unended(engine), *((job_id, job_id) for job_id in jobs)}
            used |= {(job_id, self._rows_of(job_id)) for job_id, status in jobs.items() if not status.has_ended}
            return _Needs(frozenset(used), len(versions), jobs)

    def _was_overtaken(self, needs: _Needs, missing: set[str]) -> bool:
        """Return whether a new copy of the database no longer refers to something missing, or to a job's folder.

        The folder counts even if it isn't missing: its files are deleted one by one, so only some of them may have
        been copied. If the new copy still refers to something missing, this was missing before the backup began.
        """
        copied = self._copied()
        gone = needs.uses - self._needs_of(copied).uses
        copied.unlink()
        return any(what in missing or what in needs.jobs for _, what in gone)

    def _add_needed(self, needs: _Needs) -> tuple[set[str], set[str]]:
        """Add every needed file to the backup. Return these files' names, and what is missing in HOME."""
        kept: set[str] = set()
        missing: set[str] = set()
        for digest in needs.digests:
            if not self._keep(self._home.adapters / digest[:2] / digest, kept):
                missing.add(digest)
        for job_id, status in sorted(needs.jobs.items()):
            for folder in self._folders_of(job_id):
                if not self._keep(folder, kept, grows=True):
                    missing.add(job_id)
            if not status.has_ended and (checkpoint := self._checkpoints.get(job_id)) is not None:
                self._keep(checkpoint, kept)
        uploads = [folder.name for folder in self._upload_folders() if self._keep(folder, kept)]
        self._num_uploads = len(uploads)
        if self._home.keyed.exists():
            with open(self._home.keyed, "rb") as keyed:
                kept.add(self._add(self._home.keyed.name, keyed))
        of_jobs = {what for who, what in needs.uses if who in needs.jobs} - {*needs.jobs, *needs.digests}
        return kept, missing | of_jobs.difference(uploads, kept)

    def _rows_of(self, job_id: str) -> str:
        """Return the name of the file with the job's training rows, which the job needs until it ends."""
        return (self._files.directory(job_id) / DATA_NAME).relative_to(self._home.path).as_posix()

    def _folders_of(self, job_id: str) -> Iterator[Path]:
        """Yield the folders that have a job's files, except its checkpoints."""
        root = self._files.directory(job_id)
        if root.is_dir():
            yield root
            for path in sorted(root.rglob("*/")):
                if not any(part == CHECKPOINTS_NAME or part[0] == "." for part in path.relative_to(root).parts):
                    yield path

    def _upload_folders(self) -> Iterator[Path]:
        """Yield the folders of all data sets and files. These folders may be deleted at any time."""
        for project in self._home.projects():
            for root in (self._home.datasets(project), self._home.files(project)):
                if root.is_dir():
                    yield from sorted(path for path in root.glob("*/") if path.name[0] != ".")

    def _add_checkpoint(self, job_id: str) -> None:
        """Add the job's newest complete checkpoint, if any. The job's worker may be writing the next one."""
        for _, _, place in reversed(Checkpoints(self._files.checkpoints(job_id), 0).stored()):
            names: set[str] = set()
            if self._keep(place, names) and {Path(name).name for name in names} == FILE_NAMES:
                self._checkpoints[job_id] = place
                return

    def _keep(self, folder: Path, kept: set[str], grows: bool = False) -> bool:
        """Add the folder's files to the backup, and their names to `kept`. Return False if the folder is gone.

        All files are opened before the first is read, so they are copied even if they are deleted meanwhile. A
        folder that was added before is read again only if `grows` is true.
        """
        prefix = folder.relative_to(self._home.path).as_posix()
        if grows or prefix not in self._folders:
            try:
                with ExitStack() as opened:
                    paths = [path for path in sorted(folder.iterdir()) if path.is_file()]
                    files = {f"{prefix}/{path.name}": opened.enter_context(open(path, "rb")) for path in paths}
                    added = {self._add(name, file) for name, file in files.items() if is_place(name)}
            except FileNotFoundError:
                return False
            self._folders[prefix] |= added
        kept |= self._folders[prefix]
        return True

    def _add(self, name: str, file: BinaryIO) -> str:
        """Add a file to the backup, unless it was added before. Return its name.

        The file is added with its current size, since a log may grow meanwhile.
        """
        if name not in self._writer.members:
            facts = os.fstat(file.fileno())
            self._writer.add(name, file, facts.st_size, facts.st_mtime)
        return name

    def _damaged(self, needs: _Needs) -> Iterator[str]:
        """Yield a message for each damaged adapter or upload that still exists.

        An adapter that was added to the backup and has been deleted since isn't reported.
        """
        for digest in needs.digests:
            place = self._home.adapters / digest[:2] / digest
            try:
                self._store.verify(digest)
            except CorruptAdapter as error:
                if place.exists() or place.relative_to(self._home.path).as_posix() not in self._folders:
                    yield str(error)
        yield from (message for _, message in checked_uploads(Storage(self._home)) if message is not None)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """Yield a new private folder on the disk of `target`, and remove it when the block ends.

    Folders that killed processes left are removed first. Raise OSError if no folder can be created.
    """
    prefix = f"{UNFINISHED}for-{target.name}-"  # differs from a restore's prefix, whatever the target's name
    with _locked(target.parent):
        for path in target.parent.glob(f"{UNFINISHED}*"):
            if path.name.startswith(prefix) and (lock := lock_folder(path, _ALONE)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)
        space = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        lock = lock_folder(space, _ALONE)
    assert lock is not None, "no other process knows the folder"
    try:
        yield space
    finally:
        shutil.rmtree(space, ignore_errors=True)
        os.close(lock)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
