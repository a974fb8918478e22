"""The state of one sequence that is being generated, and its part of a step.

The scheduler changes the status, the block manager fills the block table, and the engine appends tokens.
"""

import hashlib
import struct
from array import array
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from adapters.lora import AdapterRef
from server.engine.adapter_pool import AdapterHold
from server.engine.continuations import TokenTrie
from server.engine.guidance import Constraint
from server.engine.request import GenerationRequest, Logprobs, Timing

Ints = npt.NDArray[np.int64]


class TokenCounts:
    """The distinct tokens of one sequence and their counts, for penalties.

    Each call of `of` counts only the tokens that were added since the last call.
    """

    def __init__(self, token_ids: Seq[int], num_prompt_tokens: int) -> None:
        """`token_ids` are a prompt and its answer so far. Tokens may be appended to the list at any time."""
        self._token_ids = token_ids
        self._num_prompt_tokens = num_prompt_tokens
        self._num_seen = 0
        self._places: dict[int, int] = {}  # index of a token in the two arrays
        self._distinct = array("q")
        self._used = array("q")

    def of(self, draft: Seq[int] = ()) -> tuple[Ints, Ints]:
        """Return the distinct tokens (n,) and their counts in the answer (n,), as if `draft` were part of it."""
        for position in range(self._num_seen, len(self._token_ids)):
            place = self._places.setdefault(self._token_ids[position], len(self._distinct))
            if place == len(self._distinct):
                self._distinct.append(self._token_ids[position])
                self._used.append(0)
            self._used[place] += position >= self._num_prompt_tokens
        self._num_seen = len(self._token_ids)
        distinct, used = np.array(self._distinct, np.int64), np.array(self._used, np.int64)
        new: Counter[int] = Counter()
        for token_id in draft:
            if (known := self._places.get(token_id)) is not None:
                used[known] += 1
            else:
                new[token_id] += 1
        if new:
            distinct = np.append(distinct, list(new))
            used = np.append(used, list(new.values()))
        return distinct, used


class Status(Enum):
    """The status of a sequence."""

    WAITING = "waiting"  # not admitted yet, or preempted
    RUNNING = "running"  # has blocks, and its adapters are resident
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """One of the `n` sequences of a request. A preemption resets `num_computed_tokens` to 0."""

    request: GenerationRequest
    index: int
    arrival: float  # seconds of the scheduler's clock
    block_size: int
    token_ids: list[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    draws: bool = field(init=False)  # whether tokens are drawn; if not, the request only scores tokens
    num_computed_tokens: int = 0  # tokens whose keys and values are in the cache
    num_cached_tokens: int = 0  # prompt tokens that were in the cache at the first admission
    block_table: "array[int]" = field(default_factory=lambda: array("i"))
    num_registered_blocks: int = 0  # blocks that are registered in the prefix cache
    hold: AdapterHold | None = None
    loading: tuple[float, float] | None = None  # when the wait for its adapters began and ended
    constraint: Constraint | None = None  # the sequence's state in its grammar
    trie: TokenTrie | None = field(init=False)  # if the request has continuations
    scores: dict[int, Logprobs] = field(default_factory=dict)  # scores of tokens, by position
    end_token_ids: frozenset[int] = frozenset()  # tokens that end the sequence
    end_mask: npt.NDArray[np.bool_] | None = None  # (vocab,) True for `end_token_ids`; set with `min_tokens`
    status: Status = Status.WAITING
    num_lost_tokens: int = 0  # most computed tokens at a preemption; no project preempts it before it has more
    admitted_at: float | None = None
    first_token_at: float | None = None
    _block_keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        continuations = self.request.continuations
        self.trie = TokenTrie(continuations) if continuations else None
        self.token_ids = [*self.request.prompt_token_ids, *(self.trie.path if self.trie else ())]
        self.num_prompt_tokens = len(self.request.prompt_token_ids)
        self.draws = self.trie is None and self.request.sampling.max_tokens > 0
        self.token_counts = TokenCounts(self.token_ids, len(self.token_ids))
        self.adapter_key = adapter_key(self.request.adapters)
        self.prefix_root = prefix_root(self.adapter_key, self.request.project)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """The number of drawn tokens, or of scored tokens if the request has continuations."""
        if self.trie is not None:
            return self.trie.num_tokens
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_lasting_tokens(self) -> int:
        """The number of tokens, from the first on, that no other tokens will replace."""
        return len(self.token_ids) if self.trie is None else self.num_prompt_tokens

    @property
    def num_needed_tokens(self) -> int:
        """The number of tokens that need blocks: the sequence's, and the next one if it is to be drawn."""
        if self.trie is not None:
            return self.num_prompt_tokens + self.trie.max_length
        return len(self.token_ids) + self.draws

    @property
    def scored_from(self) -> int | None:
        """The position of the first token to score, or None if none is left to score.

        The scores are returned with the first generated token, so they aren't computed again after it.
        """
        scored_from = self.request.scored_from
        return None if scored_from is None or (self.draws and self.num_output_tokens) else scored_from

    @property
    def num_sharable_tokens(self) -> int:
        """The number of tokens, from the first on, for which the sequence may use cached blocks.

        The other tokens must be computed, since their hidden states are needed. The other tokens are the last
        token or, if tokens are to be scored, the token before the first scored token and all tokens after it.
        """
        scored_from = self.scored_from
        return len(self.token_ids) - 1 if scored_from is None else scored_from - 1

    @property
    def is_decoding(self) -> bool:
        """Whether all tokens except the newest one are computed."""
        return self.num_computed_tokens > 0 and self.num_computed_tokens == len(self.token_ids) - 1

    @property
    def awaits_mask(self) -> bool:
        """Whether the sequence skips steps until the mask thread (`masks`) has computed a mask."""
        return self.constraint is not None and self.constraint.awaits_mask

    def targets(self, position: int) -> Seq[int]:
        """Return the tokens to score at a position, which is at least the request's `scored_from`."""
        if self.trie is not None:
            return self.trie.targets(position - self.num_prompt_tokens)
        return self.token_ids[position : position + 1]

    def record(self, position: int, scores: Seq[Logprobs]) -> None:
        """Store the scores of `targets(position)`."""
        if self.trie is not None:
            self.trie.record(position - self.num_prompt_tokens, [score.chosen for score in scores])
        else:
            (self.scores[position],) = scores

    def advance(self) -> bool:
        """Replace the tokens after the prompt by the next path of the trie. Return False if all are computed."""
        if self.trie is None or (num_shared := self.trie.advance()) is None:
            return False
        self.num_computed_tokens = self.num_prompt_tokens + num_shared
        self.token_ids[self.num_prompt_tokens :] = self.trie.path
        return True

    def early_ends(self) -> npt.NDArray[np.bool_] | None:
        """Return the mask (vocab,) of the tokens that may not come before `min_tokens` tokens."""
        return self.end_mask

    def timing(self, now: float) -> Timing:
        """Return the timing of a sequence that ends at `now`."""
        start, load = self.arrival, self.loading
        return Timing(
            queue=(now if self.admitted_at is None else self.admitted_at) - start,
            first_token=(now if self.first_token_at is None else self.first_token_at) - start,
            total=now - start,
            load=None if load is None else (load[0] - start, load[1] - start),
        )

    def full_block_keys(self) -> list[bytes]:
        """Return the keys of all full blocks.

        A key depends on the block's tokens, all tokens before the block, the adapters and the project.
        """
        extend_block_keys(self._block_keys, self.prefix_root, self.token_ids, self.block_size)
        return self._block_keys


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens [start, stop) of a sequence that a step computes, and a draft of the tokens that follow.

    A step computes `num_tokens` tokens: the chunk's, then the draft's. Only a chunk that reaches the sequence's
    end has a draft. Drafted tokens are added to the sequence when they have been drawn.
    """

    sequence: Sequence
    start: int
    stop: int
    draft: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start + len(self.draft)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (*self.sequence.token_ids[self.start : self.stop], *self.draft)

    @property
    def is_last(self) -> bool:
        """Whether the chunk reaches the sequence's end."""
        return self.stop == len(self.sequence.token_ids)

    @property
    def samples(self) -> bool:
        """Whether the step draws a token after the chunk."""
        return self.is_last and self.sequence.draws

    @property
    def num_hidden(self) -> int:
        """The number of last tokens, drafts included, whose hidden states are needed to draw or score tokens."""
        num = int(self.samples)
        if (scored_from := self.sequence.scored_from) is not None:
            num = max(num, self.stop - max(self.start, scored_from - 1))
        return num + len(self.draft)

    @property
    def is_decode(self) -> bool:
        """Whether the chunk without its draft is a single token, other than the sequence's first."""
        return self.stop - self.start == 1 and self.start > 0


def extend_block_keys(keys: list[bytes], root: bytes, token_ids: Seq[int], block_size: int) -> None:
    """Append the missing keys of the full blocks of `token_ids` to `keys`.

    A key is a hash of the key before it and of the block's tokens. The first key is computed from `root`.
    """
    while (len(keys) + 1) * block_size <= len(token_ids):
        start = len(keys) * block_size
        tokens = array("q", token_ids[start : start + block_size]).tobytes()
        parent = keys[-1] if keys else root
        keys.append(hashlib.blake2b(parent + tokens, digest_size=16).digest())


def adapter_key(adapters: Seq[AdapterRef]) -> bytes:
    """Return a key that identifies a set of weighted adapters."""
    parts = [f"{ref.digest}*".encode() + struct.pack("<d", ref.weight) for ref in sorted(adapters)]
    return hashlib.blake2b(b"+".join(parts), digest_size=16).digest()


def prefix_root(adapter_key: bytes, project: str) -> bytes:
    """Return the key before the first one in a chain of block keys.

    The result differs for each project, so projects share no blocks.
    """
    if not project:
        return adapter_key
    return hashlib.blake2b(adapter_key + project.encode(), digest_size=16, person=b"project").digest()
