"""What POST /generate takes and answers.

Answers are built by hand (a model for each token would cost more than the token); their classes document them.

What an answer must match: from a body's fields to a grammar that has been vetted.

From a body's fields to the engine's: how tokens are chosen, and how many there may be.

From a checked body to a running request, and its outputs until its end.

`begin` does all that can be refused: the prompt is encoded, names are resolved to bytes that then stay, and the
engine takes the request or says why not. From there on `Generation` watches over it, and whoever began it closes
it. How answers look is `server.api.generate`'s part.
"""

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from adapters.catalog.catalog import Part, combine
from adapters.errors import FieldError, InvalidInput
from adapters.expression import MAX_LENGTH, MAX_PARTS, MAX_WEIGHT, Term, parse
from adapters.library import Pinned
from adapters.names import BASE, MAX_KEY, MAX_NAME, reference_fault
from server.access.principal import Principal
from server.access.usage import Ledger
from server.access.usage import Usage as UsedTokens
from server.api.deps import OutputStream, Services, let_go
from server.api.schemas import MAX_SEED, Body, MessageBody, ResponseFormatBody, SamplingFields, UsedAdapter
from server.api.tracing import GenerationTrace, facts, is_chat
from server.engine.grammar import MAX_SCHEMA_BYTES
from server.engine.request import AdapterRef, GenerationRequest, Grammar, SamplingParams, SequenceOutput
from server.errors import GenerationFailed, GenerationTimeout, TryAgain
from server.metrics.metrics import Metrics, Outcome, outcome_of
from server.model.text.chat import ChatMessage
from server.system.program import counted


class AdapterBody(Body):
    """One part of a composition, spelt out; the latest version where neither version nor alias is given."""

    name: str = Field(min_length=1, max_length=MAX_KEY, description="another project's: project/name")
    version: int | None = Field(None, ge=1)
    alias: str | None = Field(None, min_length=1, max_length=MAX_NAME)
    weight: float = Field(1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT)


class SamplingBody(SamplingFields):
    """How tokens are chosen by our own routes."""

    max_tokens: int = Field(64, ge=1, description="prompt + max_tokens may not exceed MAX_MODEL_LEN")
    temperature: float = Field(0.7, ge=0, le=5, description="0: greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="off a token's logit once the answer has it")
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="off a token's logit for each time that the answer has it"
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="null: a random one, which the answer carries")
    n: int = Field(1, ge=1, le=16, description="choices; each is a sequence of its own")
    logprobs: int = Field(
        0,
        ge=0,
        le=20,
        description="this many likeliest tokens beside each chosen one; 0: none. At most 262,144 in all where the "
        "answer isn't streamed; a stream ends with an error once that many, tokens among them, wait to be read",
    )


class PromptBody(Body):
    """What to go on from: exactly one of the two."""

    prompt: str | None = Field(None, min_length=1, description="text, used as it is")
    messages: list[MessageBody] | None = Field(
        None, min_length=1, max_length=1024, description="turns, put through the base's chat template"
    )


class StructureBody(Body):
    """What the answer must match: at most one of the two. It ends by itself, so `stop` does not go with them."""

    response_format: ResponseFormatBody | None = None
    regex: str | None = Field(
        None, min_length=1, max_length=8192, description="of the whole answer; Rust's syntax, without look-around"
    )


class GenerateBody(PromptBody, SamplingBody, StructureBody):
    """POST /generate."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "Once upon a time", "max_tokens": 32, "temperature": 0.0},
                {"messages": [{"role": "user", "content": "What is LoRA?"}], "adapter": "tweets*0.7+movies@2*0.3"},
            ]
        }
    )

    adapter: str | None = Field(
        None, max_length=MAX_LENGTH, description='an adapter expression; null or "base": the frozen base'
    )
    adapters: list[AdapterBody] | None = Field(
        None, min_length=1, max_length=MAX_PARTS, description="the same as a list; not both"
    )
    stream: bool = False


class TokenLogprobAnswer(BaseModel):
    token: str
    bytes: list[int]
    logprob: float = Field(description="nats, before temperature")


class SampledLogprobAnswer(TokenLogprobAnswer):
    top: list[TokenLogprobAnswer]


class Choice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length", "abort"]
    logprobs: list[SampledLogprobAnswer] | None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = Field(description="of the prompt, those whose keys and values were there already")


class TimingAnswer(BaseModel):
    queue_ms: float
    ttft_ms: float
    total_ms: float


class GenerateAnswer(BaseModel):
    """What POST /generate answers where nothing is streamed."""

    id: str
    model: str
    adapters: list[UsedAdapter]
    seed: int
    warnings: list[str] = Field(description="of the adapters, such as one that was made on another base")
    choices: Sequence[Choice]
    usage: Usage
    timing: TimingAnswer


_ANY_OBJECT = '{"type":"object"}'


def grammar_of(form: ResponseFormatBody | None, regex: str | None = None) -> Grammar | None:
    """The grammar that the fields ask for; None for any text. Raises InvalidInput."""
    if regex is not None:
        if form is not None and form.type != "text":
            message = "give regex or response_format, not both"
            raise InvalidInput([FieldError((name,), message) for name in ("regex", "response_format")])
        return Grammar("regex", regex)
    if form is None:
        return None
    if (form.type == "json_schema") != (form.json_schema is not None):
        message = "goes with the type json_schema, and that with it"
        raise InvalidInput([FieldError(("response_format", "json_schema"), message)])
    if form.json_schema is None:
        return Grammar("json_schema", _ANY_OBJECT) if form.type == "json_object" else None
    source, message = "", ""
    try:
        source = json.dumps(form.json_schema.schema_, allow_nan=False)
        if len(source) > MAX_SCHEMA_BYTES:
            message = f"is longer than {MAX_SCHEMA_BYTES} bytes"
    except ValueError:
        message = "has a number that JSON does not have"
    if message:
        raise InvalidInput([FieldError(("response_format", "json_schema", "schema"), message)])
    return Grammar("json_schema", source)


async def check_grammar(services: Services, grammar: Grammar, sampling: SamplingParams) -> None:
    """Have a request's grammar vetted and compiled. Raises InvalidInput, or TryAgain where too many are being."""
    for name, is_given in (("stop", sampling.stop), ("ignore_eos", sampling.ignore_eos)):
        if is_given:
            raise InvalidInput.of(name, "does not go with a regex or a response_format: the answer ends by itself")
    if not services.guidance.is_usable(grammar):
        with services.metrics.refusals():
            await services.limiters.grammars.run(services.guidance.check, grammar)


MAX_LOGPROBS = 1 << 18
"""Of an answer that isn't streamed. Each takes some 600 bytes while the answer is put together: 16 choices of
8,000 tokens with the 20 likeliest ones would take 1.6 GB."""


def sampling_params(body: SamplingFields, max_tokens: int, logprobs: int) -> SamplingParams:
    """The body's fields as the engine takes them, with a seed in any case. Raises InvalidInput."""
    top_p = 1.0 if body.top_p is None else body.top_p
    temperature = 1.0 if body.temperature is None else body.temperature
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature if top_p else 0.0,  # the smallest set of tokens there can be: the likeliest
        top_p=top_p or 1.0,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_biases(body.logit_bias or {}),
        seed=seed_of(body),
        stop=tuple(body.stop or ()),
        logprobs=logprobs,
        ignore_eos=body.ignore_eos,
        speculates=body.speculation == "auto",
    )


def seed_of(body: SamplingFields) -> int:
    """The body's seed as the engine takes it; another one each time where it has none."""
    return secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed % (MAX_SEED + 1)


def check_sequences(num: int, most: int | None, field: str) -> None:
    """Raise InvalidInput where so many of several requests never fit the queue together, however empty it is."""
    if most is not None and num > most:
        raise InvalidInput.of(
            field,
            f"are {num} sequences together, and the server takes {most} at once (SMOLORA_MAX_NUM_SEQS running, "
            "SMOLORA_MAX_QUEUE waiting): send fewer at a time",
        )


def most_tokens(num_top: int) -> int:
    """That an answer may have which isn't streamed and has `num_top` log-probabilities beside each."""
    return MAX_LOGPROBS // (num_top + 1)


def check_logprobs(num_tokens: int, num_top: int, field: str = "logprobs") -> None:
    """Raise InvalidInput where an answer of up to so many tokens has too many log-probabilities."""
    if num_top and num_tokens > most_tokens(num_top):
        raise InvalidInput.of(
            field,
            f"{num_tokens:,} tokens with {num_top} beside each are {num_tokens * (num_top + 1):,} of them, and "
            f"an answer has at most {MAX_LOGPROBS:,}: ask for fewer, or for a stream, and read it as it comes",
        )


def context_faults(
    num_prompt: int, num_more: int, limit: int, field: str, prompt_field: str
) -> tuple[FieldError, ...]:
    """What is wrong where a prompt of so many tokens and `num_more` exceed the model's `limit`; else nothing.

    The first is on the prompt's field where no answer fits behind it, else on the one that bounds the answer.
    """
    if num_prompt + num_more <= limit:
        return ()
    beyond = f"the prompt's {counted(num_prompt, 'token')} and {num_more:,} more exceed the model's {limit:,}"
    if num_prompt < limit:
        return (FieldError((field,), f"{beyond}: {limit - num_prompt} are left"),)
    told = FieldError((field,), beyond)
    return (
        FieldError(
            (prompt_field,), f"{num_prompt:,} tokens leave no room for an answer within the model's {limit:,}"
        ),
        told,
    )


def _biases(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """Token ids, written as JSON's keys are, and what is added to their logits."""
    found: dict[int, float] = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise InvalidInput.of("logit_bias", 'its keys are token ids, as in {"50256": -100}')
        found[int(key)] = bias
    return tuple(found.items())


_SHORT_TEXT = 2048
"""Characters that are encoded on the spot (about a millisecond); longer texts go to a thread."""

_BYTES_A_TOKEN = 4
"""Of ordinary text."""

T = TypeVar("T")


@dataclass(frozen=True)
class LedgerAccount:
    """Where a generation is counted. Of several that are one answer the first alone `is_request`."""

    ledger: Ledger
    principal: Principal
    is_request: bool = True

    def keys(self, names: Iterable[str]) -> frozenset[str]:
        """What the server as a whole calls the project's adapters of these names."""
        return frozenset(map(self.principal.viewpoint.key, names)) or frozenset({BASE})

    def add(self, keys: Iterable[str], usage: UsedTokens) -> None:
        """Count what was used under these adapters."""
        self.ledger.add(self.principal.project, self.principal.key_id, "+".join(sorted(keys)), usage)


class Generation:
    """One accepted request. Iterate `outputs` once; `close` at the end, which aborts what still runs."""

    def __init__(
        self,
        request: GenerationRequest,
        pinned: Pinned,
        stream: OutputStream,
        metrics: Metrics,
        timeout: float,
        account: "LedgerAccount",
        trace: GenerationTrace | None = None,
    ) -> None:
        """Its outputs come to an end within `timeout` seconds from now."""
        self.request = request
        self.parts = pinned.parts
        self.warnings = pinned.warnings
        self._pinned = pinned
        self._stream = stream
        self._metrics = metrics
        self._account = account
        self._names = account.keys(part.name for part in pinned.parts)
        self._facts = facts.get()
        self._trace = trace
        self._started = time.perf_counter()
        # one timer for all of it: setting one for each token, and clearing it, was a tenth of what a token costs
        self._timer = asyncio.get_running_loop().call_later(timeout, lambda: stream.put(GenerationTimeout()))
        self._num_tokens = 0
        self._num_cached: dict[int, int] = {}  # by choice
        self._cached = 0  # tokens of the prompt that were found, as the answer's usage has them
        self._num_running = request.n
        self._outcome: Outcome = "cancelled"
        self._is_read = False
        self._is_booked = request.scored_from is not None
        self._closed = False
        metrics.accepted(self._names)

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    async def outputs(self) -> AsyncIterator[SequenceOutput]:
        """News of every choice until all have ended. Raises what the engine ends one with, GenerationFailed or
        GenerationTimeout.
        """
        last: dict[int, float] = {}
        self._is_read = True
        try:
            async for output in self._stream:
                if self._trace is not None:
                    self._trace.note(output)
                if output.error is not None:
                    raise output.error
                self._num_cached[output.index] = output.num_cached_tokens
                self._cached = min(self._num_cached.values())
                if output.num_new_tokens:
                    self._observe(output, last)
                if output.finish_reason is not None:
                    self._num_running -= 1
                    if output.timing is not None:
                        self._metrics.observe_queue(output.timing.queue)
                yield output
            if self._num_running:
                raise GenerationFailed("the engine ended this request early")
        except Exception as error:
            self._outcome = outcome_of(error)
            raise
        self._outcome = "completed"
        self._book()

    async def close(self) -> None:
        """Abort what still runs and let go of the adapters. More than once is once."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        try:
            await self._stream.aclose()
        finally:
            self._book()
            took = time.perf_counter() - self._started
            self._metrics.ended(self._outcome, took, self._names, self._num_tokens)
            if self._trace is not None:
                self._trace.end(self._outcome, self._num_tokens, self._cached)
            if self._facts is not None:
                used = [f"{part.name}@{part.version}" for part in self.parts]
                self._facts.generated(self.id, used, self.num_prompt_tokens, self._num_tokens, self._cached)
            await let_go(self._pinned)  # last, as it may take a while

    def _book(self) -> None:
        """Count what came, as the answer's usage has it: where it was cut off, that much. Twice is once.

        Before the first token, the prompt counts if the client has left: the engine has read it, or was about to.
        It doesn't if the server ended the request.
        """
        has_left = self._is_read and self._outcome == "cancelled"
        if not self._is_booked and (self._num_cached or has_left):
            self._is_booked = True
            num_requests = int(self._account.is_request)
            usage = UsedTokens(num_requests, self.num_prompt_tokens, self._cached, self._num_tokens)
            self._account.add(self._names, usage)

    def _observe(self, output: SequenceOutput, last: dict[int, float]) -> None:
        now = time.perf_counter()
        self._num_tokens += output.num_new_tokens
        if output.index in last:
            self._metrics.observe_inter_token((now - last[output.index]) / output.num_new_tokens)
        elif not last:
            self._metrics.observe_first_token(now - self._started)
        last[output.index] = now


async def close_all(generations: Sequence[Generation]) -> None:
    """Close each, whatever becomes of the others."""
    results = await asyncio.gather(*(generation.close() for generation in generations), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def begin(services: Services, body: GenerateBody) -> Generation:
    """Hand the request to the engine. Raises whatever it can be refused for; nothing is held then."""
    terms = adapter_terms(body.adapter, body.adapters, services.base_name)
    ask_queue(services, body.n)
    token_ids = await encode_prompt(services, body, body.max_tokens)
    if not body.stream:
        check_logprobs(body.n * body.max_tokens, body.logprobs)
    grammar = grammar_of(body.response_format, body.regex)
    sampling = sampling_params(body, body.max_tokens, body.logprobs)
    return await start(services, terms, token_ids, sampling, body.n, grammar=grammar)


async def start(
    services: Services,
    terms: Sequence[Term],
    token_ids: tuple[int, ...],
    sampling: SamplingParams,
    n: int,
    field: str = "adapter",
    grammar: Grammar | None = None,
    scored_from: int | None = None,
    is_request: bool = True,
    num_taken: int | None = None,
) -> Generation:
    """Likewise, from what the body came to. Names of adapters that don't go are refused on `field`.

    With `scored_from`, the prompt's tokens from there on are scored, and nothing is generated. `is_request` is as
    in `LedgerAccount`. `num_taken` tokens are taken of the key's minute; None: as many as this may come to.
    """
    if grammar is not None:
        await check_grammar(services, grammar, sampling)
    principal = services.principal
    num_taken = len(token_ids) + n * sampling.max_tokens if num_taken is None else num_taken
    if num_taken:
        await services.access.rates.take(principal, "tokens", num_taken)
    pinned = await services.recent_pins.pin(services.library, terms, field) if terms else Pinned(())
    try:
        request = GenerationRequest(
            request_id=f"gen-{uuid.uuid4().hex}",
            prompt_token_ids=token_ids,
            sampling=sampling,
            adapters=canonical(pinned.parts),
            n=n,
            grammar=grammar,
            scored_from=scored_from,
            project=principal.project,
        )
        trace = None
        if (told := facts.get()) is not None and told.span is not None:  # the engine's times count from then on
            trace = GenerationTrace(told.span, told.operation, request, services.base_name, pinned.parts)
        stream = services.engine.submit(request)
    except BaseException as error:
        await let_go(pinned)
        if isinstance(error, TryAgain):
            services.metrics.refused()
        raise
    account = LedgerAccount(services.access.ledger, principal, is_request)
    return Generation(request, pinned, stream, services.metrics, services.settings.request_timeout, account, trace)


def ask_queue(services: Services, num_sequences: int) -> None:
    """Raise what so many sequences would be refused for now, before anything is done for them."""
    with services.metrics.refusals():
        services.engine.check_queue(num_sequences, services.principal.project)


def adapter_terms(expression: str | None, parts: Sequence[AdapterBody] | None, base_name: str) -> tuple[Term, ...]:
    """The adapters asked for, as they are named; none for the base. Raises InvalidInput."""
    if expression is not None and parts is not None:
        raise InvalidInput(
            [FieldError((name,), "give adapter or adapters, not both") for name in ("adapter", "adapters")]
        )
    if parts is not None:
        if faults := [fault for index, part in enumerate(parts) for fault in _part_faults(index, part)]:
            raise InvalidInput(faults)
        return tuple(Term(part.name, part.version, part.alias, part.weight) for part in parts)
    if expression is None or expression == base_name:
        return ()
    return parse(expression, "adapter")


def _part_faults(index: int, part: AdapterBody) -> list[FieldError]:
    faults = []
    if fault := reference_fault(part.name):
        message = "the base is always in the sum: leave it out" if part.name == BASE else fault
        faults.append(FieldError(("adapters", index, "name"), message))
    if part.version is not None and part.alias is not None:
        faults.append(FieldError(("adapters", index, "alias"), "give version or alias, not both"))
    return faults


async def encode_prompt(services: Services, body: PromptBody, max_tokens: int) -> tuple[int, ...]:
    """The prompt's tokens. Raises InvalidInput where there isn't exactly one prompt, or it leaves no room."""
    encode: Callable[[], Sequence[int]]
    if body.messages is not None and body.prompt is None:
        turns = [ChatMessage(message.role, message.content) for message in body.messages]
        name, length, texts = "messages", length_of(turns), ["".join(turn.content for turn in turns)]
        encode = partial(services.encoder.messages, turns)
        is_chat()
    elif body.prompt is not None and body.messages is None:
        name, length, texts = "prompt", len(body.prompt), [body.prompt]
        encode = partial(services.encoder.prompt, body.prompt)
    else:
        needs = "give exactly one of prompt and messages"
        raise InvalidInput([FieldError(("prompt",), needs), FieldError(("messages",), needs)])
    ids = await encoded(services, encode, length, texts, name)
    if faults := context_faults(len(ids), max_tokens, services.max_num_tokens, "max_tokens", name):
        await charge_refused(services, len(ids))
        raise InvalidInput(faults)
    return tuple(ids)


def length_of(turns: Sequence[ChatMessage]) -> int:
    """The characters that a template makes of them, with some 32 around each turn."""
    return sum(len(turn.content) + 32 for turn in turns)


async def encoded(
    services: Services,
    encode: Callable[[], T],
    length: int,
    texts: Sequence[str],
    field: str,
    refusal: Callable[[tuple[FieldError, ...]], InvalidInput] = InvalidInput,
) -> T:
    """Return what `encode` makes of prompts with `length` characters together, each of which has one of `texts`.

    Raises `refusal` on `field` if one can't fit by its bytes alone, which are then charged as an estimate of its
    tokens; RateLimited if no tokens are left of the minute; QueueFull if many long prompts wait.
    """
    if length <= _SHORT_TEXT:
        return encode()
    await services.access.rates.take(services.principal, "tokens", 0)
    if (longest := services.encoder.max_token_bytes) is not None:
        limit = services.max_num_tokens
        for text in texts:
            if (num_bytes := len(text.encode())) > limit * longest:
                await charge_refused(services, num_bytes // _BYTES_A_TOKEN)
                message = f"has {num_bytes:,} bytes, and the model's {limit:,} tokens have at most {longest} each"
                raise refusal(
                    (FieldError((field,), message), FieldError(("max_tokens",), f"the prompt {message}"))
                )
    with services.metrics.refusals():
        return await services.limiters.encoding.run(encode)


async def charge_refused(services: Services, num_tokens: int) -> None:
    """Count the tokens of a prompt that is refused for its length: encoding it has cost the server."""
    await services.access.rates.charge(services.principal, "tokens", num_tokens)


def canonical(parts: Sequence[Part]) -> tuple[AdapterRef, ...]:
    """The parts as the engine's cache and batch tell them apart."""
    return tuple(AdapterRef(digest, weight) for digest, weight in combine(parts))
