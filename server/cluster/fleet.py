"""What one API process knows of the replicas: which exist, the state of each, and the requests sent to each.

A replica's last report may be half a second old. To estimate the replica's queue, the number of requests that this
process has sent to it since then is multiplied by the number of API processes, and added to the reported number.
The other processes have the same information and choose in the same way, so each has probably sent as many
requests as this one. If each process counted only its own requests, all processes would fill the same replicas at
once.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

from adapters.errors import SmoloraError
from server.cluster.messages import Batch, ReplicaState, Welcome, block_hash
from server.cluster.rank import Part, Replica, rank
from server.engine.request import EngineStats, GenerationRequest, SequenceOutput
from server.engine.sequence import adapter_key, extend_block_keys, prefix_root
from server.errors import NotReady

OnChange = Callable[[frozenset[str]], None]
"""Receives the ids of all replicas."""

_MAX_BLOCKS = 256
"""The maximum number of a prompt's leading blocks that are compared with replicas' prefix caches."""

log = logging.getLogger(__name__)


class Transport(Protocol):
    """A connection to the replicas. A call that fails may raise any exception."""

    def watch(self, on_change: OnChange) -> None:
        """Call `on_change` on the running event loop with the ids of all replicas, whenever the set changes.

        The first call is when the set becomes known.
        """
        ...

    def follow(self, replica: str, client: str) -> AsyncGenerator[Welcome | Batch, None]: ...
    async def submit(self, replica: str, client: str, request: GenerationRequest) -> SmoloraError | None: ...
    async def abort(self, replica: str, client: str, request_id: str) -> None: ...
    async def close(self) -> None: ...


@dataclass
class Seen:
    """How much of a choice has arrived."""

    num_tokens: int = 0
    num_chars: int = 0
    has_ended: bool = False


@dataclass(eq=False)
class Sent:
    """A request of this process that hasn't ended. `link` is its replica, or None while one is chosen."""

    request: GenerationRequest
    put: Callable[[SequenceOutput | SmoloraError], None]
    num_unfinished: int  # choices
    link: "Link | None" = None
    is_offered: bool = False  # the replica hasn't accepted it yet
    num_lost: int = 0  # number of replicas that were lost while they had the request
    tried: set[str] = field(default_factory=set)  # replicas that refused it, or were lost
    is_reported: bool = False  # the replica's last report includes this request
    has_output: bool = False
    is_abandoned: bool = False
    kind: str | None = None  # `Welcome.kind` of the lost replica whose answer another one continues
    is_repeated: bool = False  # another replica computes again what a lost one has sent
    seen: dict[int, Seen] = field(default_factory=dict)  # what the reader has, by choice
    computed: dict[int, Seen] = field(default_factory=dict)  # what the current replica has sent, by choice

    def repeat_on(self, kind: str | None) -> None:
        """Prepare for a replica of this kind, which computes the answer again from its beginning."""
        self.kind, self.is_repeated, self.computed = kind, True, {}

    def new_part(self, output: SequenceOutput) -> SequenceOutput | None:
        """Return what the reader doesn't have of an output, or None if it has all of it.

        Replicas of one kind send the same tokens and text, but one may send in two outputs what another sends in
        one.
        """
        computed = self.computed.setdefault(output.index, Seen())
        computed.num_tokens += output.num_new_tokens
        computed.num_chars += len(output.text)
        seen = self.seen.setdefault(output.index, Seen())
        if seen.has_ended:
            return None
        num_tokens = computed.num_tokens - seen.num_tokens
        num_chars = computed.num_chars - seen.num_chars
        if self.is_repeated:
            if num_tokens <= 0 and num_chars <= 0 and output.finish_reason is None:
                return None
            num_tokens, num_chars = max(num_tokens, 0), max(num_chars, 0)
            if num_tokens < output.num_new_tokens or num_chars < len(output.text):
                output = replace(
                    output,
                    num_new_tokens=num_tokens,
                    text=output.text[len(output.text) - num_chars :],
                    logprobs=output.logprobs[len(output.logprobs) - num_tokens :] if output.logprobs else (),
                    scores=(),
                )
        seen.num_tokens, seen.num_chars = computed.num_tokens, computed.num_chars
        seen.has_ended = output.finish_reason is not None
        return output


@dataclass(eq=False)
class Link:
    """What this process knows of one replica."""

    id: str
    welcome: Welcome | None = None
    state: ReplicaState | None = None
    blocks: set[int] = field(default_factory=set)  # in its prefix cache, or in prompts being sent to it
    is_leaving: bool = False  # Serve is stopping the replica, but its requests may finish
    is_new: bool = True  # it hasn't reported yet, but is expected to
    sent: dict[str, Sent] = field(default_factory=dict)  # by the request's id
    calls: set[asyncio.Task[SmoloraError | None]] = field(default_factory=set)  # unanswered calls of `submit`

    @property
    def is_ready(self) -> bool:
        """Return whether requests can be sent to the replica."""
        return self.state is not None and not self.is_leaving

    @property
    def is_coming(self) -> bool:
        """Return whether the replica hasn't reported yet, but is expected to."""
        return self.is_new and not self.is_leaving

    @property
    def num_own(self) -> int:
        """Return how many unfinished sequences of this process the replica has."""
        return sum(sent.num_unfinished for sent in self.sent.values())

    @property
    def queue(self) -> int:
        """Estimate the number of unfinished sequences, of all API processes, that the replica has now."""
        if (state := self.state) is None:
            return self.num_own
        others = max(0, state.num_in_flight - state.num_own)
        fresh = sum(sent.num_unfinished for sent in self.sent.values() if not sent.is_reported)
        return others + self.num_own + (state.num_followers - 1) * fresh

    def greet(self, welcome: Welcome, base_digest: str) -> None:
        """Handle the replica's first message. Raise ValueError if its base model has another digest."""
        is_new, self.welcome = self.welcome is None, welcome
        if welcome.base_digest != base_digest:
            if is_new:  # the connection is retried, with the same result: warn once
                log.warning(
                    "replica %s has another base than this process, and isn't used: give both the same "
                    "SMOLORA_MODEL (replicas by smolora cluster deploy)",
                    self.id,
                )
            self.is_new = False
            raise ValueError("it has another base")

    def take(self, state: ReplicaState) -> None:
        """Store the replica's report."""
        self.state, self.is_new = state, False
        for sent in self.sent.values():
            sent.is_reported = not sent.is_offered
        if state.blocks is not None:
            self.blocks = set(state.blocks)


def max_num_tokens(links: Sequence[Link]) -> int | None:
    """Return the length in tokens of the longest sequence that every replica can run, or None without replicas."""
    return min((link.welcome.max_num_tokens for link in links if link.welcome is not None), default=None)


def limit_of(links: Sequence[Link]) -> int:
    """Return how many unfinished sequences the ready replicas `links` allow together, or 0 if one doesn't say."""
    limits = [link.welcome.max_in_flight for link in links if link.welcome is not None]
    known = [limit for limit in limits if limit is not None]
    return sum(known) if len(known) == len(limits) else 0


def max_in_flight(links: Sequence[Link], base_digest: str, highest: int) -> int | None:
    """Return how many unfinished sequences all replicas with this base model allow together.

    `highest` is the highest `limit_of` so far, so that replicas that were lost are included: they are replaced.
    Return None if a replica hasn't reported yet, is lost at the moment, or runs an older version that doesn't
    report its limit.
    """
    for link in links:
        welcome = link.welcome
        if link.is_leaving or (welcome is not None and welcome.base_digest != base_digest):
            continue
        if link.state is None or welcome is None or welcome.max_in_flight is None:
            return None
    return highest or None


def check_queues(links: Sequence[Link]) -> None:
    """Raise QueueFull, Draining or NotReady if every replica would refuse a request now."""
    if not links:
        raise NotReady("no engine is ready", retry_after=5)
    states = [link.state for link in links if link.state is not None]
    refusals = [state.refusal for state in states if state.refusal is not None]
    if len(refusals) == len(states):
        raise min(refusals, key=lambda refusal: refusal.retry_after)


def check(links: Sequence[Link], request: GenerationRequest) -> None:
    """Raise InvalidInput if no replica could ever run the request."""
    welcomes = [link.welcome for link in links if link.welcome is not None]
    request.check(max(welcome.max_num_tokens for welcome in welcomes), welcomes[0].vocab_size)


def best(links: Sequence[Link], sent: Sent, size_of: Callable[[str], int]) -> Link:
    """Return the best replica for the request, and record that its cache will have the prompt's blocks.

    Replicas that this request hasn't tried yet are preferred.
    """
    if len(links) == 1:
        return links[0]
    fresh = [link for link in links if link.id not in sent.tried] or links
    parts = [Part(ref.digest, size_of(ref.digest)) for ref in sent.request.adapters]
    digests = frozenset(part.digest for part in parts)
    prefix = prefix_of(links[0], sent.request)
    replicas = [Replica(link.id, resident_in(link, digests), link.queue, link.blocks) for link in fresh]
    first, *_ = rank(parts, prefix, replicas)
    chosen = next(link for link in fresh if link.id == first)
    chosen.blocks.update(prefix)
    return chosen


def resident_in(link: Link, digests: frozenset[str]) -> frozenset[str]:
    """Return which of these adapters a replica has loaded, or will load for requests of this process.

    The time doesn't depend on how many others it has loaded.
    """
    assert link.state is not None
    resident = digests & link.state.stats.resident
    if resident == digests:
        return resident
    coming = (ref.digest for sent in link.sent.values() for ref in sent.request.adapters)
    return resident | digests.intersection(coming)


def prefix_of(link: Link, request: GenerationRequest) -> list[int]:
    """Return the hashes of the prompt's leading full blocks, at most `_MAX_BLOCKS`."""
    assert link.welcome is not None
    keys: list[bytes] = []
    size = link.welcome.block_size
    token_ids = request.prompt_token_ids[: min(_MAX_BLOCKS * size, len(request.prompt_token_ids) - 1)]
    extend_block_keys(keys, prefix_root(adapter_key(request.adapters), request.project), token_ids, size)
    return [block_hash(key) for key in keys]


def stats_by_replica(links: Sequence[Link], *, is_complete: bool) -> dict[str, EngineStats]:
    """Return the statistics of the replicas, by id, for which this process is the reporter, or of all replicas."""
    states = [(link.id, link.state) for link in links]  # read once: /metrics calls from another thread
    return {
        name: state.stats for name, state in states if state is not None and (is_complete or state.is_reporter)
    }


def total(links: Sequence[Link]) -> EngineStats:
    """Return the statistics of all replicas together.

    Numbers are added up, except that `max_adapter_rank` is the maximum. Sets are united.
    """
    found = list(stats_by_replica(links, is_complete=True).values())
    sums: dict[str, Any] = {}  # by the fields' names
    for name in (of.name for of in fields(EngineStats)):
        values = [getattr(stats, name) for stats in found]
        if isinstance(getattr(EngineStats, name), frozenset):
            sums[name] = frozenset[str]().union(*values)
        else:
            sums[name] = max(values, default=0) if name == "max_adapter_rank" else sum(values)
    return EngineStats(**sums)
