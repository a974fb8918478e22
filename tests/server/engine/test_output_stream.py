"""A slow reader: the buffer is limited, and an overflow frees the request at once."""

import asyncio

import pytest

from server.engine import async_engine
from server.engine.async_engine import OutputStream
from server.engine.request import SampledLogprob, SequenceOutput, TokenLogprob
from server.errors import GenerationTimeout, ReadTooSlowly

pytestmark = pytest.mark.anyio

TOKEN = TokenLogprob(1, "a", (97,), -0.5)
ENTRY = SampledLogprob(TOKEN, (TOKEN,) * 4)


def piece(with_logprobs: bool) -> SequenceOutput:
    return SequenceOutput("gen-1", 0, "a", 1, 1, 0, logprobs=(ENTRY,) if with_logprobs else ())


@pytest.mark.parametrize(("with_logprobs", "num_kept"), [(True, 20), (False, 100)])
async def test_a_stream_buffers_a_limited_amount(
    with_logprobs: bool, num_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an overflow the stream buffers nothing."""
    monkeypatch.setattr(async_engine, "MAX_UNREAD", 100)
    abandoned: list[int] = []
    stream = OutputStream(1, lambda: abandoned.append(1))
    for _ in range(50):  # a reader that keeps up has no limit
        stream.put(piece(with_logprobs))
        await anext(stream)
    assert abandoned == []
    for _ in range(num_kept):
        stream.put(piece(with_logprobs))
    await asyncio.sleep(0)
    assert abandoned == []
    for _ in range(1000):
        stream.put(piece(with_logprobs))
    await asyncio.sleep(0)
    assert abandoned == [1]
    with pytest.raises(ReadTooSlowly):
        await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_waiting_reader_learns_of_an_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first output, which woke the reader, is dropped before the reader looks."""
    monkeypatch.setattr(async_engine, "MAX_UNREAD", 100)
    stream = OutputStream(1, lambda: None)
    reader = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    for _ in range(101):
        stream.put(piece(False))
    async with asyncio.timeout(10):
        with pytest.raises(ReadTooSlowly):
            await reader


async def test_an_error_frees_the_request_even_without_a_reader() -> None:
    abandoned: list[int] = []
    stream = OutputStream(1, lambda: abandoned.append(1))
    stream.put(piece(False))
    stream.put(GenerationTimeout())
    stream.put(piece(False))
    await asyncio.sleep(0)
    assert abandoned == [1]
    assert (await anext(stream)).text == "a"
    with pytest.raises(GenerationTimeout):
        await anext(stream)
