"""Which form an error takes on the wire: OpenAI's error object under /v1, an RFC 9457 problem everywhere else."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from adapters.errors import InvalidInput, SmoloraError
from server.api import near_names, problems
from server.api.openai import errors as openai_errors
from server.api.routes import Routes
from server.errors import Unauthorized


class Form(Protocol):
    """A module that turns faults into responses."""

    def of_error(self, error: SmoloraError) -> Response: ...
    def problem(self, status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> Response: ...
    def internal(self) -> Response: ...
    def event(self, error: Exception) -> bytes: ...


def form_of(path: str) -> Form:
    """The form of errors on this path of a request."""
    return openai_errors if path == "/v1" or path.startswith("/v1/") else problems


def _body_of(request: Request) -> type[BaseModel] | None:
    """The model of the route's JSON body, if it has one."""
    route = request.scope.get("route")
    field = route.body_field if isinstance(route, APIRoute) else None
    annotation = None if field is None else field.field_info.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def install(app: FastAPI, routes: Routes) -> None:
    """Make every exception that a route raises a response in its path's form."""

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, SmoloraError)
        return form_of(request.url.path).of_error(error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return form_of(request.url.path).of_error(problems.invalid(error.errors(), _body_of(request)))

    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        form = form_of(request.url.path)
        if isinstance(error.__cause__, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it; the log does
        if error.status_code == 400:  # a body that couldn't be read at all
            return form.of_error(InvalidInput.of("body", "could not be read"))
        if error.status_code == 401:  # its key ended while it came in
            return form.of_error(Unauthorized(error.detail))
        detail, headers = error.detail, dict(error.headers or {})
        if error.status_code == 404 and detail == HTTPStatus.NOT_FOUND.phrase:  # the framework's own
            detail = near_names.unknown_path(request.url.path, routes.static_paths)
        elif error.status_code == 405:
            # the framework knows those of one route alone, where several have the path
            headers["Allow"] = ", ".join(sorted(routes.methods(request.url.path))) or headers.get("Allow", "GET")
            detail = f"{request.method} is not possible here: use {headers['Allow'].replace(', ', ' or ')}"
        return form.problem(error.status_code, detail, headers=headers)

    app.add_exception_handler(SmoloraError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, framework)
