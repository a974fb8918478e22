"""Doubles for tests of the API: an engine without a model, and a client that can disconnect."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from starlette.types import Message

from adapters.errors import SmoloraError
from server.engine.request import (
    EngineStats,
    FinishReason,
    GenerationRequest,
    SampledLogprob,
    SequenceOutput,
    Timing,
    TokenLogprob,
)
from server.errors import Draining, EngineDead, NotReady

Script = Callable[[GenerationRequest], Iterable[SequenceOutput]]


def piece(request: GenerationRequest, index: int, number: int, last: FinishReason | None = None) -> SequenceOutput:
    """Return the output of one token: "w0 ", "w1 ", … with logprobs if requested."""
    text = f"w{number} "
    logprobs: tuple[SampledLogprob, ...] = ()
    if request.sampling.logprobs:
        token = TokenLogprob(100 + number, text, tuple(text.encode()), -0.25)
        others = [token._replace(logprob=-0.25 - rank) for rank in range(request.sampling.logprobs)]
        logprobs = (SampledLogprob(token, tuple(others)),)
    return SequenceOutput(
        request_id=request.request_id,
        index=index,
        text=text,
        num_new_tokens=1,
        num_output_tokens=number + 1,
        num_cached_tokens=0 if index == 0 else 1,
        logprobs=logprobs,
        finish_reason=last,
        timing=Timing(0.001 * (index + 1), 0.002, 0.1 * (index + 1)) if last else None,
    )


def words(request: GenerationRequest) -> Iterable[SequenceOutput]:
    """Yield `max_tokens` tokens of every choice, the choices in turn."""
    count = request.sampling.max_tokens
    for number in range(count):
        for index in range(request.n):
            yield piece(request, index, number, "length" if number == count - 1 else None)


def scoring(request: GenerationRequest) -> Iterable[SequenceOutput]:
    """Yield words. If scores are requested, the first output has -0.5 for the first token, -1 for the second and
    so on."""
    if request.continuations:
        totals = tuple(-0.25 * len(one) * (len(one) + 1) for one in request.continuations)
        num = sum(map(len, request.continuations))
        yield SequenceOutput(request.request_id, 0, "", num, num, 16, (), totals, "length")
        return
    if request.scored_from is None:
        yield from words(request)
        return
    num_tokens = len(request.prompt_token_ids) - request.scored_from
    scores = tuple(-0.5 * (number + 1) for number in range(num_tokens))
    logprobs: tuple[SampledLogprob, ...] = ()
    if request.sampling.logprobs:
        tokens = [TokenLogprob(0, f"t{number}", (116,), score) for number, score in enumerate(scores)]
        logprobs = tuple(SampledLogprob(token, (token,)) for token in tokens)
    if not request.sampling.max_tokens:
        yield SequenceOutput(request.request_id, 0, "", 0, 0, 0, logprobs, scores, "length")
    for number, output in enumerate(words(request)):
        yield output if number else replace(output, logprobs=logprobs + output.logprobs, scores=scores)


def failing(after: int, error: SmoloraError) -> Script:
    """Return a script of some tokens, followed by a failure of the engine."""

    def script(request: GenerationRequest) -> Iterable[SequenceOutput]:
        for number in range(after):
            yield piece(request, 0, number)
        yield SequenceOutput(request.request_id, 0, "", 0, after, 0, finish_reason="abort", error=error)

    return script


class FakeStream:
    def __init__(self, engine: "FakeEngine", request: GenerationRequest) -> None:
        self._engine = engine
        self._id = request.request_id
        self._end: asyncio.Future[SmoloraError] = asyncio.get_running_loop().create_future()
        self._outputs = self._run(request)

    async def _run(self, request: GenerationRequest) -> AsyncGenerator[SequenceOutput, None]:
        for number, output in enumerate(self._engine.script(request)):
            if self._engine.hold_after is not None and number >= self._engine.hold_after:
                held = asyncio.ensure_future(self._engine.held.wait())
                either: list[asyncio.Future[Any]] = [held, self._end]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                held.cancel()
            if self._end.done():
                raise self._end.result()
            if self._engine.dead:
                raise EngineDead
            if self._engine.stopped:
                raise Draining
            yield output

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> SequenceOutput:
        return await anext(self._outputs)

    def put(self, output: SequenceOutput | SmoloraError) -> None:
        assert isinstance(output, SmoloraError), "outputs are the script's"
        self._end.set_result(output)

    async def aclose(self) -> None:
        self._engine.closed.append(self._id)
        self._engine.open.discard(self._id)
        await self._outputs.aclose()


class FakeEngine:
    """An engine that answers with `script`; after `hold_after` outputs of a request it waits for `held`."""

    def __init__(self) -> None:
        self.script: Script = words
        self.hold_after: int | None = None
        self.held = asyncio.Event()
        self.refusal: SmoloraError | None = None
        self.requests: list[GenerationRequest] = []
        self.open: set[str] = set()
        self.closed: list[str] = []
        self.resident: frozenset[str] = frozenset()
        self.max_in_flight: int | None = None
        self.max_num_tokens: int | None = None
        self.num_looks = 0  # number of readiness checks
        self.started = self.stopped = self.draining = self.loading = self.dead = self.hung = False

    def start(self) -> None:
        self.started = True

    async def stop(self) -> None:
        self.stopped = True
        self.held.set()

    def die(self) -> None:
        """Die, as an engine does after a fatal error."""
        self.dead = True
        self.held.set()

    def check_queue(self, num_sequences: int, project: str = "") -> None:
        if self.dead:
            raise EngineDead
        if self.draining:
            raise Draining
        if self.loading:
            raise NotReady(retry_after=2.5)
        if self.refusal is not None:
            raise self.refusal

    def submit(self, request: GenerationRequest) -> FakeStream:
        self.check_queue(request.n, request.project)
        self.requests.append(request)
        self.open.add(request.request_id)
        return FakeStream(self, request)

    def drain(self) -> None:
        self.draining = True

    @property
    def ready(self) -> bool:
        self.num_looks += 1
        return not (self.dead or self.draining or self.loading)

    @property
    def num_in_flight(self) -> int:
        return len(self.open)

    def stats_by_replica(self, *, is_complete: bool) -> Mapping[str, EngineStats]:
        return {"": self.stats}

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.open),
            num_waiting=0,
            kv_blocks_total=64,
            kv_blocks_used=5,
            adapters_resident=len(self.resident),
            adapter_evictions=7,
            resident=self.resident,
            backends=frozenset({"fake"}),
            fallbacks=frozenset({"no CUDA graphs: a reason"}),
        )


def http_scope(
    method: str, path: str, headers: Iterable[tuple[bytes, bytes]], query: bytes = b""
) -> dict[str, object]:
    """Return the ASGI scope of a request from this machine."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode("utf-8", "surrogateescape"),
        "query_string": query,
        "root_path": "",
        "scheme": "http",
        "headers": list(headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }


class Caller:
    """One request over bare ASGI, which can be abandoned at any moment."""

    def __init__(
        self,
        app: FastAPI,
        path: str,
        body: object,
        method: str = "POST",
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        self.sent: list[Message] = []
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        scope = http_scope(method, path, [(b"content-type", b"application/json"), *headers])
        self.task = asyncio.ensure_future(app(scope, self._inbox.get, self._send))

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    def hang_up(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})


async def until(condition: Callable[[], bool]) -> None:
    """Wait for the effect of other tasks; fail after a minute."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)
