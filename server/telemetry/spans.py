"""Spans as the rest of the server knows them; `server.telemetry.otel` makes them, which alone knows the library.

Without a tracer there are none: whoever has a span to begin asks for one first, and does nothing where none is.
Attributes are numbers, names and ids, never anybody's text. Times are nanoseconds since 1970.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from server.config.environment import trace_exporters

Value = str | int | float | bool | Sequence[str]
Attributes = Mapping[str, Value]

log = logging.getLogger("smolora.tracing")


class Span(Protocol):
    """Something that takes time, beneath another one or the first of its trace."""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        ...

    @property
    def traceparent(self) -> str:
        """As W3C's header has it, for whoever goes on elsewhere."""
        ...

    def child(self, name: str, start: int | None = None, attributes: Attributes | None = None) -> "Span":
        """A span beneath it that begins now, or began then."""
        ...

    def end(self, at: int | None = None, attributes: Attributes | None = None, error: str | None = None) -> None:
        """It ends now, or has then; `error` is a kind of error, no message. Once."""
        ...


class Tracer(Protocol):
    """What begins traces, and sends them away from a thread of its own."""

    def request(self, headers: Mapping[str, str]) -> Span | None:
        """Of an HTTP request, which goes on the trace that `headers` name; None where it isn't sampled."""
        ...

    def work(self, name: str, attributes: Attributes, because_of: str | None = None) -> Span | None:
        """Of something that nobody waits for; `because_of` is the traceparent of what led to it."""
        ...

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        ...


def open_tracer() -> Tracer | None:
    """As the OTEL_ variables ask; None where they don't. What is missing for it is said, and stops nobody."""
    if not (exporters := trace_exporters()):
        return None
    try:
        from server.telemetry.otel import OtelTracer, exporter_of
    except ImportError:
        log.warning(
            "OTEL_ variables ask for traces: pip install -e '.[otel]' in smolora's folder, which they need"
        )
        return None
    try:
        return OtelTracer([exporter_of(name) for name in exporters])
    except Exception as error:  # of whatever exporter was named
        log.warning("there are no traces: %s", error)
        return None
