"""Trace spans with OpenTelemetry's SDK, which reads its standard OTEL_ variables.

The SDK's log lines about headers are suppressed. They quote malformed headers of clients, and the headers for the
collector, which may contain a key.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Link, SpanKind, Status, StatusCode, format_span_id, format_trace_id

from server import __version__
from server.telemetry.spans import Attributes

_GROUP = "opentelemetry_traces_exporter"
_CLOSE_SECONDS = 3.0


def _without_header(record: logging.LogRecord) -> bool:
    record.msg, record.args = "OTEL_EXPORTER_OTLP_HEADERS: entries that aren't name=value are ignored", ()
    return True


logging.getLogger("opentelemetry.util.re").addFilter(_without_header)
for _name in ("opentelemetry.baggage", "opentelemetry.trace"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def exporter_of(name: str) -> SpanExporter:
    """Return the exporter that OTEL_TRACES_EXPORTER calls `name`. Raise LookupError if it isn't installed."""
    for found in entry_points(group=_GROUP, name=name):
        exporter: SpanExporter = found.load()()
        return exporter
    known = ", ".join(sorted(found.name for found in entry_points(group=_GROUP)))
    package = f"opentelemetry-exporter-{name.replace('_', '-')}"
    raise LookupError(f"no exporter {name} is installed, but {known}; the package may be {package}")


class OtelSpan:
    """An implementation of `spans.Span`."""

    def __init__(self, span: trace.Span, tracer: trace.Tracer) -> None:
        self._span = span
        self._tracer = tracer

    @property
    def trace_id(self) -> str:
        return format_trace_id(self._span.get_span_context().trace_id)

    @property
    def traceparent(self) -> str:
        found = self._span.get_span_context()
        return f"00-{self.trace_id}-{format_span_id(found.span_id)}-{found.trace_flags:02x}"

    def child(self, name: str, start: int | None = None, attributes: Attributes | None = None) -> "OtelSpan":
        above = trace.set_span_in_context(self._span)
        span = self._tracer.start_span(name, above, attributes=attributes, start_time=start)
        return OtelSpan(span, self._tracer)

    def end(self, at: int | None = None, attributes: Attributes | None = None, error: str | None = None) -> None:
        if attributes:
            named = dict(attributes)
            if (name := named.pop("name", None)) is not None:
                self._span.update_name(str(name))
            self._span.set_attributes(named)
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(at)


class OtelTracer:
    """An implementation of `spans.Tracer`.

    Its own provider keeps other libraries' traces in this process separate.
    """

    def __init__(self, exporters: Sequence[SpanExporter], processors: Sequence[SpanProcessor] = ()) -> None:
        """Send spans to each exporter, each from its own thread. `processors` are for tests."""
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        for processor in (*map(BatchSpanProcessor, exporters), *processors):
            self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("smolora", __version__)

    def request(self, headers: Mapping[str, str]) -> OtelSpan | None:
        return self._begun("request", SpanKind.SERVER, extract(headers))

    def work(self, name: str, attributes: Attributes, because_of: str | None = None) -> OtelSpan | None:
        led = trace.get_current_span(extract({"traceparent": because_of or ""})).get_span_context()
        links = [Link(led)] if led.is_valid else []
        return self._begun(name, SpanKind.CONSUMER, Context(), attributes, links)

    def close(self) -> None:
        ending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        ending.start()  # on a thread, since it waits for a collector that doesn't answer
        ending.join(_CLOSE_SECONDS)

    def _begun(
        self,
        name: str,
        kind: SpanKind,
        context: Context,
        attributes: Attributes | None = None,
        links: Sequence[Link] = (),
    ) -> OtelSpan | None:
        span = self._tracer.start_span(name, context, kind, attributes, links)
        return OtelSpan(span, self._tracer) if span.is_recording() else None


def _resource() -> Resource:
    """Return a resource with this service's attributes.

    OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override them.
    """
    given = Resource.create()
    own = {SERVICE_VERSION: __version__}
    if str(given.attributes[SERVICE_NAME]).startswith("unknown_service"):
        return given.merge(Resource({**own, SERVICE_NAME: "smolora"}))
    return Resource(own).merge(given)
