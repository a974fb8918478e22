"""Start worker processes, restart those that die, and list the workers that are alive.

A worker that dies is started again after a delay, which doubles as long as the worker dies soon after its start.
If a worker exited because the base can't be loaded, the delay is longer; each try adds an event to the job that
the worker had claimed. The workers are in this process's group, and end when this process ends for any reason.

Each worker keeps a lock on a file of its own under HOME. The kernel releases the lock when the worker dies. So
the list includes idle workers and workers in other containers, and a killed worker leaves the list at once.
"""

import fcntl
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from server.config import WorkerSettings
from server.jobs.pipe import EXIT_NO_BASE

_FOLDER = "workers"
_PATIENCE_SECONDS = 2.0  # that `_locked` waits for a concurrent `workers_of`, which takes the lock briefly
_RETRY_SECONDS = 0.005
_NUMBERS = Path("/proc/self/ns/pid")
_MACHINES_OWN = 0xEFFFFFFC  # <linux/proc_ns.h>


def own_name() -> str:
    """Return the name under which this worker claims jobs and is listed.

    A container has its own process ids and may have the machine's host name, so the name contains the PID
    namespace.
    """
    name = f"{socket.gethostname()}:{os.getpid()}"
    with suppress(OSError):  # not on Linux
        if (numbering := _NUMBERS.stat().st_ino) != _MACHINES_OWN:
            name += f":{numbering}"
    return name


@contextmanager
def present(home: Path) -> Iterator[None]:
    """List this process among the workers while the block runs.

    If its lock file can't be created, or another worker has the same name, the process isn't listed but works.
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
    """Return the names of the workers of `home` that are alive, and remove the lock files of dead workers."""
    try:
        files = sorted((home / _FOLDER).iterdir())
    except OSError:
        return []
    return [file.name for file in files if _is_held(file)]


def started_at(home: Path, name: str) -> datetime:
    """Return when a worker of `home` began to be listed, or now if it isn't listed any more."""
    try:
        return datetime.fromtimestamp((home / _FOLDER / name).stat().st_mtime, UTC)
    except FileNotFoundError:
        return datetime.now(UTC)


def _locked(path: Path) -> int:
    """Create and lock the file, and return its descriptor.

    Raise OSError if that fails, or if another process has the lock.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):  # a concurrent `workers_of` removed the file as a dead worker's
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
    """Return whether a process has locked the file. If no process has, remove the file."""
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


FIRST_DELAY = 0.25
MAX_DELAY = 4.0  # short, so that a dead worker's job is soon claimed again
FIRST_NO_BASE_DELAY = 30.0
MAX_NO_BASE_DELAY = 600.0
GRACE_SECONDS = 25.0  # for workers to release their jobs: more than a worker gives its job's process

_YOUNG_SECONDS = 10.0
_YOUNG_NO_BASE_SECONDS = 60.0  # finding out that the base can't be loaded takes a while
_TICK_SECONDS = 0.1

log = logging.getLogger("smolora.supervisor")


def worker_command(settings: WorkerSettings) -> list[str]:
    """Return the command that runs a worker with these settings, supervised by this process."""
    return [sys.executable, "-P", "-m", "server.jobs.worker", settings.to_json(), str(os.getpid())]


class Supervisor:
    """Keeps `num_workers` processes running, each started with `command`. `start` starts them."""

    def __init__(
        self,
        num_workers: int,
        command: Sequence[str],
        grace_seconds: float = GRACE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = [_Slot(command) for _ in range(num_workers)]
        self._grace_seconds = grace_seconds
        self._clock = clock
        self._is_stopping = threading.Event()
        self._is_hurried = False
        # The kernel kills a worker when the thread that started it ends, so this thread must outlive the workers.
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    @property
    def pids(self) -> list[int]:
        """Return the process ids of the running workers. A worker that has just ended may be included."""
        return [slot.process.pid for slot in self._slots if slot.process is not None]

    @property
    def is_running(self) -> bool:
        """Return whether workers may still be running."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the workers, on a thread. Call it once."""
        if self._slots:
            self._thread.start()

    def ask_to_stop(self) -> None:
        """Make the workers release their jobs and exit.

        Return at once. Workers that don't exit in time are killed later.
        """
        self._is_stopping.set()

    def hurry(self) -> None:
        """Stop as `ask_to_stop` does, but kill the workers without waiting for them to exit."""
        self._is_hurried = True
        self.ask_to_stop()

    def _run(self) -> None:
        while not self._is_stopping.wait(_TICK_SECONDS):
            for slot in self._slots:
                try:
                    slot.tend(self._clock())
                except OSError as error:
                    log.warning("can't start a worker: %s", error.strerror)
        running = [slot.process for slot in self._slots if slot.process is not None]
        for process in running:
            process.terminate()
        deadline = self._clock() + self._grace_seconds
        while any(process.poll() is None for process in running):
            if self._is_hurried or self._clock() > deadline:
                log.warning("workers didn't end in time: killed")
                for process in running:
                    process.kill()
            time.sleep(_TICK_SECONDS)


class _Slot:
    """One worker process, which is restarted after it ends."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._command = command
        self._started_at = 0.0
        self._next_start = 0.0
        self._delay = FIRST_DELAY

    def tend(self, now: float) -> None:
        """Start a worker if none runs and the delay is over. Raise OSError if it can't be started."""
        if self.process is not None and (code := self.process.poll()) is not None:
            log.warning("worker %d ended with exit code %d", self.process.pid, code)
            first, most, young = FIRST_DELAY, MAX_DELAY, _YOUNG_SECONDS
            if code == EXIT_NO_BASE:
                first, most, young = FIRST_NO_BASE_DELAY, MAX_NO_BASE_DELAY, _YOUNG_NO_BASE_SECONDS
            is_young = now - self._started_at < young
            self._delay = min(max(2 * self._delay, first), most) if is_young else first
            if code == EXIT_NO_BASE:
                log.error("training waits: a worker can't load the base; the next try is in %g s", self._delay)
            self._next_start = now + self._delay
            self.process = None
        if self.process is None and now >= self._next_start:
            self._started_at = now
            self._next_start = now + MAX_DELAY  # if it can't be started
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)  # noqa: S603 it is ours
