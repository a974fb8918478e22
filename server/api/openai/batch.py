"""The generations of one call to /v1, one for each prompt, and their answer as one document or as events."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response

from adapters.expression import Term, render
from server.api import wire
from server.api.generate import DONE
from server.api.generation import Generation, close_all
from server.api.openai.logprobs import TextLogprobs
from server.api.openai.schemas import WARNING
from server.api.streams import ClientGoneError, EventStream, while_connected
from server.engine.request import FinishReason, SampledLogprob, SequenceOutput

_MAX_WARNINGS, _MAX_WARNING = 8, 400  # headers, and characters in each


@dataclass(frozen=True)
class Piece:
    """New text of a choice, with the log-probabilities of the tokens that begin in this text.

    Only the last piece of a choice has a `finish_reason`. Only the first can have `prompt_logprobs`, which are
    those of the prompt's tokens after the first one.
    """

    index: int
    text: str
    logprobs: Sequence[SampledLogprob]
    finish_reason: FinishReason | None
    prompt_logprobs: Sequence[SampledLogprob] = ()


@dataclass
class Choice:
    """A complete choice, joined from its pieces."""

    index: int
    text: str = ""
    logprobs: list[SampledLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_logprobs: Sequence[SampledLogprob] = ()


class Batch:
    """The generations of a call. Choices are numbered across prompts: the first prompt's, then the second's.

    Either iterate over `pieces` once, or await `collect` once. `close` aborts the generations that still run.
    """

    def __init__(
        self,
        generations: Sequence[Generation],
        base_name: str,
        echoed: Sequence[str] = (),
        warnings: Sequence[str] = (),
    ) -> None:
        """If there are `echoed` texts, one for each prompt, choices begin with them.

        `warnings` are about the request; those about its adapters follow them.
        """
        self._generations = generations
        self._echoed = echoed
        self._n = generations[0].request.n
        self._num_tokens = [0] * self.num_choices
        self._num_cached = [0] * self.num_choices
        parts = generations[0].parts
        self.model = render(Term(part.name, part.version, weight=part.weight) for part in parts)
        if not parts:
            self.model = base_name
        self.warnings = (*warnings, *generations[0].warnings)
        self.created = int(time.time())

    @property
    def id(self) -> str:
        """A unique id, without a prefix."""
        return self._generations[0].id.removeprefix("gen-")

    def first_token_id(self, index: int) -> int:
        """Return the first token of a choice's prompt."""
        return self._generations[index // self._n].request.prompt_token_ids[0]

    @property
    def num_choices(self) -> int:
        return len(self._generations) * self._n

    @property
    def usage(self) -> dict[str, object]:
        """The usage so far, in OpenAI's form."""
        num_prompt = sum(generation.num_prompt_tokens for generation in self._generations)
        num_tokens = sum(self._num_tokens)
        # choices share their prompt: the first choice computes it, and the others find it in the cache
        starts = range(0, self.num_choices, self._n)
        num_cached = sum(min(self._num_cached[start : start + self._n]) for start in starts)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt + num_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the pieces of every choice until all choices have ended. If a choice fails, raise its error."""
        logprobs = [TextLogprobs(keeps_all=bool(self._echoed)) for _ in range(self.num_choices)]
        begun: set[int] = set()
        async for number, output in _merged([generation.outputs() for generation in self._generations]):
            index = number * self._n + output.index
            self._num_tokens[index] = output.num_output_tokens
            self._num_cached[index] = output.num_cached_tokens
            text = output.text
            if index not in begun:
                begun.add(index)
                text = self._echoed[number] + text if self._echoed else text
            of_prompt = output.logprobs[: len(output.scores)]
            yield Piece(index, text, logprobs[index].push(output), output.finish_reason, of_prompt)

    async def collect(self) -> list[Choice]:
        """Wait until all choices have ended, and return them. Raise the same errors as `pieces`."""
        texts: list[list[str]] = [[] for _ in range(self.num_choices)]
        choices = [Choice(index) for index in range(self.num_choices)]
        async for piece in self.pieces():
            texts[piece.index].append(piece.text)
            choices[piece.index].logprobs += piece.logprobs
            choices[piece.index].prompt_logprobs = choices[piece.index].prompt_logprobs or piece.prompt_logprobs
            choices[piece.index].finish_reason = piece.finish_reason
        for choice, pieces in zip(choices, texts, strict=True):
            choice.text = "".join(pieces)
        return choices

    async def close(self) -> None:
        """Abort the generations that still run, and release the adapters. Idempotent."""
        await close_all(self._generations)


async def _merged(streams: Sequence[AsyncIterator[SequenceOutput]]) -> AsyncIterator[tuple[int, SequenceOutput]]:
    """Yield (index of the stream, output) as the outputs arrive. If a stream fails, raise its error at once."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    # the queue is short, so that unread outputs wait in the streams, which limit their number
    news: asyncio.Queue[tuple[int, SequenceOutput | BaseException | None]] = asyncio.Queue(len(streams))

    async def feed(number: int) -> None:
        try:
            async for output in streams[number]:
                await news.put((number, output))
        except Exception as error:
            await news.put((number, error))
        else:
            await news.put((number, None))

    tasks = [asyncio.create_task(feed(number)) for number in range(len(streams))]
    try:
        num_left = len(tasks)
        while num_left:
            number, item = await news.get()
            if item is None:
                num_left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def at_once(request: Request, batch: Batch, answer: Coroutine[None, None, dict[str, object]]) -> Response:
    """Send the answer as one document. Abort the generations if the client leaves."""
    try:
        response = wire.answer(await while_connected(request.scope, request.receive, answer))
        for name, value in warning_headers(batch.warnings):
            response.headers.append(name, value)
        return response
    except ClientGoneError:
        return Response(status_code=499)  # the client has left, so only the log shows this status
    finally:
        await batch.close()


def streamed(batch: Batch, events: AsyncIterator[bytes]) -> Response:
    """Return a response that sends the events, then `[DONE]`.

    A failure before the first event becomes an ordinary error response. A later failure becomes the last event.
    """
    return EventStream(_with_done(events), batch.close, warning_headers(batch.warnings))


def warning_headers(warnings: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the warnings as headers: in ASCII, and short enough for proxies."""
    texts = warnings[:_MAX_WARNINGS]
    if len(warnings) > len(texts):
        texts = (*texts[:-1], f"and {len(warnings) - len(texts) + 1} more: see GET /adapters")
    for text in texts:
        yield WARNING, text.encode("ascii", "backslashreplace").decode()[:_MAX_WARNING].rstrip()


async def _with_done(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for event in events:
        yield event
    yield DONE
