"""From a checked body of /v1 to running generations: names, prompts and sampling as the engine takes them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from adapters.errors import FieldError, InvalidInput, NotFound
from adapters.expression import Term, parse
from server.api.deps import Services
from server.api.generation import (
    Generation,
    ask_queue,
    charge_refused,
    check_logprobs,
    check_sequences,
    close_all,
    context_faults,
    encoded,
    grammar_of,
    length_of,
    most_tokens,
    sampling_params,
    seed_of,
    start,
)
from server.api.openai.batch import Batch
from server.api.openai.errors import ContextTooLong, ModelNotFound
from server.api.openai.schemas import (
    DEFAULT_COMPLETION_TOKENS,
    CallBody,
    ChatBody,
    CompletionBody,
    Prompt,
)
from server.api.tracing import is_chat
from server.engine.request import Grammar, SamplingParams
from server.model.text.chat import ChatMessage, meant_role

DEFAULT_CHAT_TOKENS = 1024
"""An answer's longest where the client sets no bound: small models may not come to an end by themselves."""


async def begin_chat(services: Services, body: ChatBody) -> Batch:
    """Hand the conversation to the engine. Raises whatever it can be refused for; nothing is held then."""
    terms = terms_of(services, body.model)
    limit, field = _token_limit(body)
    num_top = _num_top(body)
    grammar = grammar_of(body.response_format)
    turns = [ChatMessage(meant_role(message.role), message.content) for message in body.messages]
    encode = partial(services.encoder.messages, turns)
    is_chat()
    ask_queue(services, body.n or 1)
    text = "".join(turn.content for turn in turns)
    refusal = partial(_too_long, services)
    ids = tuple(await encoded(services, encode, length_of(turns), [text], "messages", refusal))
    if limit is None:
        limit = min(DEFAULT_CHAT_TOKENS, max(services.max_num_tokens - len(ids), 1))
        if num_top and not body.stream:
            limit = min(limit, most_tokens(num_top) // (body.n or 1))
    await _check_room(services, len(ids), limit, field, "messages")
    sampling = sampling_params(body, limit, num_top)
    return await _start(services, body, terms, [ids], sampling, grammar)


async def begin_completions(services: Services, body: CompletionBody) -> Batch:
    """Hand every prompt to the engine: all of them run, or none. Raises whatever they can be refused for."""
    terms = terms_of(services, body.model)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidInput.of("best_of", "is not supported: leave it out, or give what n is")
    limit = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    num_sequences = len(body.prompt) * (body.n or 1)
    if len(body.prompt) > 1:
        check_sequences(num_sequences, services.engine.max_in_flight, "prompt")
    ask_queue(services, num_sequences)
    prompts = await _encoded_prompts(services, body.prompt)
    for ids in prompts:
        await _check_room(services, len(ids), limit, "max_tokens", "prompt")
    num_top = 0 if body.logprobs is None else max(body.logprobs, 1)
    return await _start(services, body, terms, prompts, sampling_params(body, limit, num_top), None)


def terms_of(services: Services, model: str) -> tuple[Term, ...]:
    """The adapters that `model` names; none for the base. Raises InvalidExpression on `model`."""
    return () if model == services.base_name else parse(model, "model")


def _token_limit(body: ChatBody) -> tuple[int | None, str]:
    """The most tokens of the answer, and the field that says so."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidInput.of("max_tokens", "is the older name of max_completion_tokens: give one of them")
    return (new, "max_completion_tokens") if old is None else (old, "max_tokens")


def _num_top(body: ChatBody) -> int:
    """How many of the likeliest tokens the engine tells: at least one where any logprobs are wanted."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidInput.of("top_logprobs", "goes with logprobs: true only")
    return max(body.top_logprobs or 0, 1) if body.logprobs else 0


async def _encoded_prompts(services: Services, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    encoder = services.encoder
    if any(max(prompt) >= encoder.num_tokens for prompt in prompts if not isinstance(prompt, str)):
        raise InvalidInput.of("prompt", f"the base has {encoder.num_tokens} tokens, from 0 on")

    def encode() -> list[tuple[int, ...]]:
        return [tuple(encoder.prompt(prompt)) if isinstance(prompt, str) else prompt for prompt in prompts]

    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    return await encoded(services, encode, sum(map(len, texts)), texts, "prompt", partial(_too_long, services))


async def _check_room(services: Services, num_prompt: int, num_more: int, field: str, prompt_field: str) -> None:
    if faults := context_faults(num_prompt, num_more, services.max_num_tokens, field, prompt_field):
        await charge_refused(services, num_prompt)
        raise _too_long(services, faults)


def _too_long(services: Services, faults: tuple[FieldError, ...]) -> ContextTooLong:
    # some clients, LiteLLM for one, recognize it by OpenAI's words alone
    words = f"{faults[0].message} (this model's maximum context length is {services.max_num_tokens} tokens)"
    return ContextTooLong([FieldError(faults[0].loc, words), *faults[1:]])


async def _start(
    services: Services,
    body: CallBody,
    terms: Sequence[Term],
    prompts: Sequence[tuple[int, ...]],
    sampling: SamplingParams,
    grammar: Grammar | None,
) -> Batch:
    if not body.stream:
        field = "top_logprobs" if isinstance(body, ChatBody) else "logprobs"
        check_logprobs(len(prompts) * (body.n or 1) * sampling.max_tokens, sampling.logprobs, field)
    n = body.n or 1
    num_tokens = sum(map(len, prompts)) + len(prompts) * n * sampling.max_tokens
    started: list[Generation] = []
    try:
        for ids in prompts:
            # without a seed, the same prompt twice is two answers
            own = replace(sampling, seed=seed_of(body)) if started else sampling
            is_first = not started  # which takes what all of them may come to
            begun = await start(
                *(services, terms, ids, own, n, "model", grammar),
                is_request=is_first,
                num_taken=num_tokens if is_first else 0,
            )
            started.append(begun)
            # a name that moves meanwhile moves for none of them
            terms = [Term(part.name, part.version, weight=part.weight) for part in begun.parts]
    except NotFound as error:
        await close_all(started)
        raise ModelNotFound(str(error)) from None
    except BaseException:
        await close_all(started)
        raise
    return Batch(started, services.base_name)
