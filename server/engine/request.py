"""The engine's requests and outputs: frozen, picklable, and without names or paths.

They don't refer to the engine's memory, so the engine can run in another process.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from adapters.errors import InvalidInput, SmoloraError
from adapters.lora import AdapterRef

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """The parameters by which tokens are chosen. The API checks the bounds and always sets `seed`."""

    max_tokens: int = 64  # 0: nothing is generated
    min_tokens: int = 0  # an answer doesn't end by an end token or a stop string before it has these
    temperature: float = 0.7  # 0: greedy
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    presence_penalty: float = 0.0  # subtracted from the logit of each token in the answer; 0: off
    frequency_penalty: float = 0.0  # subtracted once for each occurrence in the answer; 0: off
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, number added to its logit), each id once
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # more end tokens; their text is part of the answer
    logprobs: int = 0  # 0: none; k: those of the chosen token and of the k likeliest tokens
    ignore_eos: bool = False
    speculates: bool = True  # whether tokens may be drafted; drafts don't change the answer

    @cached_property
    def penalizes(self) -> bool:
        """Whether a penalty changes logits."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @cached_property
    def changes_logits(self) -> bool:
        """Whether a penalty or a bias changes logits."""
        return bool(self.penalizes or self.logit_bias)


@dataclass(frozen=True)
class Grammar:
    """A JSON schema, or a regular expression for the whole answer, that an answer must match.

    The engine takes only grammars that `server.engine.guidance.Guidance.check` has accepted.
    """

    kind: Literal["json_schema", "regex"]
    source: str


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt under one set of adapters, from which `n` sequences are generated.

    `adapters` is canonical: sorted, one entry for each digest, no zero weights. An empty set is the frozen base.
    `grammar` ends an answer by itself, so it can't be combined with `stop`, `stop_token_ids`, `min_tokens` or
    `ignore_eos`. With `scored_from` the prompt's tokens from this position (at least 1) on are scored, and `n`
    must be 1. With `max_tokens` 0, nothing is generated, and of `sampling` only `logprobs` has an effect.
    With `continuations`, each of these, of at least one token, is scored as if it alone followed the prompt. Then
    `scored_from` must be the prompt's length, and `sampling` has no effect.
    `project` identifies the project that sent the request. Projects share engine time equally, and no project
    finds another's blocks in the prefix cache.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapters: tuple[AdapterRef, ...] = ()
    n: int = 1
    grammar: Grammar | None = None
    scored_from: int | None = None
    project: str = ""
    continuations: tuple[tuple[int, ...], ...] = ()

    def check(self, max_num_tokens: int, vocab_size: int) -> None:
        """Raise InvalidInput if no engine with these limits can run the request."""
        num_prompt, num_more = len(self.prompt_token_ids), self.sampling.max_tokens
        num_more += max((len(one) - 1 for one in self.continuations), default=0)
        if not num_prompt:
            raise InvalidInput.of("prompt", "the prompt has no tokens; give at least one character")
        if num_prompt + num_more > max_num_tokens:
            raise InvalidInput.of(
                "max_tokens",
                f"the prompt's {num_prompt} tokens and {num_more} more exceed {max_num_tokens}; shorten the "
                "prompt or lower max_tokens",
            )
        biased = [token_id for token_id, _ in self.sampling.logit_bias]
        for name, token_ids in (("logit_bias", biased), ("stop_token_ids", self.sampling.stop_token_ids)):
            if any(token_id >= vocab_size for token_id in token_ids):
                raise InvalidInput.of(name, f"a token id is not below {vocab_size}")


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities (nats) of the chosen token and the likeliest tokens, before temperature and penalties."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), best first


class TokenLogprob(NamedTuple):
    """A token and its log-probability under the model, before temperature and penalties (nats)."""

    token_id: int
    text: str
    bytes: tuple[int, ...]
    logprob: float


@dataclass(frozen=True)
class SampledLogprob:
    """`Logprobs` with the text and bytes of each token."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Timing:
    """Seconds since the request was handed to the engine."""

    queue: float
    first_token: float
    total: float
    load: tuple[float, float] | None = None  # start and end of the wait for cold adapters; None if there was none


@dataclass(frozen=True)
class SequenceOutput:
    """The output of one step for one choice of a request: a piece of text, and possibly the end of the choice.

    `text` may be empty. It holds whole characters only, and never a stop string or a special token.
    `num_output_tokens` and `num_cached_tokens` are totals so far. `timing` is set with `finish_reason`.
    The first output of a request with `scored_from` has the `scores` (nats) of the scored tokens. If
    log-probabilities are asked for, its `logprobs` are those of the scored tokens, and then of the new token.
    """

    request_id: str
    index: int
    text: str
    num_new_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    logprobs: tuple[SampledLogprob, ...] = ()
    scores: tuple[float, ...] = ()
    """Log-probabilities (nats) of the scored tokens, or of the continuations."""
    finish_reason: FinishReason | None = None
    error: SmoloraError | None = None  # the reason for an "abort"
    timing: Timing | None = None


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for /metrics and /ready. Counters never decrease."""

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0  # blocks that a running sequence refers to
    adapters_resident: int = 0
    adapter_rows_total: int = 0
    adapter_rows_used: int = 0
    max_adapter_rank: int = 0  # the rank of an adapter on all linear modules that would take all rows
    adapter_loads: int = 0
    adapter_evictions: int = 0
    prefix_cached_tokens: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # drafted tokens that were then drawn
    resident: frozenset[str] = frozenset()  # digests
    waiting: frozenset[str] = frozenset()  # digests of adapters of waiting requests; a sample if there are many
    backends: frozenset[str] = frozenset()  # one name for each kind of backend
    fallbacks: frozenset[str] = frozenset()  # what `Backend.fallbacks` has
