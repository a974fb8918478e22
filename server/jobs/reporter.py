"""Report a job's progress from its process: to the worker through a pipe, and to clients through the database.

Also record the attempt's trace spans: loading the base, groups of steps, and the work after the steps.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from server.jobs.files import TRACEPARENT_NAME
from server.jobs.jobs import Job
from server.jobs.leases import Claim, Leases
from server.jobs.pipe import WorkerLink
from server.jobs.yielding import Yielding
from server.telemetry.spans import Span, Tracer, Value

_STEPS_SECONDS = 10.0
_MEASURES = ("train_loss", "eval_loss", "learning_rate", "gradient_norm")


class JobTrace:
    """The trace spans of one attempt at a job. Without a tracer, every method is a no-op."""

    def __init__(self, tracer: Tracer | None, job: Job, attempt: int, directory: Path) -> None:
        """Begin the trace. `directory` is the job's folder."""
        self._span: Span | None = None
        self._since = time.time_ns()  # the end of the last span
        self._first_step: int | None = None
        if tracer is None:
            return
        because_of = None
        with suppress(OSError):
            because_of = (directory / TRACEPARENT_NAME).read_text(encoding="ascii")
        attributes: dict[str, Value] = {
            "smolora.job.id": job.id,
            "smolora.job.kind": job.kind,
            "smolora.job.attempt": attempt,
            "smolora.adapter": job.name,
            "smolora.project": job.project,
        }
        self._span = tracer.work(f"{job.kind} {job.name}", attributes, because_of)

    @contextmanager
    def attempt(self, unless: type[BaseException]) -> Iterator[None]:
        """Record the block as the attempt's span. Any exception marks it as failed, except the type `unless`."""
        error = None
        try:
            yield
        except BaseException as raised:
            error = None if isinstance(raised, unless) else type(raised).__name__
            raise
        finally:
            if self._span is not None:
                self._record("finish", self._since, {})
                self._span.end(error=error)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the block as a span within the attempt's span."""
        start = time.time_ns()
        try:
            yield
        finally:
            self._record(name, start, {})

    def stepped(self, measured: Mapping[str, object]) -> None:
        """Note the end of a training step that had the measurements `measured`.

        The steps since the last span are recorded as one span after an evaluation, or after 10 s.
        """
        if self._span is None:
            return
        step = measured["step"]
        assert isinstance(step, int)
        self._first_step = step if self._first_step is None else self._first_step
        if "eval_loss" in measured or time.time_ns() - self._since > _STEPS_SECONDS * 1e9:
            found = {name: value for name in _MEASURES if isinstance(value := measured.get(name), int | float)}
            attributes: dict[str, Value] = {f"smolora.{name}": value for name, value in found.items()}
            attributes |= {"smolora.step.first": self._first_step, "smolora.step.last": step}
            self._record("steps", self._since, attributes)
            self._first_step = None

    def _record(self, name: str, start: int, attributes: Mapping[str, Value]) -> None:
        self._since = time.time_ns()
        if self._span is not None:
            self._span.child(name, start, attributes).end(self._since)


SLOWEST_BYTES_PER_SECOND = 1_000_000
"""Speed of a disk or an object store. A slower transfer counts as hung."""
SLOWEST_PASS = 1e9
"""Speed of a forward and backward pass, in tokens times parameters per second: about a thirtieth of the speed of
two idle cores with AVX2 (docs/performance.md). A slower pass counts as hung.
"""
SLOWEST_PASS_ON_GPU = 100 * SLOWEST_PASS
_BEAT_SECONDS = 1.0


class Leave(Exception):
    """The worker wants this process to write a checkpoint and exit."""


class JobReporter:
    """An implementation of `run.Reporter` that writes to the worker's pipe and to the database.

    `yield_or_leave` raises Leave if the worker wants the process to exit. `progress`, which is called after each
    step, raises Leave if the job gives way to another project's job.
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
        """`is_on_gpu` and the base's `num_parameters` decide how slow a training pass must be to count as hung."""
        self._link = link
        self._num_parameters = num_parameters
        self._slowest_pass = SLOWEST_PASS_ON_GPU if is_on_gpu else SLOWEST_PASS
        self._leases = leases
        self._claim = claim
        self._yielding = yielding
        self._trace = trace
        self._progress: Mapping[str, object] | None = None
        self._metrics: Mapping[str, object] | None = None
        self._has_measured = False

    def yield_or_leave(self) -> None:
        self._link.beat()
        if self._has_measured:
            self._leases.flush_if_due(self._claim)
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
        """Store the newest progress. Call this before marking a job as failed: stored progress may be older."""
        self._leases.heartbeat(self._claim, progress=self._progress, metrics=self._metrics)

    def metrics(self, message: str, data: Mapping[str, object]) -> None:
        self._leases.add_metrics(self._claim, message, data)
        self._has_measured = True
        if self._trace is not None:
            self._trace.stepped(data)

    def flush(self) -> None:
        self._leases.flush(self._claim)

    def checkpointed(self, step: int) -> None:
        self._leases.checkpointed(self._claim, step)

    def _goes_on(self) -> bool:
        self._link.beat()
        return not self._link.should_leave


@contextmanager
def beating(beat: Callable[[], None], seconds: float, every: float = _BEAT_SECONDS) -> Iterator[None]:
    """Tell the worker that this process isn't hung, while the block makes a long call.

    A thread calls `beat`, which tells the worker so, every `every` seconds. The thread stops after `seconds`, so
    that the worker notices a process that hangs in the block.
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
