"""Errors under /v1: every fault becomes one OpenAI error object, `{"error": {message, type, param, code}}`.

The same functions as `server.api.problems` has for all other paths; `server.api.faults` chooses.
A bad field is 400, which the official client knows as BadRequestError, where the native routes say 422.
"""

import http
import logging
from collections.abc import Mapping, Sequence

from starlette.responses import Response

from adapters.errors import Conflict, FieldError, InDoubt, InvalidInput, NotFound, SmoloraError
from server.api import problems, wire
from server.errors import PayloadTooLarge, TryAgain, Unauthorized, Unavailable
from server.telemetry.logs import place_of

log = logging.getLogger("smolora.api")

_CODES: tuple[tuple[type[SmoloraError], str], ...] = (
    (Unauthorized, "invalid_api_key"),
    (NotFound, "not_found"),
    (Conflict, "conflict"),
    (PayloadTooLarge, "payload_too_large"),
    (Unavailable, "service_unavailable"),
    (TryAgain, "rate_limit_exceeded"),
)

_RENAMED: dict[tuple[str | int, ...], tuple[str | int, ...]] = {("adapter",): ("model",)}
"""What the engine refuses, by OpenAI's names."""


class ModelNotFound(NotFound):
    """`model` names no adapter, version or alias that is stored."""


class ContextTooLong(InvalidInput):
    """The prompt, or it and the answer's bound together, exceed what the model takes."""


def of_error(error: SmoloraError) -> Response:
    """The response that an error of the tree becomes, with the headers its status calls for."""
    status, told = _told(error)
    headers = problems.headers_of(error)
    if isinstance(error, Conflict | InDoubt):
        # the client would try it again by itself: a conflict stays one, and a job that was queued would be two
        headers["x-should-retry"] = "false"
    return _response(status, told, headers)


def problem(status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> Response:
    """The response of a fault that is no error of the tree: no such path, a wrong method."""
    code = "not_found" if status == 404 else None
    return _response(status, _error(status, detail, code=code), headers)


def internal() -> Response:
    """What a client is told of a fault that nobody foresaw."""
    return problem(500, problems.INTERNAL)


def event(error: Exception) -> bytes:
    """The error as the last event of a stream that has begun: the client raises it as an APIError."""
    if not isinstance(error, SmoloraError):
        log.error("%s at %s", type(error).__name__, place_of(error))
        return wire.event({"error": _error(500, problems.INTERNAL)})
    return wire.event({"error": _told(error)[1]})


def _told(error: SmoloraError) -> tuple[int, dict[str, object]]:
    status = problems.status_of(error)
    if status == 500:
        log.error("%s: %s", type(error).__name__, error)
    if isinstance(error, InvalidInput):
        code = "context_length_exceeded" if isinstance(error, ContextTooLong) else None
        faults = [FieldError(_RENAMED.get(fault.loc, fault.loc), fault.message) for fault in error.errors]
        return 400, _error(400, problems.summary(faults, error.num_more), _param(faults), code)
    if isinstance(error, ModelNotFound):
        return status, _error(status, str(error), param="model", code="model_not_found")
    code = next((code for kind, code in _CODES if isinstance(error, kind)), None)
    return status, _error(status, str(error), code=code)


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, object]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status == http.HTTPStatus.TOO_MANY_REQUESTS:
        kind = "rate_limit_error"
    elif status == http.HTTPStatus.UNAUTHORIZED:  # LiteLLM takes any invalid_request_error for a 400
        kind = "authentication_error"
    elif status == http.HTTPStatus.FORBIDDEN:
        kind = "permission_error"
    return {"message": message, "type": kind, "param": param, "code": code}


def _param(errors: Sequence[FieldError]) -> str:
    """The first field at fault, as in `messages[0].role`."""
    parts = errors[0].loc
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return path.removeprefix(".")


def _response(status: int, error: dict[str, object], headers: Mapping[str, str] | None = None) -> Response:
    return wire.answer({"error": error}, status, headers)
