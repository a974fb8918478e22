"""A request's outputs on their way to whoever reads them, on one event loop."""

import asyncio
from collections.abc import Callable

from adapters.errors import SmoloraError
from server.engine.request import SequenceOutput


class OutputStream:
    """The outputs of one request, until all its choices have ended. `aclose` aborts what is left."""

    def __init__(self, num_choices: int, abandon: Callable[[], None]) -> None:
        """`abandon` tells whoever `put`s that nobody reads any more; it may be called after the end, and twice."""
        self._num_unfinished = num_choices  # choices whose end the reader has not seen
        self._abandon = abandon
        self._queue: asyncio.Queue[SequenceOutput | SmoloraError] = asyncio.Queue()

    def __aiter__(self) -> "OutputStream":
        return self

    async def __anext__(self) -> SequenceOutput:
        if not self._num_unfinished:
            raise StopAsyncIteration
        output = await self._queue.get()
        if isinstance(output, SmoloraError):
            self._num_unfinished = 0
            raise output
        if output.finish_reason is not None:
            self._num_unfinished -= 1
        return output

    async def aclose(self) -> None:
        """Free what the request holds at the engine's next step. Closing twice is closing once."""
        self._num_unfinished = 0
        self._abandon()

    def put(self, output: SequenceOutput | SmoloraError) -> None:
        """Hand on news of a choice, or what ends all of them."""
        self._queue.put_nowait(output)
