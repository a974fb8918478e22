"""The life of a generation request, from the body of POST /generate to the last output.

`begin` does everything that can refuse the request: it encodes the prompt, resolves and pins the adapters, and
submits the request to the engine. `Generation` then times and counts the outputs, until the caller closes it.
`server.api.generate` builds the answers as dictionaries. The pydantic models of answers here only document them:
building a model for each token would cost more than generating the token.
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

from adapters.catalog.catalog import combine
from adapters.errors import FieldError, InvalidInput
from adapters.expression import MAX_LENGTH, MAX_PARTS, MAX_WEIGHT, Term, parse
from adapters.library import Pinned
from adapters.names import BASE, MAX_KEY, MAX_NAME, reference_fault
from server.access.principal import Principal
from server.access.usage import Ledger
from server.access.usage import Usage as UsedTokens
from server.api.deps import OutputStream, Services, release
from server.api.schemas import (
    MAX_SEED,
    Body,
    MessageBody,
    PromptLogprobs,
    ResponseFormatBody,
    SamplingFields,
    StructuredOutputsBody,
    UsedAdapter,
)
from server.api.tracing import GenerationTrace, facts, is_chat
from server.engine.grammar import MAX_REGEX_BYTES, MAX_SCHEMA_BYTES, regex_of
from server.engine.request import GenerationRequest, Grammar, SamplingParams, SequenceOutput
from server.errors import GenerationFailed, GenerationTimeout, TryAgain
from server.metrics.metrics import Metrics, Outcome, outcome_of
from server.model.text.chat import ChatMessage
from server.system.messages import plural

MAX_LOGPROBS = 1 << 18
"""The maximum number of log-probabilities in one answer that isn't streamed. Each takes about 600 bytes while the
answer is built, so 16 choices of 8,000 tokens with their 20 likeliest alternatives would take 1.6 GB."""
_SHORT_TEXT = 2048
"""Texts of up to this many characters are encoded on the event loop, which takes about a millisecond. Longer texts
are encoded in a thread."""
_BYTES_A_TOKEN = 4  # an estimate for ordinary text
_ANY_OBJECT = '{"type":"object"}'

T = TypeVar("T")

Refusal = Callable[[tuple[FieldError, ...]], InvalidInput]
"""A function that makes the error for an invalid prompt, given the faults of its fields."""


class AdapterBody(Body):
    """A part of a composition. Without a version or an alias it is the latest version."""

    name: str = Field(
        min_length=1, max_length=MAX_KEY, description="project/name for an adapter of another project"
    )
    version: int | None = Field(None, ge=1)
    alias: str | None = Field(None, min_length=1, max_length=MAX_NAME)
    weight: float = Field(1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT)


class SamplingBody(SamplingFields):
    """The sampling fields of /generate and /compare."""

    max_tokens: int = Field(64, ge=1, description="prompt + max_tokens may not exceed MAX_MODEL_LEN")
    temperature: float = Field(0.7, ge=0, le=5, description="0: greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="subtracted from the logit of a token that the answer contains"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="subtracted from a token's logit for each of its occurrences in the answer"
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="null: random; the answer has the seed used")
    n: int = Field(1, ge=1, le=16, description="choices; each is a separate sequence")
    logprobs: int = Field(
        0,
        ge=0,
        le=20,
        description="likeliest alternatives listed for each token; 0: no log-probabilities. An answer that isn't "
        "streamed has at most 262,144 in all; a stream ends with an error if as many wait to be read",
    )


class PromptBody(Body):
    """The prompt: exactly one of the two fields."""

    prompt: str | None = Field(None, min_length=1, description="text, used as it is")
    messages: list[MessageBody] | None = Field(
        None, min_length=1, max_length=1024, description="turns, rendered by the base's chat template"
    )
    continue_final_message: bool = Field(
        False, description="the answer goes on in the last message, which is the assistant's"
    )


class StructureBody(Body):
    """A grammar for the answer: at most one of the fields, and no `stop`, as the grammar ends the answer."""

    response_format: ResponseFormatBody | None = None
    regex: str | None = Field(
        None,
        min_length=1,
        max_length=8192,
        description="matches the whole answer; Rust's syntax, without look-around",
    )
    structured_outputs: StructuredOutputsBody | None = None


class GenerateBody(PromptBody, SamplingBody, StructureBody):
    """The body of POST /generate."""

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
    max_tokens: int = Field(
        64, ge=0, description="prompt + max_tokens may not exceed MAX_MODEL_LEN; 0 only with prompt_logprobs"
    )
    prompt_logprobs: PromptLogprobs = None
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
    cached_tokens: int = Field(description="tokens of the prompt whose keys and values were cached")


class TimingAnswer(BaseModel):
    queue_ms: float
    ttft_ms: float
    total_ms: float


class GenerateAnswer(BaseModel):
    """The answer of POST /generate without `stream`."""

    id: str
    model: str
    adapters: list[UsedAdapter]
    seed: int
    warnings: list[str] = Field(description="about the adapters, such as one made on another base")
    choices: Sequence[Choice]
    prompt_logprobs: list[SampledLogprobAnswer | None] | None = Field(
        None, description="of the prompt's tokens, null for the first; only if the request asked for them"
    )
    usage: Usage
    timing: TimingAnswer


def grammar_of(
    form: ResponseFormatBody | None, structured: StructuredOutputsBody | None, regex: str | None = None
) -> Grammar | None:
    """Return the grammar that the fields ask for, or None if they allow any text.

    Raise InvalidInput if the fields contradict each other or a schema is invalid.
    """
    given = {
        "regex": regex is not None,
        "structured_outputs": structured is not None,
        "response_format": form is not None and form.type != "text",
    }
    if len(names := [name for name, is_given in given.items() if is_given]) > 1:
        raise InvalidInput([FieldError((name,), f"give one of {' and '.join(names)}") for name in names])
    if regex is not None:
        return Grammar("regex", regex)
    if structured is not None:
        source = regex_of(structured.choice)
        if len(source.encode()) > MAX_REGEX_BYTES:
            message = f"has more than {MAX_REGEX_BYTES} bytes in all"
            raise InvalidInput([FieldError(("structured_outputs", "choice"), message)])
        return Grammar("regex", source)
    if form is None:
        return None
    if (form.type == "json_schema") != (form.json_schema is not None):
        message = "is required with the type json_schema, and allowed with no other"
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
    """Check and compile a request's grammar.

    Raise InvalidInput if the grammar is invalid, or TryAgain if too many other grammars wait to be compiled.
    """
    for name in ("stop", "stop_token_ids", "min_tokens", "ignore_eos"):
        if getattr(sampling, name):
            raise InvalidInput.of(
                name,
                "can't be combined with regex, response_format or structured_outputs: the grammar ends the answer",
            )
    if not services.guidance.is_usable(grammar):
        with services.metrics.refusals():
            await services.limiters.grammars.run(services.principal.project, services.guidance.check, grammar)


def sampling_params(body: SamplingFields, max_tokens: int, logprobs: int) -> SamplingParams:
    """Return the engine's sampling parameters for a body. Raise InvalidInput if a field is invalid."""
    top_p = 1.0 if body.top_p is None else body.top_p
    temperature = 1.0 if body.temperature is None else body.temperature
    if body.min_tokens > max_tokens:
        raise InvalidInput.of("min_tokens", f"is above the answer's limit of {plural(max_tokens, 'token')}")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=temperature if top_p else 0.0,  # with top_p 0, only the likeliest token is left
        top_p=top_p or 1.0,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_biases(body.logit_bias or {}),
        seed=seed_of(body),
        stop=tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        ignore_eos=body.ignore_eos,
        speculates=body.speculation == "auto",
    )


def seed_of(body: SamplingFields) -> int:
    """Return the body's seed, reduced to the engine's range, or a random seed if the body has none."""
    return secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed % (MAX_SEED + 1)


def check_sequences(num: int, most: int | None, field: str) -> None:
    """Raise InvalidInput for `field` if a request's `num` sequences exceed `most`.

    `most` is the number of sequences that an empty queue accepts; None means no limit.
    """
    if most is not None and num > most:
        raise InvalidInput.of(
            field,
            f"are {num} sequences together, and the server takes {most} at once (SMOLORA_MAX_NUM_SEQS running, "
            "SMOLORA_MAX_QUEUE waiting): send fewer at a time",
        )


def most_tokens(num_top: int) -> int:
    """Return the maximum length of an answer that isn't streamed, with `num_top` alternatives for each token."""
    return MAX_LOGPROBS // (num_top + 1)


def check_logprobs(num_tokens: int, num_top: int, field: str = "logprobs") -> None:
    """Raise InvalidInput for `field` if an answer of this size would have too many log-probabilities.

    `num_top` is the number of alternatives for each token.
    """
    if num_top and num_tokens > most_tokens(num_top):
        raise InvalidInput.of(
            field,
            f"{num_tokens:,} tokens with {num_top} alternatives each make {num_tokens * (num_top + 1):,} "
            f"log-probabilities, more than {MAX_LOGPROBS:,}: ask for fewer, or use stream",
        )


def scores_prompt(prompt_logprobs: int | None, n: int | None, stream: bool | None, echoes: bool = False) -> bool:
    """Return whether the prompt's tokens are to be scored: for `prompt_logprobs`, or for `echo` with `logprobs`.

    Raise InvalidInput if the request has several choices, or asks for `prompt_logprobs` in a stream.
    """
    if prompt_logprobs is None and not echoes:
        return False
    if n is not None and n > 1:
        raise InvalidInput.of("n", "must be 1 if the prompt is scored: its scores are the same for each choice")
    if stream and prompt_logprobs is not None:
        raise InvalidInput.of("prompt_logprobs", "is not available in a stream")
    return True


async def check_length(
    services: Services,
    num_prompt: int,
    num_more: int,
    field: str,
    prompt_field: str,
    refusal: Refusal = InvalidInput,
) -> None:
    """Raise an error if a prompt of `num_prompt` tokens and `num_more` for the answer exceed the model's limit.

    `refusal` makes the error. If the prompt leaves no room for any answer, the error names `prompt_field` first.
    Otherwise it names only `field`, the field that limits the answer's length.
    """
    limit = services.max_num_tokens
    if num_prompt + num_more <= limit:
        return
    await charge_refused(services, num_prompt)
    beyond = f"the prompt's {plural(num_prompt, 'token')} and {num_more:,} more exceed the model's {limit:,}"
    if num_prompt < limit:
        raise refusal((FieldError((field,), f"{beyond}: {limit - num_prompt} are left"),))
    no_room = f"{num_prompt:,} tokens leave no room for an answer within the model's {limit:,}"
    raise refusal((FieldError((prompt_field,), no_room), FieldError((field,), beyond)))


def _biases(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """Return (token id, bias) pairs. The ids are strings in JSON. Raise InvalidInput if an id isn't a number."""
    found: dict[int, float] = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise InvalidInput.of("logit_bias", 'its keys are token ids, as in {"50256": -100}')
        found[int(key)] = bias
    return tuple(found.items())


@dataclass(frozen=True)
class LedgerAccount:
    """The key and the project that a generation's usage is charged to.

    If a call has several generations, `is_request` is true only for the first: the call counts as one request.
    """

    ledger: Ledger
    principal: Principal
    is_request: bool = True

    def keys(self, names: Iterable[str]) -> frozenset[str]:
        """Return the keys in the catalog of the adapters with these names, or just BASE if there are no names."""
        return frozenset(map(self.principal.viewpoint.key, names)) or frozenset({BASE})

    def add(self, keys: Iterable[str], usage: UsedTokens) -> None:
        """Add usage to the ledger, under the adapters with these keys in the catalog."""
        self.ledger.add(self.principal.project, self.principal.key_id, "+".join(sorted(keys)), usage)


class Generation:
    """An accepted request. Iterate over `outputs` only once. `close` aborts the request if it still runs."""

    def __init__(
        self,
        request: GenerationRequest,
        pinned: Pinned,
        stream: OutputStream,
        metrics: Metrics,
        timeout: float,
        account: "LedgerAccount",
        trace: GenerationTrace | None = None,
        is_booked: bool = False,
    ) -> None:
        """Start the timer: after `timeout` seconds, the outputs end with GenerationTimeout.

        If `is_booked`, the usage isn't added to the account, because another generation stands for it.
        """
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
        # one timer for the whole answer: setting and clearing one for each token took a tenth of a token's time
        self._timer = asyncio.get_running_loop().call_later(timeout, lambda: stream.put(GenerationTimeout()))
        self._num_tokens = 0
        self._num_cached: dict[int, int] = {}  # by choice
        self._cached = 0  # cached tokens of the prompt, as in the answer's usage
        self._num_running = request.n
        self._outcome: Outcome = "cancelled"
        self._is_read = False
        self._is_booked = is_booked
        self._closed = False
        metrics.accepted(self._names)

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    async def outputs(self) -> AsyncIterator[SequenceOutput]:
        """Yield the outputs of every choice until all have ended.

        If the engine ends a choice with an error, raise that error. Raise GenerationFailed if the engine ends the
        request early, and GenerationTimeout if the request takes too long.
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
        """Abort the request if it still runs, and release its adapters. Idempotent."""
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
            await release(self._pinned)  # last, because it may take long

    def _book(self) -> None:
        """Add the usage so far to the ledger. Idempotent.

        A request that ended before its first output is counted only if the client ended it by leaving. The engine
        had then computed the prompt, or was about to.
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
    """Close all generations, and then raise the first error, if any."""
    results = await asyncio.gather(*(generation.close() for generation in generations), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def begin(services: Services, body: GenerateBody) -> Generation:
    """Submit the request that `body` describes to the engine. Raise an error if the request is refused."""
    terms = adapter_terms(body.adapter, body.adapters, services.base_name)
    is_scored = scores_prompt(body.prompt_logprobs, body.n, body.stream)
    if not (body.max_tokens or is_scored):
        raise InvalidInput.of("max_tokens", "is at least 1 without prompt_logprobs")
    ask_queue_for(services, body.n)
    token_ids = await encode_prompt(services, body, body.max_tokens)
    num_top = max(body.logprobs, body.prompt_logprobs or int(is_scored))
    if not body.stream:
        check_logprobs(body.n * body.max_tokens + is_scored * len(token_ids), num_top)
    grammar = grammar_of(body.response_format, body.structured_outputs, body.regex)
    sampling = sampling_params(body, body.max_tokens, num_top)
    scored_from = 1 if is_scored else None
    return await start(services, terms, token_ids, sampling, body.n, grammar=grammar, scored_from=scored_from)


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
    continuations: tuple[tuple[int, ...], ...] = (),
    is_booked: bool = False,
) -> Generation:
    """Submit a request to the engine. If it is refused, release its adapters and raise the error.

    Errors about adapters name `field`. If `scored_from` is given, the prompt's tokens from this index on are
    scored. With `continuations`, these are scored instead, and nothing is generated. `is_request` is as in
    `LedgerAccount`, and `is_booked` as in `Generation`. `num_taken` tokens count towards the key's rate limit. By
    default these are the prompt's tokens, and `max_tokens` for each of the `n` answers.
    """
    if grammar is not None:
        await check_grammar(services, grammar, sampling)
    principal = services.principal
    num_taken = len(token_ids) + n * sampling.max_tokens if num_taken is None else num_taken
    if num_taken:
        await services.access.rates.take(principal, "tokens", num_taken)
    pinned = await services.recent_pins.pin(services.library, terms, field) if terms else Pinned()
    try:
        request = GenerationRequest(
            request_id=f"gen-{uuid.uuid4().hex}",
            prompt_token_ids=token_ids,
            sampling=sampling,
            adapters=combine(pinned.parts),
            n=n,
            grammar=grammar,
            scored_from=len(token_ids) if continuations else scored_from,
            continuations=continuations,
            project=principal.project,
        )
        trace = None
        found = facts.get()
        if found is not None and found.span is not None:  # before `submit`, when the engine's clock starts
            trace = GenerationTrace(found.span, found.operation, request, services.base_name, pinned.parts)
        stream = services.engine.submit(request)
    except BaseException as error:
        await release(pinned)
        if isinstance(error, TryAgain):
            services.metrics.refused()
        raise
    account = LedgerAccount(services.access.ledger, principal, is_request)
    timeout = services.settings.request_timeout
    return Generation(request, pinned, stream, services.metrics, timeout, account, trace, is_booked)


def ask_queue_for(services: Services, num_sequences: int) -> None:
    """Call `ask_queue` if the request has several sequences. For a single one, `Edge` has checked the queue."""
    if num_sequences > 1:
        ask_queue(services, num_sequences)


def ask_queue(services: Services, num_sequences: int) -> None:
    """Raise the engine's error if its queue would refuse `num_sequences` sequences now.

    Call this before any other work is done for the request.
    """
    with services.metrics.refusals():
        services.engine.check_queue(num_sequences, services.principal.project)


def adapter_terms(expression: str | None, parts: Sequence[AdapterBody] | None, base_name: str) -> tuple[Term, ...]:
    """Return the request's weighted adapters, or () for the base model alone.

    `expression` and `parts` are the fields `adapter` and `adapters`. Raise InvalidInput if both are given, or if
    one is invalid.
    """
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
        message = "the base is always part of the sum: leave it out" if part.name == BASE else fault
        faults.append(FieldError(("adapters", index, "name"), message))
    if part.version is not None and part.alias is not None:
        faults.append(FieldError(("adapters", index, "alias"), "give version or alias, not both"))
    return faults


async def encode_prompt(services: Services, body: PromptBody, max_tokens: int) -> tuple[int, ...]:
    """Return the prompt's token ids.

    Raise InvalidInput if the body doesn't have exactly one prompt, or the prompt leaves no room for `max_tokens`.
    """
    encode: Callable[[], Sequence[int]]
    if body.messages is not None and body.prompt is None:
        turns = [ChatMessage(message.role, message.content) for message in body.messages]
        name, length, texts = "messages", length_of(turns), ["".join(turn.content for turn in turns)]
        encode = partial(services.encoder.messages, turns, "open" if body.continue_final_message else "next turn")
        is_chat()
    elif body.prompt is not None and body.messages is None and not body.continue_final_message:
        name, length, texts = "prompt", len(body.prompt), [body.prompt]
        encode = partial(services.encoder.prompt, body.prompt)
    else:
        raise prompt_fault(body)
    ids = await encoded(services, encode, length, texts, name)
    await check_length(services, len(ids), max_tokens, "max_tokens", name)
    return tuple(ids)


def prompt_fault(body: PromptBody) -> InvalidInput:
    """Return the error for a body that has not exactly one prompt, or continues a prompt that isn't `messages`."""
    if (body.prompt is None) != (body.messages is None):
        return InvalidInput.of("continue_final_message", "is only allowed with messages")
    needs = "give exactly one of prompt and messages"
    return InvalidInput([FieldError(("prompt",), needs), FieldError(("messages",), needs)])


def length_of(turns: Sequence[ChatMessage]) -> int:
    """Estimate the characters of the turns in the chat template: their text, and 32 for each turn's markup."""
    return sum(len(turn.content) + 32 for turn in turns)


async def encoded(
    services: Services,
    encode: Callable[[], T],
    length: int,
    texts: Sequence[str],
    field: str,
    refusal: Refusal = InvalidInput,
) -> T:
    """Return the result of `encode`, which encodes `texts`. All texts together have `length` characters.

    If a text has too many bytes for the model's context, count an estimate of its tokens towards the key's rate
    limit, and raise the error that `refusal` makes. Raise RateLimited if the key has no tokens left this minute,
    or QueueFull if too many long prompts wait to be encoded.
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
        return await services.limiters.encoding.run(services.principal.project, encode)


async def charge_refused(services: Services, num_tokens: int) -> None:
    """Count the tokens of a refused prompt towards the key's rate limit, since encoding the prompt took time."""
    await services.access.rates.charge(services.principal, "tokens", num_tokens)
