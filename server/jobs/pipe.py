"""Processes that end when the one that started them dies, however it dies.

Both ends of the pipe between a worker and the process in which a job runs. Standard library only.

Down go the assignment, as the last argument, and two signals: SIGTERM (checkpoint and leave) and SIGUSR1 (do so
once the step in hand is done). Up, through a pipe, come lines:
each says that the process makes progress, and may say how far it is. The process ends with EXIT_DONE once it
has stored how the job ended, with EXIT_LEFT once it has left as asked, and with EXIT_NO_BASE, having said why,
where the fault is not the job's: no process of this worker could work on any. With EXIT_NO_DATABASE, EXIT_NO_STORE
and EXIT_NO_ROOM the database, the object store or the disk stood in its way, for now. Whatever else it ends with
means another attempt. It is killed where the worker dies, or the job is no longer the worker's.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Self

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process once `parent`, which started it, has died; exit at once where it has.

    The kernel watches the *thread* that started this process, so that one must stay as long. Where the kernel
    can't (it isn't Linux), `has_lost_parent` is to be asked now and then.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if has_lost_parent(parent):  # before the kernel was told
        os._exit(1)


def has_lost_parent(parent: int) -> bool:
    """Whether `parent`, which started this process, has died."""
    return os.getppid() != parent


EXIT_DONE = 0
EXIT_LEFT = 75
EXIT_NO_BASE = 78
EXIT_NO_DATABASE = 79
EXIT_NO_STORE = 80
EXIT_NO_ROOM = 81
NO_ROOM = "its worker's disk is full"
HINDRANCES = {
    EXIT_NO_DATABASE: "its process can't use the database",
    EXIT_NO_STORE: "the object store can't be reached, or refuses",
    EXIT_NO_ROOM: NO_ROOM,
}
"""What stood in an attempt's way, as the job's events have it, by the exit code."""

MAX_LINE = 4096  # bytes that a pipe takes whole or not at all (PIPE_BUF)
MAX_REASON = 600  # characters, of which JSON makes up to six bytes each


@dataclass(frozen=True)
class Assignment:
    """An attempt for a process to run. `settings` is the JSON of `server.config.WorkerSettings`."""

    job_id: str
    token: int
    owner: str
    settings: str
    parent: int  # the worker's process id
    pipe: int  # the file descriptor that its lines go to

    def to_argument(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_argument(cls, argument: str) -> Self:
        return cls(**json.loads(argument))


class WorkerLink:
    """The process's end. Make one at the start, on the main thread: it handles signals from then on."""

    def __init__(self, assignment: Assignment) -> None:
        self.should_leave = False
        self.should_give_way = False
        self._pipe = assignment.pipe
        signal.signal(signal.SIGTERM, self._asked)
        signal.signal(signal.SIGUSR1, self._asked)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to everyone: the worker will ask
        end_with_parent(assignment.parent)
        os.set_blocking(self._pipe, False)

    def beat(
        self, progress: Mapping[str, object] | None = None, metrics: Mapping[str, object] | None = None
    ) -> None:
        """Say that there is progress, at least once a micro-step, and now and then how far the job is."""
        news = {"progress": progress, "metrics": metrics}
        self._say({key: value for key, value in news.items() if value is not None})

    def cannot_work(self, reason: str) -> None:
        """Say why the process ends with EXIT_NO_BASE or EXIT_NO_DATABASE; for the worker's log alone."""
        self._say({"reason": reason[:MAX_REASON]})

    def _say(self, said: Mapping[str, object]) -> None:
        line = (json.dumps(said, allow_nan=False) if said else "").encode() + b"\n"
        if len(line) > MAX_LINE:
            raise ValueError(f"more than {MAX_LINE} bytes to say")
        try:
            os.write(self._pipe, line)
        except BlockingIOError:  # the worker doesn't read just now; it needs the newest line only
            pass
        except BrokenPipeError:
            os._exit(1)  # the worker is dead, and the kernel didn't say so

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.should_give_way = True
        else:
            self.should_leave = True


class Child:
    """The worker's end: a process that runs `command` with an assignment, its output added to the file `log`."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        job_id: str,
        token: int,
        owner: str,
        settings: str,
    ) -> None:
        """Raises OSError where it can't be started."""
        self.progress: Mapping[str, object] | None = None
        self.metrics: Mapping[str, object] | None = None
        self.reason: str | None = None  # why it can't work on any job
        self._rest = b""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._pipe, theirs = os.pipe()
        try:
            os.set_blocking(self._pipe, False)
            assignment = Assignment(job_id, token, owner, settings, os.getpid(), theirs)
            with open(log, "ab") as output:
                self._process = subprocess.Popen(  # noqa: S603 as the worker was told
                    [*command, assignment.to_argument()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=[theirs],
                )
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(theirs)

    def wait(self, seconds: float) -> int | None:
        """The exit code (below 0: the signal that killed it), or None where it still runs after that time."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def listen(self) -> bool:
        """Take in what it said since the last time; whether it said anything."""
        heard = b""
        try:
            while chunk := os.read(self._pipe, 1 << 16):
                heard += chunk
        except BlockingIOError:
            pass
        *lines, self._rest = (self._rest + heard).split(b"\n")
        for line in filter(None, lines):
            said = json.loads(line)
            self.progress = said.get("progress", self.progress)
            self.metrics = said.get("metrics", self.metrics)
            self.reason = said.get("reason", self.reason)
        return bool(lines)

    def ask_to_leave(self) -> None:
        self._process.terminate()

    def ask_to_give_way(self) -> None:
        """Have the process leave after its step. Call it only once the process has reported progress: before that
        it may not handle the signal yet, and would die of it.
        """
        self._process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Kill what is left of it."""
        self._process.kill()
        self._process.wait()
        os.close(self._pipe)
