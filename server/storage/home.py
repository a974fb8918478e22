"""HOME, the folder with everything that is stored. Only its owner may read it; one process at a time serves it."""

import fcntl
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from adapters.names import DEFAULT_PROJECT
from adapters.storage.durable import UNFINISHED
from server.errors import StartupError

LOCK_NAME = "server.lock"
RESTORING = f"{UNFINISHED}restore-"
"""Prefix of the folder in which a restore or a move collects the parts of a new HOME."""
PLACES = "places"
"""The folder with an empty file for each PostgreSQL database whose bytes are in this HOME or bucket."""
PROJECTS = "projects"
ROWS_COPY, MODEL_COPY, CHECKPOINT_COPY = "rows", "model-", "checkpoint-"
"""Ids of copies in a bucket's folder `jobs/<id>`: rows, model-<token>, checkpoint-<token>-<step>."""


@dataclass(frozen=True)
class Home:
    """The paths of most things below HOME.

    Other modules have the paths of the database, the reserve of disk space, and the file that says how busy a
    server is.

    Each project has its own uploads: the default project's are directly below HOME, any other project's are below
    `projects/<name>`.
    """

    path: Path

    @property
    def adapters(self) -> Path:
        """The folder with the adapters' bytes, by digest, and a JSON record of each version, by name."""
        return self.path / "adapters"

    @property
    def jobs(self) -> Path:
        """The folder with one folder for each job."""
        return self.path / "jobs"

    def datasets(self, project: str) -> Path:
        """Return the folder with one folder for each data set that the project uploaded."""
        return self._of(project) / "datasets"

    def files(self, project: str) -> Path:
        """Return the folder with one folder for each of the project's files: uploads to /v1, and jobs' results."""
        return self._of(project) / "files"

    def projects(self) -> list[str]:
        """Return the projects that may have uploads in this HOME."""
        root = self.path / PROJECTS
        others = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
        return [DEFAULT_PROJECT, *sorted(others)]

    def _of(self, project: str) -> Path:
        return self.path if project == DEFAULT_PROJECT else self.path / PROJECTS / project

    @property
    def keyed(self) -> Path:
        """An empty file that exists if there has ever been an API key.

        If the database is lost, the file shows that clients still need a key.
        """
        return self.path / "keyed"

    @property
    def backed_up(self) -> Path:
        """An empty file, written by each complete backup: its time is the backup's."""
        return self.path / "backed-up"

    @property
    def models(self) -> Path:
        """The folder with the converted bases, by name."""
        return self.path / "models"

    @property
    def native(self) -> Path:
        """The folder with native code that was compiled at a first start."""
        return self.path / "native"


def make(home: Path, *, to_restore: bool = False) -> bool:
    """Create the folder if it doesn't exist, and restrict it to its owner. Return whether nobody else has access.

    Raise StartupError if that fails, or if a restore or a move into the folder is running or was interrupted. A
    caller that is itself a restore or a move passes `to_restore`: then an interrupted one is no error. The mode of
    a folder that belongs to another user, such as a shared volume, isn't changed.
    """
    if not to_restore and next(home.glob(f"{RESTORING}*"), None) is not None:
        raise StartupError(
            f"SMOLORA_HOME={home}: smolora restore or move is at work there, or was interrupted: run it again"
        )
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = home.stat()
        if found.st_uid == os.geteuid() and not found.st_mode & stat.S_ISVTX:  # /tmp has this bit
            with suppress(OSError):  # file systems without modes
                home.chmod(0o700)
        return not home.stat().st_mode & 0o077
    except OSError as error:
        raise _cannot_write(home, error) from None


@contextmanager
def serving(home: Path) -> Iterator[None]:
    """Lock `home` during the block. Raise StartupError if another process has locked it.

    Two servers would delete each other's bytes, since only a process itself knows what its requests and uploads
    use. The lock ends with this process, even if it is killed, since child processes don't inherit the handle.
    """
    try:
        handle = os.open(home / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise _cannot_write(home, error) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.read(handle, 1024).decode(errors="replace").strip() or "another process"
            raise StartupError(
                f"SMOLORA_HOME={home} is served already, by {other}: stop that one, or choose another --home"
            ) from None
        except OSError as error:  # file systems without locks
            raise StartupError(
                f"SMOLORA_HOME={home}: can't lock a file there: {error.strerror or error}; choose another --home, "
                "on a local disk"
            ) from None
        with suppress(OSError):  # the disk may be full
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def prepare(home: Path) -> None:
    """Check that HOME is writable, and remove uploads that killed servers left. Call it while `serving`.

    From then on Python's temporary files are in HOME. Raise StartupError if HOME isn't writable.
    """
    scratch = home.absolute() / "tmp"
    try:
        scratch.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=scratch) as probe:
            probe.write(bytes(1 << 16))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise _cannot_write(home, error) from None
    for leftover in scratch.glob("upload-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    # Uploads are spooled there, too: /tmp may be in memory, or read-only.
    tempfile.tempdir = str(scratch)


def _cannot_write(home: Path, error: OSError) -> StartupError:
    reason = error.strerror or str(error)
    return StartupError(f"SMOLORA_HOME={home}: can't write there: {reason}; choose another --home")
