"""What /docs says of answers under /v1: an example of each, and the errors."""

from pydantic import BaseModel

from server.api.openapi import Responses

WARNING = "X-Smolora-Warning"
"""A header for each warning about an adapter: OpenAI's answers have no field for it."""


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """OpenAI's error object."""

    error: ErrorBody


REFUSALS: Responses = {
    "4XX": {
        "model": ErrorAnswer,
        "description": "400: a bad field, `param` is its name. 401: no valid key. 404: an unknown model. "
        "413: too large. 429: the queue is full; see `Retry-After`",
    },
    503: {
        "model": ErrorAnswer,
        "description": "Not ready, draining, the engine is dead or the disk is full; see `Retry-After`",
    },
}


def answers_with(example: object) -> dict[str, object]:
    """The 200 of a route; with `stream`, the same in chunks."""
    return {
        "description": "The answer; with `stream`, its chunks as server-sent events",
        "content": {"application/json": {"example": example}},
        "headers": {
            WARNING: {
                "schema": {"type": "string"},
                "description": "of an adapter, such as one made on another base",
            }
        },
    }
