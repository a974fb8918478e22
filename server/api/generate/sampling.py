"""From a body's fields to the engine's: how tokens are chosen, and how many there may be."""

import secrets
from collections.abc import Mapping

from adapters.errors import FieldError, InvalidInput
from server.api.schemas import MAX_SEED, SamplingFields
from server.counted import counted
from server.engine.request import SamplingParams

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
