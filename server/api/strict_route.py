"""Routes whose JSON is read strictly.

Python's parser takes what JSON does not have or what text can't be: lone surrogates, bytes that are no UTF-8, any
depth. Here those are malformed bodies. NaN and infinities are parsed, for the schemas to refuse by field.
"""

import json
from collections.abc import Callable, Coroutine

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response


class StrictRequest(Request):
    """A request whose `json` is pydantic's."""

    async def json(self) -> object:
        body = await self.body()
        try:
            parsed: object = from_json(body, allow_inf_nan=True)
        except ValueError as error:  # which says what, at which line and column, and nothing of the text
            raise json.JSONDecodeError(str(error), "", 0) from None
        return parsed


class StrictRoute(APIRoute):
    """Hands its endpoint a StrictRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[None, None, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict
