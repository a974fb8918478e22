"""Which tokens a sequence has, and how often each is in its answer: what penalties are computed from.

One sequence being generated: its tokens, how many are computed, what it holds, and its share of a step.

Pure state. The scheduler moves it along, the block manager fills its block table, the engine appends tokens.
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

from server.engine.adapter_pool import AdapterHold
from server.engine.guidance import Constraint
from server.engine.request import AdapterRef, GenerationRequest, Logprobs, Timing

Ints = npt.NDArray[np.int64]


class TokenCounts:
    """Counts of one sequence's tokens. A call counts only what was added since the last one."""

    def __init__(self, token_ids: Seq[int], num_prompt_tokens: int) -> None:
        """`token_ids` are a prompt and the answer so far; tokens may be appended at any time."""
        self._token_ids = token_ids
        self._num_prompt_tokens = num_prompt_tokens
        self._num_counted = 0
        self._places: dict[int, int] = {}  # of a token, in the two arrays
        self._distinct = array("q")
        self._used = array("q")

    def of(self, draft: Seq[int] = ()) -> tuple[Ints, Ints]:
        """Return the distinct tokens (n,), and how often each is in the answer (n,), which ends in `draft`."""
        for position in range(self._num_counted, len(self._token_ids)):
            place = self._places.setdefault(self._token_ids[position], len(self._distinct))
            if place == len(self._distinct):
                self._distinct.append(self._token_ids[position])
                self._used.append(0)
            self._used[place] += position >= self._num_prompt_tokens
        self._num_counted = len(self._token_ids)
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
    """Where a sequence is in its life."""

    WAITING = "waiting"  # not admitted, or preempted
    RUNNING = "running"  # holds blocks and its adapters
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """Choice `index` of a request. `token_ids` grows; `num_computed_tokens` follows, and may fall back."""

    request: GenerationRequest
    index: int
    arrival: float  # seconds of the scheduler's clock
    block_size: int
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0  # their keys and values are in the cache
    num_cached_tokens: int = 0  # of the prompt, found in the cache at the first admission
    block_table: list[int] = field(default_factory=list)
    num_registered_blocks: int = 0  # known to the prefix cache
    hold: AdapterHold | None = None
    loading: tuple[float, float] | None = None  # from when to when its adapters were awaited
    constraint: Constraint | None = None  # where it is in its grammar
    scores: dict[int, Logprobs] = field(default_factory=dict)  # of the tokens that are to be scored, by position
    status: Status = Status.WAITING
    num_lost_tokens: int = 0  # computed when it was last preempted; it isn't again before it has more
    admitted_at: float | None = None
    first_token_at: float | None = None
    _block_keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.token_counts = TokenCounts(self.token_ids, len(self.token_ids))
        self.adapter_key = adapter_key(self.request.adapters)
        self.prefix_root = prefix_root(self.adapter_key, self.request.project)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_needed_tokens(self) -> int:
        """How many tokens it needs room for to go on: its own, and the next one where it generates any."""
        return len(self.token_ids) + (self.request.scored_from is None)

    @property
    def num_sharable_tokens(self) -> int:
        """How many of the first tokens need not be computed here: not the last one, nor what scores follow."""
        scored_from = self.request.scored_from
        return len(self.token_ids) - 1 if scored_from is None else scored_from - 1

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest token is left to compute, and some were computed before it."""
        return self.num_computed_tokens > 0 and self.num_computed_tokens == len(self.token_ids) - 1

    @property
    def awaits_mask(self) -> bool:
        """Whether it sits steps out until a mask is there (`masks`)."""
        return self.constraint is not None and self.constraint.awaits_mask

    def timing(self, now: float) -> Timing:
        """Of its whole life, which ends `now`."""
        start, load = self.arrival, self.loading
        return Timing(
            queue=(now if self.admitted_at is None else self.admitted_at) - start,
            first_token=(now if self.first_token_at is None else self.first_token_at) - start,
            total=now - start,
            load=None if load is None else (load[0] - start, load[1] - start),
        )

    def full_block_keys(self) -> list[bytes]:
        """The keys of all full blocks of tokens so far, each chaining the ones before, adapters and project."""
        extend_block_keys(self._block_keys, self.prefix_root, self.token_ids, self.block_size)
        return self._block_keys


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens [start, stop) of a sequence, to be computed in a step, and a draft of those that follow.

    What the step computes is `num_tokens` tokens, the draft's after the others. A draft comes behind all that is
    known; its tokens are the sequence's once they have been drawn.
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
    def samples(self) -> bool:
        """Whether the step reaches the end of what is known, so that a next token is drawn."""
        return self.stop == len(self.sequence.token_ids)

    @property
    def num_hidden(self) -> int:
        """Of how many of its last tokens final hidden states are needed: to draw what follows, or to score it."""
        num = int(self.samples)
        if (scored_from := self.sequence.request.scored_from) is not None:
            num = max(num, self.stop - max(self.start, scored_from - 1))
        return num + len(self.draft)

    @property
    def is_decode(self) -> bool:
        """Whether it is one token behind others, a draft apart."""
        return self.stop - self.start == 1 and self.start > 0


def extend_block_keys(keys: list[bytes], root: bytes, token_ids: Seq[int], block_size: int) -> None:
    """Append the keys of the full blocks of `token_ids` that `keys` hasn't yet, each chaining the one before."""
    while (len(keys) + 1) * block_size <= len(token_ids):
        start = len(keys) * block_size
        tokens = array("q", token_ids[start : start + block_size]).tobytes()
        parent = keys[-1] if keys else root
        keys.append(hashlib.blake2b(parent + tokens, digest_size=16).digest())


def adapter_key(adapters: Seq[AdapterRef]) -> bytes:
    """What tells one set of weighted adapters from another, whatever their names."""
    parts = [f"{ref.digest}*".encode() + struct.pack("<d", ref.weight) for ref in sorted(adapters)]
    return hashlib.blake2b(b"+".join(parts), digest_size=16).digest()


def prefix_root(adapter_key: bytes, project: str) -> bytes:
    """What block keys begin with: another for each project, so that none finds another's blocks."""
    if not project:
        return adapter_key
    return hashlib.blake2b(adapter_key + project.encode(), digest_size=16, person=b"project").digest()
