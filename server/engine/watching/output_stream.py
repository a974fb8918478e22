"""A request's outputs on their way to whoever reads them, on one event loop."""

import asyncio
from collections.abc import Callable

from adapters.errors import SmoloraError
from server.engine.request import SequenceOutput
from server.errors import ReadTooSlowly

MAX_UNREAD = 1 << 18
"""Tokens that may wait for a reader, and the likeliest ones beside them: some 30 MB."""


class OutputStream:
    """The outputs of one request, until all its choices have ended. `aclose` aborts what is left."""

    def __init__(self, num_choices: int, abandon: Callable[[], None]) -> None:
        """`abandon` tells whoever `put`s that nobody reads any more; it may be called after the end, and twice."""
        self._num_unfinished = num_choices  # choices whose end the reader has not seen
        self._abandon = abandon
        self._queue: asyncio.Queue[SequenceOutput | SmoloraError] = asyncio.Queue()
        self._num_unread = 0
        self._is_over = False  # nothing more is taken

    def __aiter__(self) -> "OutputStream":
        return self

    async def __anext__(self) -> SequenceOutput:
        if not self._num_unfinished:
            raise StopAsyncIteration
        output = await self._queue.get()
        if isinstance(output, SmoloraError):
            self._num_unfinished = 0
            raise output
        self._num_unread -= _size(output)
        if output.finish_reason is not None:
            self._num_unfinished -= 1
        return output

    async def aclose(self) -> None:
        """Free what the request holds at the engine's next step. Closing twice is closing once."""
        self._num_unfinished = 0
        self._abandon()

    def put(self, output: SequenceOutput | SmoloraError) -> None:
        """Hand on news of a choice, or what ends all of them, and with them what the request holds.

        So does a reader who is too far behind.
        """
        if self._is_over:
            return
        if not isinstance(output, SmoloraError):
            self._num_unread += _size(output)
            if self._num_unread > MAX_UNREAD:
                output = ReadTooSlowly()
                while not self._queue.empty():  # who reads little at a time would keep it for as long
                    self._queue.get_nowait()
        self._queue.put_nowait(output)
        if isinstance(output, SmoloraError):
            self._is_over = True
            asyncio.get_running_loop().call_soon(self._abandon)  # whoever puts is at work on the request just now


def _size(output: SequenceOutput) -> int:
    return output.num_new_tokens + sum(len(entry.top) for entry in output.logprobs)
