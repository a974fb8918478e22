"""A folder beside a file that is being made, which goes when that is done, however it ends.

Makes a backup of a HOME, beside the server and the workers that use it: none of them waits for it.

The database is copied as it is at one moment, and then what that copy needs: the bytes that it names, jobs' rows
and models, uploads. Bytes are there before a row names them, and don't change. So a hole can only come of what is
deleted between the two. Then there is another round: a newer copy of the database, which doesn't need that any
more, and whatever it needs that isn't in the file yet. What was overtaken so the manifest leaves out.

Checkpoints are copied before the database, since a job's events may be ahead of its checkpoint and never behind.
Records of versions are made anew from the database (`restore`); converted bases and native code from elsewhere.
"""

import fcntl
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import IO, BinaryIO

from adapters.catalog.catalog import Catalog
from adapters.errors import CorruptAdapter
from adapters.names import Viewpoint
from adapters.storage.durable import UNFINISHED, sync
from adapters.store.store import AdapterStore
from server import __version__
from server.database import FILE_NAME, copy, existing, faults, opened_copy, schema_of
from server.database.opening import refuse_elsewhere
from server.errors import StartupError
from server.jobs.files import CHECKPOINTS_NAME, JobFiles, used_by_unended, with_folders
from server.jobs.tables import Status
from server.operations.archive import Header, Writer, is_place, writing
from server.storage.home import DATA_NAME, Home
from server.storage.places import Storage
from server.training.checkpoint import FILE_NAMES, Checkpoints
from server.training.files import checked_uploads


@contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """A new folder on the disk of `target`, for its owner alone. What killed processes left of theirs goes first.

    Raises OSError.
    """
    prefix = f"{UNFINISHED}for-{target.name}-"  # not as a restore's begins, whatever the target is called
    with _locked(target.parent):
        for path in target.parent.glob(f"{UNFINISHED}*"):
            if path.name.startswith(prefix) and (hold := _hold(path)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(hold)
        space = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        held = _hold(space)
    assert held is not None, "nobody else knows it"
    try:
        yield space
    finally:
        shutil.rmtree(space, ignore_errors=True)
        os.close(held)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _hold(folder: Path) -> int | None:
    """The handle of a lock on it, which ends with the process; None where another process has it."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


_MAX_ROUNDS = 100
_COMPRESSED = (".gz", ".tgz")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Made:
    """What a backup has. `damaged` says which bytes were so before; they are in it as they are."""

    num_versions: int
    num_adapters: int
    num_jobs: int
    num_unended_jobs: int
    num_uploads: int  # data sets and files
    num_bytes: int  # of all that it has
    num_rounds: int
    damaged: tuple[str, ...]


@dataclass(frozen=True)
class _Needs:
    """What a copy of the database needs: who needs what. A holder never comes back once it has gone.

    Holders are versions, jobs that haven't ended, and jobs whose files weren't removed, which need those.
    """

    held: frozenset[tuple[str, str]]  # such as ("a@2", digest), ("job-7", "ds-1"), ("job-7", "job-7")
    num_versions: int
    jobs: Mapping[str, Status]  # that have files

    @property
    def digests(self) -> list[str]:
        """Of adapters' bytes."""
        return sorted({what for _, what in self.held if _DIGEST.fullmatch(what)})


def back_up(home: Path, target: Path) -> Made:
    """Write a backup of `home` to `target`, whole or not at all; ".gz" and ".tgz" are compressed.

    Raises StartupError, also where the disk is full.
    """
    existing(home)
    with _told_of(target), workspace(target) as space:
        archive = space / "archive"
        with open(archive, "xb", opener=_private) as file:
            with writing(file, target.name.endswith(_COMPRESSED)) as writer:
                made = _Backup(home, space, writer).run()
            file.flush()
            os.fsync(file.fileno())
        archive.replace(target)
        sync(target.parent)
        return made


def stream(home: Path, target: IO[bytes]) -> Made:
    """Write a backup of `home` to an open file, uncompressed: one that was cut off lacks its end. As `back_up`."""
    existing(home)
    scratch = home / "tmp"
    with _told_of("standard output"):
        scratch.mkdir(exist_ok=True)
        with workspace(scratch / "backup") as space, writing(target, compressed=False) as writer:
            made = _Backup(home, space, writer).run()
        target.flush()
        return made


@contextmanager
def _told_of(target: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise StartupError(f"can't make {target}: {where}{error.strerror or error}") from None


class _Backup:
    """The rounds. Names are relative to HOME, with slashes."""

    def __init__(self, home: Path, space: Path, writer: Writer) -> None:
        self._home = Home(home)
        self._files = JobFiles(home)
        self._store = AdapterStore(self._home.adapters)
        self._space = space
        self._writer = writer
        self._folders: dict[str, set[str]] = defaultdict(set)  # what is in the file of each
        self._checkpoints: dict[str, Path] = {}  # by job, the newest that is in the file
        self._num_uploads = 0
        self._numbers = count(1)

    def run(self) -> Made:
        """All of it."""
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
        """A copy of the database as it is now."""
        copied = self._space / f"database-{next(self._numbers)}"
        copy(self._home.path, copied)
        return copied

    def _needs_of(self, copied: Path) -> _Needs:
        """Raises StartupError where the database is damaged, or names bytes that are elsewhere."""
        with opened_copy(copied, self._space) as (engine, place):
            if found := faults(place):
                raise StartupError(f"the database is damaged ({found[0]}): see smolora doctor")
            refuse_elsewhere(engine, "what HOME has of them is a cache, and a backup of it none of the rest")
            listed = Catalog(engine, of=Viewpoint(sees_all=True)).list()
            versions = [version for adapter in listed for version in adapter.versions]
            jobs = with_folders(engine)
            held = {
                (f"{version.name}@{version.version}", version.digest) for version in versions if not version.parts
            }
            held |= {*used_by_unended(engine), *((job_id, job_id) for job_id in jobs)}
            held |= {(job_id, self._rows_of(job_id)) for job_id, status in jobs.items() if not status.has_ended}
            return _Needs(frozenset(held), len(versions), jobs)

    def _was_overtaken(self, needs: _Needs, missing: set[str]) -> bool:
        """Whether somebody has deleted what is missing, or was deleting a job's folder when it was copied.

        Those don't go by one rename. What is missing, and its holder still needs, was never there.
        """
        copied = self._copied()
        gone = needs.held - self._needs_of(copied).held
        copied.unlink()
        return any(what in missing or what in needs.jobs for _, what in gone)

    def _add_needed(self, needs: _Needs) -> tuple[set[str], set[str]]:
        """Have everything in the file that is needed: the members, and what of it isn't there any more."""
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
        of_jobs = {what for who, what in needs.held if who in needs.jobs} - {*needs.jobs, *needs.digests}
        return kept, missing | of_jobs.difference(uploads, kept)

    def _rows_of(self, job_id: str) -> str:
        """Their name, which a job needs until it ends."""
        return (self._files.directory(job_id) / DATA_NAME).relative_to(self._home.path).as_posix()

    def _folders_of(self, job_id: str) -> Iterator[Path]:
        """Those with a job's files, but for its checkpoints."""
        root = self._files.directory(job_id)
        if root.is_dir():
            yield root
            for path in sorted(root.rglob("*/")):
                if not any(part == CHECKPOINTS_NAME or part[0] == "." for part in path.relative_to(root).parts):
                    yield path

    def _upload_folders(self) -> Iterator[Path]:
        """Of all data sets and files; some may be gone by now."""
        for project in self._home.projects():
            for root in (self._home.datasets(project), self._home.files(project)):
                if root.is_dir():
                    yield from sorted(path for path in root.glob("*/") if path.name[0] != ".")

    def _add_checkpoint(self, job_id: str) -> None:
        """The newest one of the job, where it has any; its worker may be writing the next one."""
        for _, _, place in reversed(Checkpoints(self._files.checkpoints(job_id), 0).stored()):
            names: set[str] = set()
            if self._keep(place, names) and {Path(name).name for name in names} == FILE_NAMES:
                self._checkpoints[job_id] = place
                return

    def _keep(self, folder: Path, kept: set[str], grows: bool = False) -> bool:
        """Have the folder's files in the file, and name them in `kept`; False where it is gone.

        All are opened before the first is read: what is deleted meanwhile is copied all the same. One that was
        copied before is looked at again only where it `grows`.
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
        """The name, once the file has it: as much as there is now, since a log grows."""
        if name not in self._writer.members:
            facts = os.fstat(file.fileno())
            self._writer.add(name, file, facts.st_size, facts.st_mtime)
        return name

    def _damaged(self, needs: _Needs) -> Iterator[str]:
        """Of what is still there: what was deleted meanwhile was whole."""
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
