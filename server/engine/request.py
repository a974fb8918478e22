"""What goes into the engine and what comes out: frozen, picklable, without names or paths.

The engine could live in a process of its own; nothing here refers to its memory.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from adapters.errors import SmoloraError
from adapters.lora import AdapterRef

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Bounds are checked at the API's edge; `seed` is always set by then."""

    max_tokens: int = 64
    temperature: float = 0.7  # 0: greedy
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    presence_penalty: float = 0.0  # off a token's logit once it is in the answer; 0: off
    frequency_penalty: float = 0.0  # off a token's logit for each time that it is in the answer; 0: off
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit), each id once
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int = 0  # 0: none; k: the chosen token's and the k likeliest
    ignore_eos: bool = False
    speculates: bool = True  # whether tokens may be drafted, which changes none

    @cached_property
    def penalizes(self) -> bool:
        """Whether a penalty applies before a token is chosen."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @cached_property
    def changes_logits(self) -> bool:
        """Whether a penalty or a bias applies before a token is chosen."""
        return bool(self.penalizes or self.logit_bias)


@dataclass(frozen=True)
class Grammar:
    """What an answer must match: the text of a JSON schema, or a regular expression for the whole answer.

    `server.engine.guidance.Guidance.check` has passed it before it comes to the engine.
    """

    kind: Literal["json_schema", "regex"]
    source: str


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt under one set of adapters; `n` sequences are generated from it.

    `adapters` is canonical: one entry for each digest, no zero weights, sorted. Empty: the frozen base.
    `grammar` ends an answer by itself, so stop strings and `ignore_eos` don't go with it.
    `scored_from`: generate nothing, but tell the log-probabilities of the prompt's tokens from this place (at
    least 1) on; of `sampling` only `logprobs` has an effect, `max_tokens` must be 0, and `n` is 1.
    `project`, of which nothing is known here but whether two are the same: it takes turns with the others, and
    nobody else finds what it has left in the prefix cache.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapters: tuple[AdapterRef, ...] = ()
    n: int = 1
    grammar: Grammar | None = None
    scored_from: int | None = None
    project: str = ""


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities (nats) before temperature and penalties: of the chosen token, and the likeliest."""

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
    """The chosen token's log-probability and those of the likeliest ones, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Timing:
    """Seconds since the request was handed to the engine."""

    queue: float
    first_token: float
    total: float
    load: tuple[float, float] | None = None  # from the first look at adapters that were cold to their being there


@dataclass(frozen=True)
class SequenceOutput:
    """News of one choice of one request after one step: a piece of text, and perhaps its end.

    `text` holds whole characters only and never a stop string or a special token; it may be empty.
    `num_output_tokens` and `num_cached_tokens` are totals so far. `timing` is set with `finish_reason`.
    """

    request_id: str
    index: int
    text: str
    num_new_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    logprobs: tuple[SampledLogprob, ...] = ()
    scores: tuple[float, ...] = ()
    """Of a request with `scored_from`, with its `finish_reason` ("length"): nats; `logprobs` has more."""
    finish_reason: FinishReason | None = None
    error: SmoloraError | None = None  # why an "abort" happened
    timing: Timing | None = None


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for /metrics and /ready. Counters only grow."""

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0  # those that a request refers to
    adapters_resident: int = 0
    adapter_rows_total: int = 0
    adapter_rows_used: int = 0
    max_adapter_rank: int = 0  # of one adapter on all linear modules that would take all rows
    adapter_loads: int = 0
    adapter_evictions: int = 0
    prefix_cached_tokens: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of the drafted ones
    resident: frozenset[str] = frozenset()  # digests
    waiting: frozenset[str] = frozenset()  # digests that requests wait with, of some where very many do
