"""How an answer leaves: at once or as events, and what becomes of it where the client goes or the engine fails."""

from collections.abc import AsyncIterator, Coroutine, Iterator

from starlette.requests import Request
from starlette.responses import Response

from server.api import wire
from server.api.openai import errors
from server.api.openai.batch import Batch
from server.api.openai.documents import WARNING
from server.api.streams import ClientGoneError, EventStream, while_connected

DONE = b"data: [DONE]\n\n"
_MAX_WARNINGS, _MAX_WARNING = 8, 400  # headers, and characters of one


async def at_once(request: Request, batch: Batch, answer: Coroutine[None, None, dict[str, object]]) -> Response:
    """The answer as one document. A client that goes away ends what runs."""
    try:
        response = wire.answer(await while_connected(request.scope, request.receive, answer))
        for name, value in _warnings(batch):
            response.headers.append(name, value)
        return response
    except ClientGoneError:
        return Response(status_code=499)  # nobody reads it; the log does
    finally:
        await batch.close()


def streamed(batch: Batch, events: AsyncIterator[bytes]) -> Response:
    """The events, then `[DONE]`. What fails before the first is an error response; later, the last event."""
    return EventStream(_ended(events), batch.close, _warnings(batch))


def _warnings(batch: Batch) -> Iterator[tuple[str, str]]:
    """As headers, which are ASCII (names of bases may not be) and not too long for anybody's buffer."""
    texts = batch.warnings[:_MAX_WARNINGS]
    if len(batch.warnings) > len(texts):
        texts = (*texts[:-1], f"and {len(batch.warnings) - len(texts) + 1} more: see GET /adapters")
    for text in texts:
        yield WARNING, text.encode("ascii", "backslashreplace").decode()[:_MAX_WARNING].rstrip()  # none ends so


async def _ended(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    is_begun = False
    try:
        async for event in events:
            yield event
            is_begun = True
    except Exception as error:
        if not is_begun:
            raise
        yield errors.event(error)
    else:
        yield DONE
