"""HOME, the folder with everything that is stored: its owner's alone, and served by one process at a time."""

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
"""How the folder begins in which a restore or a move collects what HOME is to have, until all is in its place."""
PLACES = "places"
PROJECTS = "projects"
TRAIN_NAME, VALIDATION_NAME = "train.safetensors", "validation.safetensors"
DATA_NAME = "data.json"
"""A job's rows. DATA_NAME is written last."""


@dataclass(frozen=True)
class Home:
    """Where things lie under HOME, but for the database and the single files of `reserve` and `yielding`.

    Uploads are a project's own: of all but the default one below a folder of its name.
    """

    path: Path

    @property
    def adapters(self) -> Path:
        """Bytes by digest, and records by name."""
        return self.path / "adapters"

    @property
    def jobs(self) -> Path:
        """A folder for each job."""
        return self.path / "jobs"

    def datasets(self, project: str) -> Path:
        """A folder for each data set that the project uploaded."""
        return self._of(project) / "datasets"

    def files(self, project: str) -> Path:
        """A folder for each of the project's files of /v1, uploads and jobs' results."""
        return self._of(project) / "files"

    def projects(self) -> list[str]:
        """Those that may have uploaded something."""
        root = self.path / PROJECTS
        others = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
        return [DEFAULT_PROJECT, *sorted(others)]

    def _of(self, project: str) -> Path:
        return self.path if project == DEFAULT_PROJECT else self.path / PROJECTS / project

    @property
    def places(self) -> Path:
        """An empty file for each PostgreSQL database whose bytes are here: `server.database.opening`."""
        return self.path / PLACES

    @property
    def keyed(self) -> Path:
        """An empty file that says that there once was an API key, should the database be lost."""
        return self.path / "keyed"

    @property
    def models(self) -> Path:
        """Converted bases, by name."""
        return self.path / "models"

    @property
    def native(self) -> Path:
        """Compiled native code."""
        return self.path / "native"

    def native_places(self, base_directory: Path, base_dir: Path | None) -> list[Path]:
        """Where native code for a converted base may be: beside it, in an image's `base_dir`, where it is for any
        base, and last here, where it is made.
        """
        carried = [] if base_dir is None else [base_dir / "native"]
        return [base_directory / "native", *carried, self.native]


def make(home: Path, *, to_restore: bool = False) -> bool:
    """Make the folder if need be, and shut everybody else out of it; whether they are out. Raises StartupError,
    also where a restore was cut off there, but for who is `to_restore` again.

    A folder of another user, such as a volume that a group shares, keeps its mode.
    """
    if not to_restore and next(home.glob(f"{RESTORING}*"), None) is not None:
        raise StartupError(
            f"SMOLORA_HOME={home}: smolora restore or move is at work there, or was cut off: run it again"
        )
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = home.stat()
        if found.st_uid == os.geteuid() and not found.st_mode & stat.S_ISVTX:  # which /tmp has
            with suppress(OSError):  # of file systems without modes
                home.chmod(0o700)
        return not home.stat().st_mode & 0o077
    except OSError as error:
        raise _cannot_write(home, error) from None


@contextmanager
def serving(home: Path) -> Iterator[None]:
    """A block in which no other process serves `home`. Raises StartupError where one does.

    Two would delete each other's bytes: what a request or an upload holds, its own process alone knows. The lock
    goes with this process, however it ends: its children don't inherit the handle.
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
        except OSError as error:  # of file systems without locks
            raise StartupError(
                f"SMOLORA_HOME={home}: can't lock a file there: {error.strerror or error}; choose another --home, "
                "on a local disk"
            ) from None
        with suppress(OSError):  # no space for who it is
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def prepare(home: Path) -> None:
    """Try writing there, and clear what killed servers left; for who is `serving` it. Raises StartupError."""
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
    # Uploads are spooled there, too: /tmp may be memory, or not writable at all.
    tempfile.tempdir = str(scratch)


def _cannot_write(home: Path, error: OSError) -> StartupError:
    reason = error.strerror or str(error)
    return StartupError(f"SMOLORA_HOME={home}: can't write there: {reason}; choose another --home")
