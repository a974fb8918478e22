"""Who wants to know which replicas there are, in this process.

A module of its own: Serve makes a copy of the router's class, and with it of what the router's module has, but not
of the modules that it imports.

The replicas as one API process knows them: which there are, what each has, and what was sent to it.

What is known may be half a second old. What this process sent since is added to it, as many times as there are API
processes: the others know the same and choose alike, so they are likely to have sent as much. If each counted only
its own requests, all would fill the same replicas at once.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from adapters.errors import InvalidInput, SmoloraError
from server.cluster.messages import Batch, ReplicaState, Welcome, block_hash
from server.cluster.rank import Part, Replica, rank
from server.engine.request import EngineStats, GenerationRequest, SequenceOutput
from server.engine.sequence import adapter_key, extend_block_keys, prefix_root
from server.errors import NotReady

Told = Callable[[frozenset[str]], None]

_watchers: list[Told] = []


def watch(told: Told) -> None:
    """Have `told` called with the ids of the replicas whenever they change."""
    _watchers.append(told)


def tell(ids: frozenset[str]) -> None:
    """These are the replicas from now on."""
    for told in _watchers:
        told(ids)


log = logging.getLogger(__name__)

_MAX_BLOCKS = 256
"""Of a prompt's beginning: what replicas are told apart by."""

COUNTERS = (
    "adapter_loads",
    "adapter_evictions",
    "prefix_cached_tokens",
    "prompt_tokens",
    "output_tokens",
    "preemptions",
    "steps",
    "drafted_tokens",
    "accepted_tokens",
)
"""The fields of `EngineStats` that only grow."""


class Counts:
    """What replicas have counted while this process knew them. Whichever come and go, it only grows."""

    def __init__(self) -> None:
        self.sums = dict.fromkeys(COUNTERS, 0)
        self.max_in_flight = 0  # the most that those which were there at once took together

    def grow(self, before: EngineStats | None, now: EngineStats) -> None:
        """A replica has told `now` what it had told `before`; None: it is new here."""
        if before is not None:
            for name in COUNTERS:
                counted, is_told = getattr(before, name), getattr(now, name)
                self.sums[name] += is_told - counted if is_told >= counted else is_told  # less: it began anew

    def note(self, links: Sequence["Link"]) -> None:
        """These are ready now."""
        told = [link.welcome.max_in_flight for link in links if link.welcome is not None]
        known = [most for most in told if most is not None]
        if len(known) == len(told):
            self.max_in_flight = max(self.max_in_flight, sum(known))


class Transport(Protocol):
    """How replicas are reached; what fails there raises an exception of whatever kind."""

    def watch(self, told: Callable[[frozenset[str]], None]) -> None:
        """Have `told` called, on the running loop, with the ids of the replicas now and whenever they change."""
        ...

    def follow(self, replica: str, client: str) -> AsyncGenerator[Welcome | Batch, None]: ...
    async def submit(self, replica: str, client: str, request: GenerationRequest) -> SmoloraError | None: ...
    async def abort(self, replica: str, client: str, request_id: str) -> None: ...
    async def close(self) -> None: ...


@dataclass(eq=False)
class Sent:
    """A request of this process that has not ended; `link` is the replica that works on it, if one does."""

    request: GenerationRequest
    put: Callable[[SequenceOutput | SmoloraError], None]
    num_unfinished: int  # choices
    link: "Link | None" = None
    is_offered: bool = False  # whether the link has yet to say that it takes it
    num_lost: int = 0  # replicas that were lost with it
    tried: set[str] = field(default_factory=set)  # replicas that have refused it, or were lost with it
    is_reported: bool = False  # whether the link's last state was told with it
    has_output: bool = False
    is_abandoned: bool = False


@dataclass(eq=False)
class Link:
    """One replica."""

    id: str
    welcome: Welcome | None = None
    counts: Counts = field(default_factory=Counts)  # of all links of this process
    counted: EngineStats | None = None  # what it told last, also once it is lost
    state: ReplicaState | None = None
    blocks: set[int] = field(default_factory=set)  # of its prefix cache, with those it was sent prompts of
    is_leaving: bool = False  # it ends once nothing of ours runs there
    is_new: bool = True  # it hasn't told of itself yet, but may
    sent: dict[str, Sent] = field(default_factory=dict)  # by the request's id
    calls: set[asyncio.Task[SmoloraError | None]] = field(default_factory=set)  # of `submit`, unanswered

    @property
    def is_ready(self) -> bool:
        """Whether it can be sent something."""
        return self.state is not None and not self.is_leaving

    @property
    def is_coming(self) -> bool:
        """Whether it is about to be ready for the first time."""
        return self.is_new and not self.is_leaving

    @property
    def num_own(self) -> int:
        """Sequences that this process has there."""
        return sum(sent.num_unfinished for sent in self.sent.values())

    @property
    def queue(self) -> int:
        """Sequences there, of all processes, those that were sent since the last report an estimate."""
        if (state := self.state) is None:
            return self.num_own
        others = max(0, state.num_in_flight - state.num_own)
        fresh = sum(sent.num_unfinished for sent in self.sent.values() if not sent.is_reported)
        return others + self.num_own + (state.num_followers - 1) * fresh

    def greet(self, welcome: Welcome, base_digest: str) -> None:
        """What it tells first. Raises ValueError where its base is another than the one of that digest."""
        is_new, self.welcome = self.welcome is None, welcome
        if welcome.base_digest != base_digest:
            if is_new:  # it will be asked again, and say the same
                log.warning(
                    "replica %s has another base than this process, and isn't used: give both the same "
                    "SMOLORA_MODEL (replicas by smolora cluster deploy)",
                    self.id,
                )
            self.is_new = False
            raise ValueError("it has another base")

    def take(self, state: ReplicaState) -> None:
        """What it has told of itself."""
        self.state, self.is_new = state, False
        self.counts.grow(self.counted, state.stats)
        self.counted = state.stats
        for sent in self.sent.values():
            sent.is_reported = not sent.is_offered
        if state.blocks is not None:
            self.blocks = set(state.blocks)


def max_num_tokens(links: Sequence[Link]) -> int | None:
    """Of a sequence that any of them can run."""
    return min((link.welcome.max_num_tokens for link in links if link.welcome is not None), default=None)


def max_in_flight(links: Sequence[Link], base_digest: str, counts: Counts) -> int | None:
    """Of all that have this base together, of as many at least as were ever there at once: one that is lost is
    replaced. None where one has yet to tell, is lost just now, or, of an older version, doesn't say.
    """
    for link in links:
        welcome = link.welcome
        if link.is_leaving or (welcome is not None and welcome.base_digest != base_digest):
            continue
        if link.state is None or welcome is None or welcome.max_in_flight is None:
            return None
    return counts.max_in_flight or None


def check_queues(links: Sequence[Link]) -> None:
    """QueueFull, Draining or NotReady where none of them would take anything now."""
    if not links:
        raise NotReady("no engine is ready", retry_after=5)
    refusals = [link.state.refusal for link in links if link.state is not None]
    told = [refusal for refusal in refusals if refusal is not None]
    if len(told) == len(refusals):
        raise min(told, key=lambda refusal: refusal.retry_after)


def check(links: Sequence[Link], request: GenerationRequest) -> None:
    """InvalidInput where no replica could ever run it."""
    welcomes = [link.welcome for link in links if link.welcome is not None]
    limit = max(welcome.max_num_tokens for welcome in welcomes)
    num_prompt, num_more = len(request.prompt_token_ids), request.sampling.max_tokens
    if not num_prompt:
        raise InvalidInput.of("prompt", "the prompt has no tokens; give at least one character")
    if num_prompt + num_more > limit:
        raise InvalidInput.of(
            "max_tokens",
            f"the prompt's {num_prompt} tokens and {num_more} more exceed {limit}; shorten the prompt or lower "
            "max_tokens",
        )
    vocab_size = welcomes[0].vocab_size
    if any(token_id >= vocab_size for token_id, _ in request.sampling.logit_bias):
        raise InvalidInput.of("logit_bias", f"a token id is not below {vocab_size}")


def best(links: Sequence[Link], sent: Sent, size_of: Callable[[str], int]) -> Link:
    """The link for the request, which is noted to have its prompt soon; those that had it before come last."""
    if len(links) == 1:
        return links[0]
    fresh = [link for link in links if link.id not in sent.tried] or links
    parts = [Part(ref.digest, size_of(ref.digest)) for ref in sent.request.adapters]
    prefix = prefix_of(links[0], sent.request)
    replicas = [Replica(link.id, resident_in(link), link.queue, link.blocks) for link in fresh]
    first, *_ = rank(parts, prefix, replicas)
    chosen = next(link for link in fresh if link.id == first)
    chosen.blocks.update(prefix)
    return chosen


def resident_in(link: Link) -> frozenset[str]:
    """The adapters that it has, and those that it is about to read for requests of this process."""
    assert link.state is not None
    coming = {ref.digest for sent in link.sent.values() for ref in sent.request.adapters}
    return link.state.stats.resident | coming


def prefix_of(link: Link, request: GenerationRequest) -> list[int]:
    """The hashes of the prompt's leading blocks, as far as they tell replicas apart."""
    assert link.welcome is not None
    keys: list[bytes] = []
    size = link.welcome.block_size
    token_ids = request.prompt_token_ids[: min(_MAX_BLOCKS * size, len(request.prompt_token_ids) - 1)]
    extend_block_keys(keys, prefix_root(adapter_key(request.adapters), request.project), token_ids, size)
    return [block_hash(key) for key in keys]


def total(links: Sequence[Link], counts: Counts) -> EngineStats:
    """Of all replicas together: sums, of digests the unions; and what was counted."""
    states = [link.state for link in links]  # once: /metrics asks from another thread
    found = [state.stats for state in states if state is not None]
    sums: dict[str, Any] = dict(counts.sums)  # by the fields' names
    for name in (of.name for of in fields(EngineStats) if of.name not in COUNTERS):
        values = [getattr(stats, name) for stats in found]
        if name in ("resident", "waiting"):
            sums[name] = frozenset[str]().union(*values)
        else:
            sums[name] = max(values, default=0) if name == "max_adapter_rank" else sum(values)
    return EngineStats(**sums)
