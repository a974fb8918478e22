"""Turn the body of a call to /v1 into running generations."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from adapters.errors import FieldError, InvalidInput, NotFound
from adapters.expression import Term, parse
from server.api.deps import Services
from server.api.generation import (
    Generation,
    ask_queue_for,
    check_length,
    check_logprobs,
    check_sequences,
    close_all,
    encoded,
    grammar_of,
    length_of,
    most_tokens,
    sampling_params,
    scores_prompt,
    seed_of,
    start,
)
from server.api.openai.batch import Batch
from server.api.openai.schemas import (
    DEFAULT_COMPLETION_TOKENS,
    CallBody,
    ChatBody,
    CompletionBody,
)
from server.api.problems import ContextTooLong, ModelNotFound
from server.api.tracing import is_chat
from server.engine.request import Grammar, SamplingParams
from server.model.text.chat import ChatMessage, meant_role

DEFAULT_CHAT_TOKENS = 1024
"""The most tokens of an answer if the client sets no limit. Small models may never end an answer by themselves."""


async def begin_chat(services: Services, body: ChatBody) -> Batch:
    """Submit the conversation to the engine. Raise an error if it is refused."""
    terms = terms_of(services, body.model)
    limit, field = _token_limit(body)
    num_top = _num_top(body)
    is_scored = scores_prompt(body.prompt_logprobs, body.n, body.stream)
    grammar = grammar_of(body.response_format, body.structured_outputs)
    turns = [ChatMessage(meant_role(message.role), message.content or "") for message in body.messages]
    is_open = bool(body.continue_final_message)
    if body.add_generation_prompt not in (None, not is_open):
        raise InvalidInput.of("add_generation_prompt", f"must be {not is_open} here, or left out".lower())
    encode = partial(services.encoder.messages, turns, "open" if is_open else "next turn")
    is_chat()
    ask_queue_for(services, body.n or 1)
    text = "".join(turn.content for turn in turns)
    refusal = partial(_too_long, services)
    ids = tuple(await encoded(services, encode, length_of(turns), [text], "messages", refusal))
    if limit is None:
        limit = min(DEFAULT_CHAT_TOKENS, max(services.max_num_tokens - len(ids), 1))
        if num_top and not body.stream:
            limit = min(limit, most_tokens(num_top) // (body.n or 1))
    await check_length(services, len(ids), limit, field, "messages", refusal)
    sampling = sampling_params(body, limit, _num_engine_top(body, num_top))
    return await _start(services, body, terms, [ids], sampling, grammar, is_scored)


async def begin_completions(services: Services, body: CompletionBody) -> Batch:
    """Submit all prompts to the engine. If one is refused, abort the others and raise its error."""
    terms = terms_of(services, body.model)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidInput.of("best_of", "is not supported: leave it out, or set it to n")
    limit = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    is_scored = scores_prompt(
        body.prompt_logprobs, body.n, body.stream, echoes=bool(body.echo) and body.logprobs is not None
    )
    if not (limit or body.echo or is_scored):
        raise InvalidInput.of("max_tokens", "is at least 1 without echo or prompt_logprobs")
    grammar = grammar_of(None, body.structured_outputs)
    num_sequences = len(body.prompt) * (body.n or 1)
    if len(body.prompt) > 1:
        check_sequences(num_sequences, services.engine.max_in_flight, "prompt")
    ask_queue_for(services, num_sequences)
    prompts, echoed = await _encoded_prompts(services, body)
    for ids in prompts:
        await check_length(services, len(ids), limit, "max_tokens", "prompt", partial(_too_long, services))
    num_top = _num_engine_top(body, 0 if body.logprobs is None else max(body.logprobs, 1))
    sampling = sampling_params(body, limit, num_top)
    return await _start(services, body, terms, prompts, sampling, grammar, is_scored, echoed)


def terms_of(services: Services, model: str) -> tuple[Term, ...]:
    """Parse the adapter expression `model` into its weighted adapters. Return () if it names the base model.

    Raise InvalidExpression if it isn't a valid expression.
    """
    return () if model == services.base_name else parse(model, "model")


def _token_limit(body: ChatBody) -> tuple[int | None, str]:
    """Return the limit on the answer's tokens (None if the body sets none), and the name of the limit's field."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidInput.of("max_tokens", "is the older name of max_completion_tokens: give one of them")
    return (new, "max_completion_tokens") if old is None else (old, "max_tokens")


def _num_top(body: ChatBody) -> int:
    """Return how many likeliest tokens the engine must return: at least one if log-probabilities are wanted."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidInput.of("top_logprobs", "is only allowed with logprobs: true")
    return max(body.top_logprobs or 0, 1) if body.logprobs else 0


def _num_engine_top(body: CallBody, num_top: int) -> int:
    """Return how many likeliest tokens the engine must return, if answers have `num_top`."""
    return num_top if body.prompt_logprobs is None else max(num_top, body.prompt_logprobs, 1)


async def _encoded_prompts(services: Services, body: CompletionBody) -> tuple[list[tuple[int, ...]], list[str]]:
    """Return the prompts' token ids, and the texts that `echo` repeats, which have no special tokens."""
    encoder, prompts = services.encoder, body.prompt
    if any(max(prompt) >= encoder.num_tokens for prompt in prompts if not isinstance(prompt, str)):
        raise InvalidInput.of("prompt", f"the base has {encoder.num_tokens} tokens, from 0 on")

    def encode() -> tuple[list[tuple[int, ...]], list[str]]:
        ids = [tuple(encoder.prompt(prompt)) if isinstance(prompt, str) else prompt for prompt in prompts]
        echoed = [
            prompt if isinstance(prompt, str) else services.tokenizer.decode(prompt, skip_special_tokens=True)
            for prompt in prompts
            if body.echo
        ]
        return ids, echoed

    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    length = sum(len(prompt) for prompt in prompts if body.echo or isinstance(prompt, str))
    return await encoded(services, encode, length, texts, "prompt", partial(_too_long, services))


def _too_long(services: Services, faults: tuple[FieldError, ...]) -> ContextTooLong:
    # some clients, such as LiteLLM, recognize this error by OpenAI's words
    words = f"{faults[0].message} (this model's maximum context length is {services.max_num_tokens} tokens)"
    return ContextTooLong([FieldError(faults[0].loc, words), *faults[1:]])


async def _start(
    services: Services,
    body: CallBody,
    terms: Sequence[Term],
    prompts: Sequence[tuple[int, ...]],
    sampling: SamplingParams,
    grammar: Grammar | None,
    is_scored: bool,
    echoed: Sequence[str] = (),
) -> Batch:
    n = body.n or 1
    num_prompt, num_more = sum(map(len, prompts)), len(prompts) * n * sampling.max_tokens
    field = "top_logprobs" if isinstance(body, ChatBody) else "logprobs"
    field = field if body.prompt_logprobs is None else "prompt_logprobs"
    # the scores of a prompt are in one event of a stream
    check_logprobs(is_scored * num_prompt + (0 if body.stream else num_more), sampling.logprobs, field)
    num_tokens = num_prompt + num_more
    started: list[Generation] = []
    try:
        for ids in prompts:
            # if no seed is given, each prompt gets its own, so equal prompts get different answers
            own = replace(sampling, seed=seed_of(body)) if started else sampling
            is_first = not started  # the first generation is charged for the tokens of all
            generation = await start(
                *(services, terms, ids, own, n, "model", grammar),
                scored_from=1 if is_scored else None,
                is_request=is_first,
                num_taken=num_tokens if is_first else 0,
            )
            started.append(generation)
            # all prompts use the same versions, even if an alias moves meanwhile
            terms = [Term(part.name, part.version, weight=part.weight) for part in generation.parts]
    except NotFound as error:
        await close_all(started)
        raise ModelNotFound(str(error)) from None
    except BaseException:
        await close_all(started)
        raise
    labels = [f"these change nothing: {', '.join(body.ineffective)}"] if body.ineffective else []
    return Batch(started, services.base_name, echoed, labels)
