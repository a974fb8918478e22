"""The two formats of error responses: OpenAI's error object under /v1, and RFC 9457 problems on other routes.

This module converts the exceptions of `adapters.errors` and `server.errors`, pydantic's validation errors and the
framework's errors (404, 405) into responses. Responses repeat nothing that a client sent except the names of
fields. The details of internal errors are only logged.
"""

import http
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from string import Formatter

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from adapters.errors import Conflict, FieldError, InDoubt, InvalidInput, LimitReached, NotFound, SmoloraError
from server.api import wire
from server.api.near_names import WITHOUT_V1, unknown_field, unknown_path
from server.api.routes import Routes
from server.api.tracing import record_refusal
from server.errors import (
    Forbidden,
    GenerationTimeout,
    PayloadTooLarge,
    RateLimited,
    TryAgain,
    Unauthorized,
    Unavailable,
)
from server.telemetry.logs import place_of

MEDIA_TYPE = "application/problem+json"
MAX_ERRORS = 32
"""The maximum number of invalid fields that a response names. A body can have any number of invalid fields."""
_MAX_COMPARED = 4 * MAX_ERRORS
"""The maximum number of unknown fields for which a similar name is searched, in 0.1 ms each."""
MAX_NAME = 64
"""The maximum length of a field's name in a response: clients choose the names of unknown fields."""
_INTERNAL = "something went wrong here; the log has it under this request's id"
_STATUS: tuple[tuple[type[SmoloraError], int], ...] = (
    (InvalidInput, 422),
    (NotFound, 404),
    (Conflict, 409),
    (Unauthorized, 401),
    (Forbidden, 403),
    (LimitReached, 403),
    (PayloadTooLarge, 413),
    (GenerationTimeout, 504),
    (Unavailable, 503),
    (TryAgain, 429),
)
_OPENAI_CODES: tuple[tuple[type[SmoloraError], str], ...] = (
    (Unauthorized, "invalid_api_key"),
    (NotFound, "not_found"),
    (Conflict, "conflict"),
    (PayloadTooLarge, "payload_too_large"),
    (GenerationTimeout, "timeout"),
    (Unavailable, "service_unavailable"),
    (TryAgain, "rate_limit_exceeded"),
)
_ENGINE_FIELDS: dict[tuple[str | int, ...], tuple[str | int, ...]] = {("adapter",): ("model",)}
"""The engine's names of fields, with OpenAI's names for the same fields."""
_WORDS = {
    "missing": "is missing",
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a number, neither NaN nor infinite",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must not be empty",
    "too_long": "must have at most {max_length} items",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
}
"""Our messages, by pydantic's type of error. Other types keep pydantic's message."""

log = logging.getLogger("smolora.api")


class ModelNotFound(NotFound):
    """The error for a `model` that names an unknown adapter, version or alias."""


class ContextTooLong(InvalidInput):
    """The error if a prompt, alone or together with the answer's maximum length, exceeds the model's context."""


class InvalidFields(InvalidInput):
    """The error for a body or a query whose fields are invalid. It names them as the client sent them."""


class Form(ABC):
    """A format of errors. It converts errors into responses, or into events of a stream."""

    media_type: str
    event_name: str | None

    def of_error(self, error: SmoloraError) -> Response:
        """Return the response for an error, with the headers that its status needs."""
        status, document = self._described(error)
        record_refusal(error.reason)
        return Response(wire.encode(document), status, headers=self._headers(error), media_type=self.media_type)

    def problem(self, status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> Response:
        """Return the response for an error of the framework, such as an unknown path or a wrong method."""
        body = wire.encode(self._document(status, detail))
        return Response(body, status, headers=dict(headers or {}), media_type=self.media_type)

    def internal(self) -> Response:
        """Return the response for an unforeseen error."""
        return self.problem(500, _INTERNAL)

    def event(self, error: Exception) -> bytes:
        """Return the error as the last event of a stream."""
        return wire.event(self._described(error)[1], self.event_name)

    @abstractmethod
    def _document(self, status: int, detail: str) -> dict[str, object]:
        """Return the JSON document of an error that isn't a SmoloraError."""

    @abstractmethod
    def _of(self, status: int, error: SmoloraError) -> tuple[int, dict[str, object]]:
        """Return an error's status and JSON in this format. `status` is the error's status outside /v1."""

    def _described(self, error: Exception) -> tuple[int, dict[str, object]]:
        """Return the status and the JSON document of an error. Log the error if it is internal."""
        if not isinstance(error, SmoloraError):
            log.error("%s at %s", type(error).__name__, place_of(error))
            return 500, self._document(500, _INTERNAL)
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
        if status == 500:
            log.error("%s: %s", type(error).__name__, error)
        return self._of(status, error)

    def _headers(self, error: SmoloraError) -> dict[str, str]:
        headers: dict[str, str] = {}
        # A generation that took too long would take as long again.
        if isinstance(error, TryAgain) and not isinstance(error, GenerationTimeout):
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
        if isinstance(error, RateLimited):
            headers |= error.headers
        if isinstance(error, Unauthorized):
            headers["WWW-Authenticate"] = 'Bearer realm="smolora"'
        return headers


class _Problems(Form):
    """RFC 9457 problems: `errors[].loc` ends in the field's name."""

    media_type = MEDIA_TYPE
    event_name = "error"

    def _document(self, status: int, detail: str, errors: Sequence[FieldError] = ()) -> dict[str, object]:
        return {
            "type": "about:blank",
            "title": http.HTTPStatus(status).phrase,
            "status": status,
            "detail": detail,
            "errors": [{"loc": list(error.loc), "message": error.message} for error in errors],
        }

    def _of(self, status: int, error: SmoloraError) -> tuple[int, dict[str, object]]:
        if isinstance(error, InvalidInput):
            rest = [FieldError(error.errors[-1].loc[:1], f"and {error.num_more} more")] if error.num_more else []
            detail = _summary(error.errors, error.num_more)
            return status, self._document(status, detail, [*error.errors, *rest])
        document = self._document(status, str(error))
        if error.hint is not None:
            document["hint"] = {"code": error.hint.code, "text": error.hint.text}
        return status, document


class _OpenAI(Form):
    """OpenAI's error object, `{"error": {message, type, param, code}}`.

    An invalid field is answered with 400, which the official client raises as BadRequestError, instead of our 422.
    """

    media_type = "application/json"
    event_name = None  # for an event with the field `error`, the client raises APIError

    def _document(
        self, status: int, detail: str, param: str | None = None, code: str | None = None
    ) -> dict[str, object]:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        if status == http.HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        elif status == http.HTTPStatus.UNAUTHORIZED:  # LiteLLM treats any invalid_request_error as a 400
            kind = "authentication_error"
        elif status == http.HTTPStatus.FORBIDDEN:
            kind = "permission_error"
        code = "not_found" if code is None and status == 404 else code
        return {"error": {"message": detail, "type": kind, "param": param, "code": code}}

    def _of(self, status: int, error: SmoloraError) -> tuple[int, dict[str, object]]:
        if isinstance(error, InvalidInput):
            code = "context_length_exceeded" if isinstance(error, ContextTooLong) else None
            names = {} if isinstance(error, InvalidFields) else _ENGINE_FIELDS
            errors = [FieldError(names.get(one.loc, one.loc), one.message) for one in error.errors]
            path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in errors[0].loc)
            detail = _summary(errors, error.num_more, shown=MAX_ERRORS)  # no other field lists the errors
            return 400, self._document(400, detail, path.removeprefix("."), code)
        if isinstance(error, ModelNotFound):
            return status, self._document(status, str(error), "model", "model_not_found")
        code = next((code for kind, code in _OPENAI_CODES if isinstance(error, kind)), None)
        return status, self._document(status, str(error), code=code)

    def _headers(self, error: SmoloraError) -> dict[str, str]:
        headers = super()._headers(error)
        if isinstance(error, Conflict | InDoubt | GenerationTimeout):
            # stops the client's automatic retry: a conflict or a timeout would recur, and a job in doubt might be
            # queued twice
            headers["x-should-retry"] = "false"
        return headers


PROBLEMS: Form = _Problems()
OPENAI: Form = _OpenAI()


def form_of(path: str) -> Form:
    """Return the format of errors for a request's path. It is OpenAI's if its client sent the request."""
    return OPENAI if path == "/v1" or path.startswith("/v1/") or path in WITHOUT_V1 else PROBLEMS


def install(app: FastAPI, routes: Routes) -> None:
    """Convert every exception that a route raises into an error response, in the format for the request's path."""

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, SmoloraError)
        return form_of(request.url.path).of_error(error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return form_of(request.url.path).of_error(_invalid(error.errors(), _body_of(request)))

    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        form = form_of(request.url.path)
        if isinstance(error.__cause__, ClientDisconnect):
            return Response(status_code=499)  # the client has left, so only the log shows this status
        if isinstance(error.__cause__, SmoloraError):  # raised while the framework read the body
            return form.of_error(error.__cause__)
        if error.status_code == 400:  # the body couldn't be read at all
            return form.of_error(InvalidInput.of("body", "could not be read"))
        if error.status_code == 401:  # the key ended while the body arrived
            return form.of_error(Unauthorized(error.detail))
        detail, headers = error.detail, dict(error.headers or {})
        if error.status_code == 404 and detail == http.HTTPStatus.NOT_FOUND.phrase:  # the framework's own message
            detail = unknown_path(request.url.path, routes.static_paths)
        elif error.status_code == 405:
            # the framework knows the methods of one route only, even if several routes have the path
            headers["Allow"] = ", ".join(sorted(routes.methods(request.url.path))) or headers.get("Allow", "GET")
            detail = f"{request.method} is not possible here: use {headers['Allow'].replace(', ', ' or ')}"
        return form.problem(error.status_code, detail, headers=headers)

    app.add_exception_handler(SmoloraError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, framework)


def _body_of(request: Request) -> type[BaseModel] | None:
    """Return the model of the route's JSON body, or None if the route has no JSON body."""
    route = request.scope.get("route")
    field = route.body_field if isinstance(route, APIRoute) else None
    annotation = None if field is None else field.field_info.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _summary(errors: Sequence[FieldError], num_more: int = 0, shown: int = 3) -> str:
    """Return one line with the first `shown` errors, followed by the number of all other errors.

    `num_more` is the number of errors that aren't in `errors`.
    """
    first = "; ".join(map(str, errors[:shown]))
    more = len(errors[shown:]) + num_more
    return f"{first}; and {more} more" if more else first


def _invalid(faults: Sequence[Mapping[str, object]], body: type[BaseModel] | None = None) -> InvalidFields:
    """Convert pydantic's errors into InvalidFields, without the invalid values.

    The first `MAX_ERRORS` errors are listed, and the others are counted. Each location ends in a field's name. If
    an item of that field's list is invalid, the message says which item. `body` is the model of the request's JSON
    body. For an unknown field, a name from this model is suggested.
    """
    found: dict[FieldError, None] = {}
    num_unknown = 0
    for number, fault in enumerate(faults):
        if len(found) == MAX_ERRORS:
            return InvalidFields(list(found), len(faults) - number)
        loc = fault["loc"]
        assert isinstance(loc, tuple)
        num_unknown += fault["type"] == "extra_forbidden"
        found[_field_error(loc, fault, body if num_unknown <= _MAX_COMPARED else None)] = None
    return InvalidFields(list(found))


def _field_error(
    loc: tuple[str | int, ...], fault: Mapping[str, object], body: type[BaseModel] | None
) -> FieldError:
    if fault["type"] == "json_invalid":
        context = fault["ctx"]
        assert isinstance(context, dict)
        reason = str(context["error"])
        if "unicode code point" in reason:
            return FieldError(("body",), f"is not UTF-8 text: {reason}")
        return FieldError(("body",), f"is not JSON: {reason}")
    if loc == ("body",) and fault["type"] != "too_many_faults":
        return FieldError(("body",), "must be a JSON object, sent with Content-Type: application/json")
    message = unknown_field(loc[1:], body) if fault["type"] == "extra_forbidden" else _message(fault)
    parts = [part if isinstance(part, int) else part[:MAX_NAME] for part in loc[1:]] or list(loc)
    if isinstance(parts[-1], int) and any(isinstance(part, str) for part in parts):
        message = f"item {parts[-1]}: {message}"
        while isinstance(parts[-1], int):
            parts.pop()
    return FieldError(tuple(parts), message)


def _message(fault: Mapping[str, object]) -> str:
    """Return a message for users about one of pydantic's errors, whose own messages are for programmers."""
    kind, context = str(fault["type"]), fault.get("ctx")
    values = context if isinstance(context, Mapping) else {}
    if kind in ("string_too_short", "too_short") and (least := values.get("min_length")) != 1:
        return f"must have at least {least} {'characters' if kind == 'string_too_short' else 'items'}"
    words = _WORDS.get(kind)
    if words is None or not {name for _, name, _, _ in Formatter().parse(words) if name} <= values.keys():
        return str(fault["msg"]).removeprefix("Value error, ")
    plain = {name: f"{value:g}" if isinstance(value, float) else value for name, value in values.items()}
    return words.format_map(plain)  # a bound as a person writes it: 2, not 2.0
