"""The interface for trace spans. Its implementation, `server.telemetry.otel`, alone imports OpenTelemetry.

If tracing is off there is no tracer, and callers create no spans. Attributes are numbers, names and ids, never a
user's text. Times are nanoseconds since 1970.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from server.config.environment import trace_exporters

Value = str | int | float | bool | Sequence[str]
Attributes = Mapping[str, Value]

log = logging.getLogger("smolora.tracing")


class Span(Protocol):
    """A timed operation: the root of a trace, or the child of another span."""

    @property
    def trace_id(self) -> str:
        """Return the trace's id: 32 hexadecimal digits."""
        ...

    @property
    def traceparent(self) -> str:
        """Return the W3C traceparent header with which another process can continue the trace."""
        ...

    def child(self, name: str, start: int | None = None, attributes: Attributes | None = None) -> "Span":
        """Begin a child span, now or at `start`."""
        ...

    def end(self, at: int | None = None, attributes: Attributes | None = None, error: str | None = None) -> None:
        """End the span, now or at `at`. `error` is an error's type, not its message. Call this method once."""
        ...


class Tracer(Protocol):
    """Begins traces, and exports them from its own thread."""

    def request(self, headers: Mapping[str, str]) -> Span | None:
        """Begin the span of an HTTP request, in the trace that `headers` name.

        Return None if the trace isn't sampled.
        """
        ...

    def work(self, name: str, attributes: Attributes, because_of: str | None = None) -> Span | None:
        """Begin the span of background work, or return None if the trace isn't sampled.

        `because_of` is the traceparent of the span that caused the work.
        """
        ...

    def close(self) -> None:
        """Export the remaining spans. Give up after a few seconds."""
        ...


def open_tracer() -> Tracer | None:
    """Return a tracer if OTEL_ variables ask for one, else None. A missing exporter is logged and ignored."""
    if not (exporters := trace_exporters()):
        return None
    try:
        from server.telemetry.otel import OtelTracer, exporter_of
    except ImportError:
        log.warning(
            "OTEL_ variables ask for traces, which need an extra: pip install -e '.[otel]' in smolora's folder"
        )
        return None
    try:
        return OtelTracer([exporter_of(name) for name in exporters])
    except Exception as error:  # an exporter may raise anything
        log.warning("tracing is off: %s", error)
        return None
