"""What is wrong with a field, in our words: pydantic's are for programmers ("Input should be a valid boolean").

Errors on native routes: every fault becomes one RFC 9457 `application/problem+json` document.

The exception trees of `adapters.errors` and `server.errors`, pydantic's validation errors and the
framework's own (404, 405) meet here, and in `server.api.openai.errors` for /v1. What a client sent is never
echoed, except the names of fields; what went wrong inside is logged, not told.
"""

import http
import logging
import math
from collections.abc import Mapping, Sequence
from string import Formatter

from pydantic import BaseModel
from starlette.responses import Response

from adapters.errors import Conflict, FieldError, Hint, InvalidInput, NotFound, SmoloraError
from server.api import wire
from server.api.near_names import unknown_field
from server.errors import Forbidden, PayloadTooLarge, RateLimited, TryAgain, Unauthorized, Unavailable
from server.telemetry.logs import place_of

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
"""By pydantic's kinds of errors, of which each has these values. What isn't here keeps its words."""


def explain(fault: Mapping[str, object]) -> str:
    """The message of one of pydantic's errors."""
    kind, context = str(fault["type"]), fault.get("ctx")
    given = context if isinstance(context, Mapping) else {}
    if kind in ("string_too_short", "too_short") and (least := given.get("min_length")) != 1:
        return f"must have at least {least} {'characters' if kind == 'string_too_short' else 'items'}"
    words = _WORDS.get(kind)
    if words is None or not {name for _, name, _, _ in Formatter().parse(words) if name} <= given.keys():
        return str(fault["msg"]).removeprefix("Value error, ")
    return words.format_map({name: _plain(value) for name, value in given.items()})


def _plain(value: object) -> object:
    """A bound as a person writes it: 2, not 2.0."""
    return f"{value:g}" if isinstance(value, float) else value


MEDIA_TYPE = "application/problem+json"
MAX_ERRORS = 32
"""Fields of a JSON body that one answer names; there can be any number of bad ones."""
_MAX_COMPARED = 4 * MAX_ERRORS
"""Unknown names, of which some may come to the same: what one was meant to be takes a tenth of a millisecond."""
MAX_NAME = 64
"""Characters of a field's name that are given back: unknown ones are the client's own."""

log = logging.getLogger("smolora.api")

_STATUS: tuple[tuple[type[SmoloraError], int], ...] = (
    (InvalidInput, 422),
    (NotFound, 404),
    (Conflict, 409),
    (Unauthorized, 401),
    (Forbidden, 403),
    (PayloadTooLarge, 413),
    (Unavailable, 503),
    (TryAgain, 429),
)
INTERNAL = "something went wrong here; the log has it under this request's id"


def status_of(error: SmoloraError) -> int:
    """The HTTP status of an error of the tree; 500 where the fault is ours."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def document(
    status: int, detail: str, errors: Sequence[FieldError] = (), hint: Hint | None = None
) -> dict[str, object]:
    """Return the problem as JSON: `errors[].loc` ends in the field's name."""
    return {
        "type": "about:blank",
        "title": http.HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "errors": [{"loc": list(error.loc), "message": error.message} for error in errors],
        **({} if hint is None else {"hint": {"code": hint.code, "text": hint.text}}),
    }


def problem(
    status: int, detail: str, errors: Sequence[FieldError] = (), headers: Mapping[str, str] | None = None
) -> Response:
    """The problem as a response."""
    body = wire.encode(document(status, detail, errors))
    return Response(body, status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def of_error(error: SmoloraError) -> Response:
    """The response that an error of the tree becomes, with the headers its status calls for."""
    told = _document_of(error)
    return Response(wire.encode(told), status_of(error), headers=headers_of(error), media_type=MEDIA_TYPE)


def headers_of(error: SmoloraError) -> dict[str, str]:
    """The headers that the error's status calls for."""
    headers: dict[str, str] = {}
    if isinstance(error, TryAgain):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, RateLimited):
        headers |= error.headers
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="smolora"'
    return headers


def event(error: Exception) -> bytes:
    """The error as the last event of a stream that has begun."""
    return wire.event(_document_of(error), "error")


def _document_of(error: Exception) -> dict[str, object]:
    """What is told of the error; the log gets what isn't."""
    if not isinstance(error, SmoloraError):
        log.error("%s at %s", type(error).__name__, place_of(error))
        return document(500, INTERNAL)
    status = status_of(error)
    if status == 500:
        log.error("%s: %s", type(error).__name__, error)
    if isinstance(error, InvalidInput):
        rest = [FieldError(error.errors[-1].loc[:1], f"and {error.num_more} more")] if error.num_more else []
        return document(status, summary(error.errors, error.num_more), [*error.errors, *rest])
    return document(status, str(error), hint=error.hint)


def summary(errors: Sequence[FieldError], num_more: int = 0) -> str:
    """The first three fields at fault and what is wrong with them, in one line; `num_more` aren't in the list."""
    first = "; ".join(map(str, errors[:3]))
    more = len(errors[3:]) + num_more
    return f"{first}; and {more} more" if more else first


def internal() -> Response:
    """What a client is told of a fault that nobody foresaw."""
    return problem(500, INTERNAL)


def invalid(faults: Sequence[Mapping[str, object]], body: type[BaseModel] | None = None) -> InvalidInput:
    """pydantic's errors as ours: no inputs, no "body" in front, list indices only before a field's name.

    The first `MAX_ERRORS` are named, the others counted. `body` is the model of the request's JSON, whose fields
    unknown ones are compared with.
    """
    found: dict[FieldError, None] = {}
    num_unknown = 0
    for number, fault in enumerate(faults):
        if len(found) == MAX_ERRORS:
            return InvalidInput(list(found), len(faults) - number)
        loc = fault["loc"]
        assert isinstance(loc, tuple)
        num_unknown += fault["type"] == "extra_forbidden"
        found[_field_error(loc, fault, body if num_unknown <= _MAX_COMPARED else None)] = None
    return InvalidInput(list(found))


def _field_error(
    loc: tuple[str | int, ...], fault: Mapping[str, object], body: type[BaseModel] | None
) -> FieldError:
    message = explain(fault)
    if fault["type"] == "json_invalid":
        context = fault["ctx"]
        assert isinstance(context, dict)
        reason = str(context["error"])
        if "unicode code point" in reason:
            return FieldError(("body",), f"is not UTF-8 text: {reason}")
        return FieldError(("body",), f"is not JSON: {reason}")
    if loc == ("body",) and fault["type"] != "too_many_faults":
        return FieldError(("body",), "must be a JSON object, sent with Content-Type: application/json")
    if fault["type"] == "extra_forbidden":
        message = unknown_field(loc[1:], body)
    parts = [part if isinstance(part, int) else part[:MAX_NAME] for part in loc[1:]] or list(loc)
    if isinstance(parts[-1], int) and any(isinstance(part, str) for part in parts):
        message = f"item {parts[-1]}: {message}"
        while isinstance(parts[-1], int):
            parts.pop()
    return FieldError(tuple(parts), message)
