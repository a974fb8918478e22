"""What a job's process tells the world while it works: the worker through a pipe, readers through the database."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from server.training.queue.leases import Claim, Leases
from server.training.worker.job_pipe import WorkerLink
from server.training.worker.job_trace import JobTrace
from server.training.worker.yielding import Yielding

SLOWEST_BYTES_PER_SECOND = 1_000_000
"""Of a disk or an object store. What moves its bytes more slowly counts as hung."""
SLOWEST_PASS = 1e9
"""Tokens times parameters a second, forward and backward: about a thirtieth of what two idle cores with AVX2 do
(docs/performance.md). What computes more slowly counts as hung."""
SLOWEST_PASS_ON_GPU = 100 * SLOWEST_PASS
_BEAT_SECONDS = 1.0


class Leave(Exception):
    """The worker wants this process to checkpoint and end."""


class JobReporter:
    """`run.Reporter` over the worker's pipe and the database.

    `yield_or_leave` raises Leave if the worker wants the process to leave, and `progress`, which is called after
    each step, if the job gives way to another project's.
    """

    def __init__(
        self,
        link: WorkerLink,
        leases: Leases,
        claim: Claim,
        yielding: Yielding,
        num_parameters: int,
        trace: JobTrace | None = None,
        *,
        is_on_gpu: bool,
    ) -> None:
        """`num_parameters` are the base's, by which a pass may take its time, and less of it `is_on_gpu`."""
        self._link = link
        self._num_parameters = num_parameters
        self._slowest_pass = SLOWEST_PASS_ON_GPU if is_on_gpu else SLOWEST_PASS
        self._leases = leases
        self._claim = claim
        self._yielding = yielding
        self._trace = trace
        self._progress: Mapping[str, object] | None = None
        self._metrics: Mapping[str, object] | None = None

    def yield_or_leave(self) -> None:
        self._link.beat()
        self._yielding.pause(self._goes_on)
        if self._link.should_leave:
            raise Leave

    def transferring(self, num_bytes: int) -> AbstractContextManager[None]:
        return beating(self._link.beat, num_bytes / SLOWEST_BYTES_PER_SECOND)

    def computing(self, num_tokens: int) -> AbstractContextManager[None]:
        return beating(self._link.beat, num_tokens * self._num_parameters / self._slowest_pass)

    def progress(self, progress: Mapping[str, object], metrics: Mapping[str, object]) -> None:
        self._progress, self._metrics = progress, metrics
        self._link.beat(progress, metrics)
        if self._link.should_give_way:
            raise Leave

    def keep_progress(self) -> None:
        """Store how far the job is, which its worker does now and then: before it fails."""
        self._leases.heartbeat(self._claim, progress=self._progress, metrics=self._metrics)

    def metrics(self, message: str, data: Mapping[str, object]) -> None:
        self._leases.add_event(self._claim, message, type="metrics", data=data)
        if self._trace is not None:
            self._trace.stepped(data)

    def checkpointed(self, step: int) -> None:
        self._leases.checkpointed(self._claim, step)

    def _goes_on(self) -> bool:
        self._link.beat()
        return not self._link.should_leave


@contextmanager
def beating(beat: Callable[[], None], seconds: float, every: float = _BEAT_SECONDS) -> Iterator[None]:
    """A block in which a thread calls `beat` every so many seconds, since calls in it take long.

    It does so for `seconds` at most: a process that hangs in the block is found after that.
    """
    has_ended = threading.Event()

    def run() -> None:
        until = time.monotonic() + seconds
        while not has_ended.wait(every) and time.monotonic() < until:
            beat()

    thread = threading.Thread(target=run, name="beating", daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()
