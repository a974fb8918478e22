"""Which workers live: each keeps a lock on a file of its own under HOME, which the kernel lets go of with it.

So it is known of workers of other containers too, of idle ones, and of killed ones at once.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FOLDER = "workers"
_PATIENCE_SECONDS = 2.0  # with whoever looks just now
_RETRY_SECONDS = 0.005
_NUMBERS = Path("/proc/self/ns/pid")
_MACHINES_OWN = 0xEFFFFFFC  # <linux/proc_ns.h>


def own_name() -> str:
    """What this process calls itself in its claims.

    A container numbers its processes by itself, and may have the machine's name.
    """
    name = f"{socket.gethostname()}:{os.getpid()}"
    with suppress(OSError):  # it isn't Linux
        if (numbering := _NUMBERS.stat().st_ino) != _MACHINES_OWN:
            name += f":{numbering}"
    return name


@contextmanager
def present(home: Path) -> Iterator[None]:
    """A block in which `workers_of` has this process.

    Where its file can't be made, or another worker has the name (on a machine that is called the same, say),
    nobody sees it, and it works all the same.
    """
    handle = None
    with suppress(OSError):
        handle = _locked(home / _FOLDER / own_name())
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def workers_of(home: Path) -> list[str]:
    """The names of those that live. Files of others are removed."""
    try:
        files = sorted((home / _FOLDER).iterdir())
    except OSError:
        return []
    return [file.name for file in files if _is_held(file)]


def _locked(path: Path) -> int:
    """A handle with the lock on the file that is at `path`. Raises OSError, also where another keeps it."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):  # who looked just now took it for a dead worker's
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(handle)
                raise
            time.sleep(_RETRY_SECONDS)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_held(path: Path) -> bool:
    """Whether somebody has the lock. Removes the file where nobody has."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False
