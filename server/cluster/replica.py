"""An engine replica, which Ray Serve runs: one engine for many API processes.

An API process subscribes with one long call of `follow`, which yields the outputs of all its requests: one message
for each step instead of one for each token. The process sends requests by short calls of `submit`. If `follow`
ends for any reason (the API process was killed, the connection is lost), all requests of the process are aborted.

Serve calls `check_health` and `record_autoscaling_stats`. Before Serve stops a replica, it notifies the API
processes. They send no new requests, and end `follow` when none of their requests runs on the replica.
"""

import asyncio
import math
import platform
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import torch
from anyio import to_thread

from adapters.errors import SmoloraError
from server.cluster.messages import Batch, Outbox, ReplicaState, Welcome, block_hash
from server.engine.async_engine import AsyncEngine
from server.engine.guidance import Guidance
from server.engine.request import GenerationRequest, SequenceOutput
from server.errors import EngineDead, NotReady, TryAgain

STATE_SECONDS = 0.05
"""The shortest time between two `ReplicaState`s that are sent to the same API process."""
PULSE_SECONDS = 0.5
"""The longest time between two messages to the same API process."""
_BLOCKS_SECONDS = 1.0  # between two reads of the prefix cache's keys


def kind_of(backends: frozenset[str]) -> str:
    """Return a hash of what decides the last bits of an answer: processor, GPU, threads and code that computes."""
    features = ""
    with suppress(OSError):  # not on Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    found = (platform.machine(), sorted(features.split()), gpu, torch.get_num_threads(), torch.__version__)
    return blake2b(repr((found, sorted(backends))).encode(), digest_size=8).hexdigest()


@dataclass
class _Follower:
    """An API process that has subscribed to the replica's outputs."""

    outbox: Outbox = field(default_factory=Outbox)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    requests: dict[str, int] = field(default_factory=dict)  # choices that haven't ended, by the request's id
    state_sent_at: float = -math.inf
    blocks: frozenset[int] = frozenset()  # the blocks in its last state
    is_over: bool = False


class EngineReplica:
    """An engine, and the API processes that have subscribed to its outputs. Use it on one event loop."""

    def __init__(
        self,
        engine: AsyncEngine,
        guidance: Guidance,
        base_digest: str,
        vocab_size: int,
        busy: Callable[[int], None] = lambda num_running: None,
        kind: str | None = None,
    ) -> None:
        """Start the engine on the running event loop.

        `busy` is called with the number of sequences in flight at least every PULSE_SECONDS. `kind` is as in
        `Welcome`; None: this machine's kind.
        """
        self._engine = engine
        self._guidance = guidance
        self._busy = busy
        self._welcome = Welcome(
            base_digest,
            engine.max_num_tokens,
            vocab_size,
            engine.config.block_size,
            engine.max_in_flight,
            kind or kind_of(engine.stats.backends),
        )
        self._followers: dict[str, _Follower] = {}
        self._blocks: frozenset[int] = frozenset()
        self._blocks_at = -math.inf
        engine.start()
        guidance.start()
        self._pulse = asyncio.get_running_loop().create_task(self._beat())

    async def follow(self, client: str) -> AsyncGenerator[Welcome | Batch, None]:
        """Yield messages about the client's requests until the iterator is closed or the engine is dead.

        At the end, abort the client's requests.
        """
        if (former := self._followers.pop(client, None)) is not None:
            self._end(former)
        follower = self._followers[client] = _Follower()
        try:
            yield self._welcome
            while not (self._engine.dead or follower.is_over):
                yield follower.outbox.take(self._state(follower))
                await follower.news.wait()
                follower.news.clear()
            yield follower.outbox.take(None)
        finally:
            if self._followers.get(client) is follower:
                del self._followers[client]
            self._end(follower)

    async def submit(self, client: str, request: GenerationRequest) -> SmoloraError | None:
        """Queue a request from a client that is subscribed by `follow`.

        Return an error if the request is refused, or None if it is accepted.
        """
        try:
            if request.grammar is not None:
                await to_thread.run_sync(self._guidance.check, request.grammar)
            follower = self._followers.get(client)
            if follower is None:
                raise NotReady("nobody follows")
            self._engine.check_queue(request.n, request.project)
            self._engine.submit_to(request, lambda output: self._put(follower, request.request_id, output))
            follower.requests[request.request_id] = request.n
            self._busy(self._engine.num_in_flight)
        except SmoloraError as error:
            return error
        return None

    async def abort(self, client: str, request_id: str) -> None:
        """Abort a request at the engine's next step. This is a no-op if the request has ended."""
        follower = self._followers.get(client)
        if follower is not None and follower.requests.pop(request_id, None) is not None:
            self._engine.abandon(request_id)

    async def check_health(self) -> None:
        """Raise EngineDead if the engine has failed or hangs, so that Serve replaces this process."""
        if self._engine.dead:
            raise EngineDead

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the metrics for autoscaling: sequences in flight, and the share of KV cache blocks in use."""
        stats = self._engine.stats
        used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        return {"in_flight": float(self._engine.num_in_flight), "kv_used": used}

    async def stop(self) -> None:
        """Stop the engine and all requests."""
        self._pulse.cancel()
        self._engine.drain()
        await self._engine.stop()
        for follower in self._followers.values():
            self._end(follower)
        await to_thread.run_sync(self._guidance.close)

    def _put(self, follower: _Follower, request_id: str, output: SequenceOutput | SmoloraError) -> None:
        if isinstance(output, SmoloraError):
            follower.outbox.failures.append((request_id, output))
            follower.requests.pop(request_id, None)
        else:
            follower.outbox.outputs.append(output)
            if output.finish_reason is not None:
                left = follower.requests[request_id] = follower.requests[request_id] - 1
                if not left:
                    del follower.requests[request_id]
        follower.news.set()

    def _end(self, follower: _Follower) -> None:
        follower.is_over = True
        follower.news.set()
        for request_id in follower.requests:
            self._engine.abandon(request_id)
        follower.requests = {}

    def _state(self, follower: _Follower) -> ReplicaState | None:
        """Return the engine's state, or None if the follower got a state less than STATE_SECONDS ago."""
        now = time.monotonic()
        if now - follower.state_sent_at < STATE_SECONDS:
            return None
        follower.state_sent_at = now
        self._look_at_blocks(now)
        blocks = None
        if follower.blocks is not self._blocks:
            follower.blocks = self._blocks
            blocks = tuple(self._blocks)
        refusal = None
        try:
            self._engine.check_queue(1)
        except TryAgain as error:
            refusal = error
        num_own = sum(follower.requests.values())
        return ReplicaState(
            *(self._engine.stats, self._engine.num_in_flight, num_own, refusal, blocks),
            num_followers=len(self._followers),
            is_reporter=next(iter(self._followers.values()), follower) is follower,  # the oldest subscription
        )

    def _look_at_blocks(self, now: float) -> None:
        if now - self._blocks_at >= _BLOCKS_SECONDS:
            self._blocks_at = now
            found = frozenset(map(block_hash, self._engine.cached_blocks()))
            if found != self._blocks:
                self._blocks = found

    async def _beat(self) -> None:
        """Wake all calls of `follow` regularly, to report that the replica is alive or that the engine is dead."""
        while True:
            await asyncio.sleep(PULSE_SECONDS)
            self._busy(self._engine.num_in_flight)
            for follower in self._followers.values():
                follower.news.set()
