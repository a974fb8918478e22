"""The spans of one attempt at a job: loading the base, its steps some seconds at a time, and what follows them."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from server.tracing.spans import Span, Tracer, Value
from server.training.queue.job_files import TRACEPARENT_NAME
from server.training.queue.jobs import Job

_STEPS_SECONDS = 10.0
_MEASURES = ("train_loss", "eval_loss", "learning_rate", "gradient_norm")


class JobTrace:
    """Nothing where there is no tracer."""

    def __init__(self, tracer: Tracer | None, job: Job, attempt: int, directory: Path) -> None:
        """`directory` is the job's."""
        self._span: Span | None = None
        self._since = time.time_ns()  # the end of what has been told
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
        """The block in which everything happens. It fails where it raises, `unless` that."""
        error = None
        try:
            yield
        except BaseException as raised:
            error = None if isinstance(raised, unless) else type(raised).__name__
            raise
        finally:
            if self._span is not None:
                self._tell("finish", self._since, {})
                self._span.end(error=error)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A block that is a span."""
        start = time.time_ns()
        try:
            yield
        finally:
            self._tell(name, start, {})

    def stepped(self, measured: Mapping[str, object]) -> None:
        """A step has ended, with what was measured of it."""
        if self._span is None:
            return
        step = measured["step"]
        assert isinstance(step, int)
        self._first_step = step if self._first_step is None else self._first_step
        if "eval_loss" in measured or time.time_ns() - self._since > _STEPS_SECONDS * 1e9:
            found = {name: value for name in _MEASURES if isinstance(value := measured.get(name), int | float)}
            attributes: dict[str, Value] = {f"smolora.{name}": value for name, value in found.items()}
            attributes |= {"smolora.step.first": self._first_step, "smolora.step.last": step}
            self._tell("steps", self._since, attributes)
            self._first_step = None

    def _tell(self, name: str, start: int, attributes: Mapping[str, Value]) -> None:
        self._since = time.time_ns()
        if self._span is not None:
            self._span.child(name, start, attributes).end(self._since)
