"""Facts about a request for its log line and its spans, without any text of prompts or answers.

`Edge` makes a `RequestFacts` for each request and stores it in the context variable `facts`. Spans follow
OpenTelemetry's conventions for HTTP and `gen_ai`:

    POST /v1/chat/completions          the request, from its first byte to the last of its answer
      chat tweets@3                    a generation: one for each prompt or expression
        queue                          until it is in the batch
          load adapters                until its adapters are in memory
        prefill                        until its first token
        decode                         until its last token

Choices of a generation share its spans: a span begins with the first choice and ends with the last. Spans are made
when the generation ends, so they cost nothing before.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.types import Scope

from adapters.catalog.versions import Part
from adapters.expression import Term, render
from server.access.principal import Principal
from server.engine.request import GenerationRequest, SequenceOutput, Timing
from server.metrics.metrics import METHODS
from server.telemetry.spans import Span, Value

_MAX_LISTED = 16
"""The most adapters or generations that one log line lists. It is also the most expressions of /compare."""


@dataclass
class RequestFacts:
    """Facts about one request. Counts are sums over its generations."""

    span: Span | None = None  # None if the request isn't traced
    operation: str = "text_completion"  # a `gen_ai` operation
    job_id: str | None = None  # the job that the request submitted
    generations: list[str] = field(default_factory=list)  # their ids
    adapters: dict[str, None] = field(default_factory=dict)  # name@version, in order
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that were cached
    refused: str | None = None  # the reason, as in `server.errors.REASONS`

    def generated(
        self, generation_id: str, adapters: Iterable[str], num_prompt: int, num_completion: int, num_cached: int
    ) -> None:
        """Add a generation that has ended or was aborted."""
        self.generations.append(generation_id)
        self.adapters.update(dict.fromkeys(adapters))
        self.prompt_tokens += num_prompt
        self.completion_tokens += num_completion
        self.cached_tokens += num_cached

    def fields(self) -> Iterator[tuple[str, str | int]]:
        """Yield the log line's fields. Facts that don't apply are left out."""
        if self.span is not None:
            yield "trace", self.span.trace_id
        if self.job_id is not None:
            yield "job", self.job_id
        if self.refused is not None:
            yield "refused", self.refused
        if self.generations:
            yield "generation", _listed(self.generations)
            yield "adapters", _listed(self.adapters) or "base"
            yield "prompt_tokens", self.prompt_tokens
            yield "completion_tokens", self.completion_tokens
            yield "cached_tokens", self.cached_tokens


facts: ContextVar[RequestFacts | None] = ContextVar("facts", default=None)
"""The facts of the current request, or None outside of requests."""


def record_refusal(reason: str | None) -> None:
    """Record why the current request is refused, if the reason is counted."""
    if (request := facts.get()) is not None and reason is not None:
        request.refused = reason


def is_chat() -> None:
    """Mark the current request as a chat."""
    if (request := facts.get()) is not None:
        request.operation = "chat"


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = [f"+{len(every) - _MAX_LISTED}"] if len(every) > _MAX_LISTED else []
    return ",".join([*every[:_MAX_LISTED], *more])


_PROVIDER = "smolora"
_MAX_METHOD = 32  # characters of an unknown method


def end_request(
    span: Span,
    scope: Scope,
    route: str,
    status: int,
    request_id: str,
    principal: Principal | None,
    found: RequestFacts,
) -> None:
    """End a request's span.

    `status` is 0 if the client left before the response. `route` is empty if the path has no route.
    """
    method, is_known = scope["method"], scope["method"] in METHODS
    called = method if is_known else "HTTP"
    attributes: dict[str, Value] = {
        "name": f"{called} {route}" if route else called,
        "http.request.method": method if is_known else "_OTHER",
        "url.scheme": scope["scheme"],
        "url.path": scope["path"][:200],
        "smolora.request.id": request_id,
    }
    if not is_known:
        attributes["http.request.method_original"] = method[:_MAX_METHOD]
    if route:
        attributes["http.route"] = route
    if status:
        attributes["http.response.status_code"] = status
    if scope.get("client"):
        attributes["client.address"] = scope["client"][0]
    if principal is not None:
        attributes |= {"smolora.key.id": principal.key_id, "smolora.project": principal.project}
    if found.job_id is not None:
        attributes["smolora.job.id"] = found.job_id
    span.end(attributes=attributes, error=str(status) if status >= 500 else None)


class GenerationTrace:
    """The timings of a generation, from which `end` makes its spans. Call `note` for each output."""

    def __init__(
        self, span: Span, operation: str, request: GenerationRequest, base: str, parts: Sequence[Part]
    ) -> None:
        self._above = span
        self._operation = operation
        self._request = request
        self._base = base
        self._parts = parts
        self._started = time.time_ns()
        self._timings: list[Timing] = []
        self._reasons: list[str] = []
        self._first_token: int | None = None

    def note(self, output: SequenceOutput) -> None:
        """Record when an output of the engine arrives, and how a choice ended."""
        if output.num_new_tokens and self._first_token is None:
            self._first_token = time.time_ns()
        if output.finish_reason is not None:
            self._reasons.append("error" if output.finish_reason == "abort" else output.finish_reason)
            if output.timing is not None:
                self._timings.append(output.timing)

    def end(self, outcome: str, num_tokens: int, num_cached: int) -> None:
        """Make the spans of the generation, which ended or was aborted after `num_tokens` tokens."""
        now = time.time_ns()
        terms = [Term(part.name, part.version, weight=part.weight) for part in self._parts]
        model = render(terms) if terms else self._base
        span = self._above.child(f"{self._operation} {model}", self._started, self._asked(model))
        for name, (start, stop), attributes in self._phases(now, num_tokens, num_cached):
            if name == "queue" and (load := self._load()) is not None:
                queue = span.child(name, start, attributes)
                queue.child("load adapters", load[0], {"smolora.adapters.count": len(self._parts)}).end(load[1])
                queue.end(stop)
            else:
                span.child(name, start, attributes).end(stop)
        used: dict[str, Value] = {
            "gen_ai.usage.input_tokens": len(self._request.prompt_token_ids),
            "gen_ai.usage.output_tokens": num_tokens,
            "gen_ai.usage.cache_read.input_tokens": num_cached,
            "gen_ai.response.finish_reasons": self._reasons,
            "smolora.outcome": outcome,
        }
        span.end(now, used, "generation_failed" if outcome == "failed" else None)

    def _asked(self, model: str) -> dict[str, Value]:
        request, sampling = self._request, self._request.sampling
        found: dict[str, Value] = {
            "gen_ai.operation.name": self._operation,
            "gen_ai.provider.name": _PROVIDER,
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.response.id": request.request_id,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.seed": sampling.seed,
            "smolora.base": self._base,
        }
        unless: Mapping[str, tuple[int | float, int | float]] = {  # (value, default); defaults are left out
            "gen_ai.request.choice.count": (request.n, 1),
            "gen_ai.request.top_k": (sampling.top_k, 0),
            "gen_ai.request.frequency_penalty": (sampling.frequency_penalty, 0),
            "gen_ai.request.presence_penalty": (sampling.presence_penalty, 0),
        }
        found |= {name: value for name, (value, nothing) in unless.items() if value != nothing}
        if request.grammar is not None and request.grammar.kind == "json_schema":
            found["gen_ai.output.type"] = "json"
        return found

    def _at(self, seconds: float) -> int:
        return self._started + int(seconds * 1e9)

    def _load(self) -> tuple[int, int] | None:
        found = [timing.load for timing in self._timings if timing.load is not None]
        return (self._at(min(a for a, _ in found)), self._at(max(b for _, b in found))) if found else None

    def _phases(
        self, now: int, num_tokens: int, num_cached: int
    ) -> "list[tuple[str, tuple[int, int], Mapping[str, Value]]]":
        """Return (name, (start, end), attributes) for each of the phases queue, prefill and decode that has begun.

        The times are the engine's if a choice has ended, else those at which this process received outputs.
        """
        reading: Mapping[str, Value] = {"smolora.tokens": len(self._request.prompt_token_ids) - num_cached}
        writing: Mapping[str, Value] = {"smolora.tokens": num_tokens}
        if self._timings:
            admitted = self._at(min(timing.queue for timing in self._timings))
            first = self._at(min(timing.first_token for timing in self._timings))
            last = self._at(max(timing.total for timing in self._timings))
            phases = [("queue", (self._started, admitted), {}), ("prefill", (admitted, first), reading)]
            return [*phases, ("decode", (first, last), writing)] if last > first else phases
        if (seen := self._first_token) is not None:
            return [("prefill", (self._started, seen), reading), ("decode", (seen, now), writing)]
        return [("queue", (self._started, now), {})]
