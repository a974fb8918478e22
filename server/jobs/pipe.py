"""The channel between a worker and the process in which a job runs. Standard library only.

The worker passes the assignment as the last argument, and sends two signals: SIGTERM (write a checkpoint and exit)
and SIGUSR1 (the same after the current step). The process writes lines to a pipe: each line shows that the process
makes progress, and may have the job's progress and metrics.

The process's exit code says how the attempt ended. EXIT_DONE: the job's end is stored. EXIT_LEFT: the process has
exited as asked. EXIT_NO_BASE: this worker can't run any job; the process has sent the reason.
EXIT_NO_DATABASE, EXIT_NO_STORE and EXIT_NO_ROOM: the database, the object store or the disk can't be used now.
EXIT_LATEST_MOVED: each time that the process compared its result with the latest version, another became latest.
After any other code, the job is tried again. The process is killed if the worker dies or loses the job.
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
    """Have the kernel kill this process when its parent dies. Exit at once if `parent` has died already.

    The kernel watches the thread that started this process, so that thread must stay alive. This works only on
    Linux. On other systems, call `has_lost_parent` regularly.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if has_lost_parent(parent):  # it died before the call above
        os._exit(1)


def has_lost_parent(parent: int) -> bool:
    """Return whether `parent`, which started this process, has died."""
    return os.getppid() != parent


EXIT_DONE = 0
EXIT_LEFT = 75
EXIT_NO_BASE = 78
EXIT_NO_DATABASE = 79
EXIT_NO_STORE = 80
EXIT_NO_ROOM = 81
EXIT_LATEST_MOVED = 82
NO_ROOM = "its worker's disk is full"
HINDRANCES = {
    EXIT_NO_DATABASE: "its process can't use the database",
    EXIT_NO_STORE: "the object store can't be reached, or refuses",
    EXIT_NO_ROOM: NO_ROOM,
    EXIT_LATEST_MOVED: "`latest` moved each time while it was measured",
}
"""By exit code: the text for the job's events if an attempt failed through no fault of the job."""

MAX_LINE = 4096  # bytes; a write to a pipe is atomic up to this size (PIPE_BUF)
MAX_REASON = 600  # characters; JSON encodes each in up to six bytes


@dataclass(frozen=True)
class Assignment:
    """One attempt at a job, assigned to a process. `settings` is the JSON of `server.config.WorkerSettings`."""

    job_id: str
    token: int
    owner: str
    settings: str
    parent: int  # the worker's process id
    pipe: int  # the file descriptor that the process writes its lines to

    def to_argument(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_argument(cls, argument: str) -> Self:
        return cls(**json.loads(argument))


class WorkerLink:
    """The job process's side of the channel. Create it on the main thread at the start, to set signal handlers."""

    def __init__(self, assignment: Assignment) -> None:
        self.should_leave = False
        self.should_give_way = False
        self._pipe = assignment.pipe
        signal.signal(signal.SIGTERM, self._asked)
        signal.signal(signal.SIGUSR1, self._asked)
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # a terminal sends SIGINT to the whole group; the worker sends SIGTERM
        end_with_parent(assignment.parent)
        os.set_blocking(self._pipe, False)

    def beat(
        self, progress: Mapping[str, object] | None = None, metrics: Mapping[str, object] | None = None
    ) -> None:
        """Show the worker that this process isn't hung. Call this at least once per micro-batch.

        The job's `progress` and `metrics` may be left out.
        """
        news = {"progress": progress, "metrics": metrics}
        self._say({key: value for key, value in news.items() if value is not None})

    def cannot_work(self, reason: str) -> None:
        """Report why the process exits with EXIT_NO_BASE or EXIT_NO_DATABASE."""
        self._say({"reason": reason[:MAX_REASON]})

    def _say(self, said: Mapping[str, object]) -> None:
        line = (json.dumps(said, allow_nan=False) if said else "").encode() + b"\n"
        if len(line) > MAX_LINE:
            raise ValueError(f"more than {MAX_LINE} bytes to say")
        try:
            os.write(self._pipe, line)
        except BlockingIOError:  # the pipe is full, and the worker needs the newest line only
            pass
        except BrokenPipeError:
            os._exit(1)  # the worker is dead, and the kernel didn't kill this process

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.should_give_way = True
        else:
            self.should_leave = True


class Child:
    """The worker's side of the channel. Starts the job's process by `command`; its output is appended to `log`."""

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
        """Raise OSError if the process can't be started."""
        self.progress: Mapping[str, object] | None = None
        self.metrics: Mapping[str, object] | None = None
        self.reason: str | None = None  # why the process can't run any job
        self._rest = b""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._pipe, theirs = os.pipe()
        try:
            os.set_blocking(self._pipe, False)
            assignment = Assignment(job_id, token, owner, settings, os.getpid(), theirs)
            with open(log, "ab") as output:
                self._process = subprocess.Popen(  # noqa: S603 the worker chose it
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
        """Return the exit code, or None if the process still runs after `seconds`.

        A negative code means that the signal with this number killed the process.
        """
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def listen(self) -> bool:
        """Read the lines that the process has written since the last call. Return whether there were any."""
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
        """Ask the process to exit after its current step.

        Call this only after the process has reported progress: before that, the process may not handle the signal
        yet, and the signal would kill it.
        """
        self._process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Kill the process if it still runs, and close the pipe."""
        self._process.kill()
        self._process.wait()
        os.close(self._pipe)
