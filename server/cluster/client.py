"""All engine replicas as one `EngineClient`, which an API process in a cluster uses instead of an engine.

All of this runs on one event loop. A request goes to the best replica that accepts it (`fleet.best`). If a
replica is lost, its requests are retried once on another replica, with the same seed and thus the same answer. If
a request has had outputs, only a replica on the same kind of processor is used, since it computes equal bits. The
outputs that have arrived already are skipped. While there is no such replica, or while it is too busy, accepted
requests wait, but not longer than _PATIENCE_SECONDS.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from functools import partial

from adapters.errors import SmoloraError
from server.cluster import fleet
from server.cluster.fleet import Link, Sent, Transport
from server.cluster.messages import Batch
from server.engine.async_engine import OutputStream
from server.engine.request import EngineStats, GenerationRequest, SequenceOutput
from server.errors import Draining, EngineDead, TryAgain

log = logging.getLogger(__name__)

SILENCE_SECONDS = 15.0  # a replica without a message for this long counts as lost; it sends one every 0.5 s
_PATIENCE_SECONDS = 30.0  # that a request waits if there is no replica
_RETRY_SECONDS = 0.5  # between attempts to subscribe to a replica that Serve lists
_MAX_LOST = 1


def can_run(link: Link, sent: Sent) -> bool:
    """Return whether the replica would give the request's answer to the same bits as the replica that was lost."""
    return sent.kind is None or (link.welcome is not None and link.welcome.kind == sent.kind)


class ReplicatedEngine:
    """The engines of all replicas as one engine. Use `start`, `submit` and the streams on one event loop."""

    def __init__(self, transport: Transport, base_digest: str, size_of: Callable[[str], int]) -> None:
        """Use only replicas whose base model has this digest. `size_of(digest)` is an adapter's size in bytes."""
        self._transport = transport
        self._base_digest = base_digest
        self._size_of = size_of
        self._client = uuid.uuid4().hex
        self._links: dict[str, Link] = {}
        self._max_in_flight = 0  # the most unfinished sequences that ready replicas ever allowed together
        self._followers: dict[str, asyncio.Task[None]] = {}  # a task for each link
        self._tasks: set[asyncio.Task[None]] = set()
        self._sent: dict[str, Sent] = {}
        self._is_draining = False
        self._is_stopped = False
        self._changed = asyncio.Condition()  # notified when a link becomes ready

    @property
    def ready(self) -> bool:
        """Return whether a request sent now would be accepted and processed."""
        return bool(self._ready_links()) and not (self._is_draining or self._is_stopped)

    @property
    def draining(self) -> bool:
        """Return whether all new requests are refused, because this process is about to exit."""
        return self._is_draining

    @property
    def dead(self) -> bool:
        """Return False: replicas that die are replaced, and this process waits for the new ones."""
        return False

    @property
    def hung(self) -> bool:
        """Return False: this process has no engine thread that could hang."""
        return False

    @property
    def num_in_flight(self) -> int:
        """Return the number of this process's unfinished sequences."""
        return sum(sent.num_unfinished for sent in self._sent.values())

    @property
    def max_in_flight(self) -> int | None:
        """Return how many unfinished sequences all replicas together allow, including replicas that were lost.

        Return None if this number is unknown.
        """
        return fleet.max_in_flight(list(self._links.values()), self._base_digest, self._max_in_flight)

    @property
    def max_num_tokens(self) -> int | None:
        """Return the most tokens of a sequence that every replica can run, or None if there is no replica."""
        return fleet.max_num_tokens(self._ready_links())

    @property
    def stats(self) -> EngineStats:
        """Return the statistics of all replicas together. Its counters fall if a replica is lost."""
        return fleet.total(list(self._links.values()))

    def stats_by_replica(self, *, is_complete: bool) -> Mapping[str, EngineStats]:
        """Return each replica's statistics, by the replica's id.

        Each replica has one reporter among the API processes, so that its metrics are counted once. Unless
        `is_complete` is true, the result has only the replicas for which this process is the reporter.
        """
        return fleet.stats_by_replica(list(self._links.values()), is_complete=is_complete)

    def start(self) -> None:
        """Find the replicas, and subscribe to their outputs. Call it once, on the event loop."""
        self._transport.watch(self._update_replicas)

    async def stop(self) -> None:
        """Fail all requests, and close the connections."""
        self._is_stopped = True
        for sent in list(self._sent.values()):
            self._finish(sent, Draining())
        tasks = [*self._tasks, *self._followers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._transport.close()

    def drain(self) -> None:
        """Refuse new requests. Requests in flight continue."""
        self._is_draining = True

    def check_queue(self, num_sequences: int, project: str = "") -> None:
        """Raise QueueFull, Draining or NotReady if every replica would refuse a request now."""
        if self._is_draining or self._is_stopped:
            raise Draining
        fleet.check_queues(self._ready_links())

    def submit(self, request: GenerationRequest) -> OutputStream:
        """Send a request, and return the stream of its outputs.

        Raise QueueFull, Draining, NotReady or InvalidInput if it is refused at once. If the replicas refuse it
        later, the stream raises their error.
        """
        self.check_queue(request.n, request.project)
        fleet.check(self._ready_links(), request)
        stream = OutputStream(request.n, partial(self._abandon, request.request_id))
        sent = self._sent[request.request_id] = Sent(request, stream.put, request.n)
        self._spawn(self._send(sent))
        return stream

    def _ready_links(self) -> list[Link]:
        """Return the replicas to which requests may be sent, without those that are being stopped.

        But if all replicas are being stopped and their successors haven't reported yet, return all of them.
        """
        links = list(self._links.values())
        ready = [link for link in links if link.is_ready]
        return ready or [link for link in links if link.state and any(other.is_coming for other in links)]

    async def _send(self, sent: Sent) -> None:
        """Offer the request to replicas until one accepts it. If all refuse it, end it with the last error."""
        refused: set[str] = set()
        error: SmoloraError = EngineDead()
        until = asyncio.get_running_loop().time() + _PATIENCE_SECONDS

        def usable() -> list[Link]:
            return [link for link in self._ready_links() if can_run(link, sent)]

        try:
            while not sent.is_abandoned:
                if not usable():
                    async with asyncio.timeout(_PATIENCE_SECONDS), self._changed:
                        await self._changed.wait_for(usable)
                links = [link for link in usable() if link.id not in refused]
                if not links:
                    if not sent.num_lost or asyncio.get_running_loop().time() > until:
                        break
                    refused.clear()  # it was accepted once: the replicas that remain are busy for a moment
                    await asyncio.sleep(_RETRY_SECONDS)
                    continue
                link = fleet.best(links, sent, self._size_of)
                answer = await self._offer(sent, link)
                if answer is None:
                    return
                error = answer
                refused.add(link.id)
                if not isinstance(error, TryAgain):
                    break
        except TimeoutError:
            log.warning("no replica became ready within %.0f s", _PATIENCE_SECONDS)
        self._finish(sent, error)

    async def _offer(self, sent: Sent, link: Link) -> SmoloraError | None:
        """Offer the request to a replica. Return its refusal, or None if it accepted the request or was lost.

        If the replica was lost, `_fail` handles that.
        """
        request = sent.request
        sent.tried.add(link.id)
        sent.link, sent.is_offered, sent.is_reported = link, True, False
        link.sent[request.request_id] = sent
        call = asyncio.create_task(self._transport.submit(link.id, self._client, request))
        link.calls.add(call)
        try:
            await asyncio.wait({call})
        finally:
            call.cancel()
            link.calls.discard(call)
        if call.cancelled():  # the link was lost
            return None
        if (failure := call.exception()) is not None:
            log.warning("replica %s didn't answer: %s", link.id, failure)
            if sent.link is link:
                self._abort(link, request.request_id)  # the replica may have accepted it
                self._fail(sent, EngineDead())
            return None
        if sent.link is not link:  # the replica was lost while it answered: another one is being asked
            return None
        sent.is_offered = False
        if (refused := call.result()) is not None:
            self._forget(sent)
        elif sent.is_abandoned:
            self._forget(sent)
            self._abort(link, request.request_id)
        return refused

    def _abandon(self, request_id: str) -> None:
        """Abort a request whose outputs nobody reads any more."""
        if (sent := self._sent.pop(request_id, None)) is not None:
            sent.is_abandoned = True
            if sent.link is not None and not sent.is_offered:  # else `_offer` aborts it after the answer
                self._abort(sent.link, request_id)
                self._forget(sent)

    def _abort(self, link: Link, request_id: str) -> None:
        async def abort() -> None:
            with suppress(Exception):  # the replica is gone, or aborts the request when `follow` ends
                await self._transport.abort(link.id, self._client, request_id)

        self._spawn(abort())

    def _forget(self, sent: Sent) -> None:
        """Detach the request from its replica."""
        if sent.link is not None:
            sent.link.sent.pop(sent.request.request_id, None)
            sent.link = None

    def _finish(self, sent: Sent, error: SmoloraError) -> None:
        """End the request with an error."""
        self._forget(sent)
        if self._sent.pop(sent.request.request_id, None) is not None:
            sent.put(error)

    def _fail(self, sent: Sent, error: SmoloraError) -> None:
        """Handle the failure of a request's replica.

        If there was no earlier failure, retry on another replica. Otherwise end the request.
        """
        welcome = None if sent.link is None else sent.link.welcome
        self._forget(sent)
        sent.num_lost += 1
        is_lost = isinstance(error, EngineDead | Draining) and sent.num_lost <= _MAX_LOST
        if sent.has_output:
            sent.repeat_on(None if welcome is None else welcome.kind)
            is_lost = is_lost and sent.kind is not None
        if is_lost and not (sent.is_abandoned or self._is_stopped):
            self._spawn(self._send(sent))
        else:
            self._finish(sent, error)

    def _update_replicas(self, ids: frozenset[str]) -> None:
        """Subscribe to new replicas. Mark replicas that aren't in `ids` as leaving: Serve is stopping them."""
        for name, link in self._links.items():
            link.is_leaving = name not in ids
        for name in ids - self._links.keys():
            link = self._links[name] = Link(name)
            self._followers[name] = asyncio.create_task(self._follow(link))

    async def _follow(self, link: Link) -> None:
        """Receive a replica's messages until the replica has left. Reconnect if the connection is lost."""
        while not (link.is_leaving or self._is_stopped):
            try:
                await self._listen(link)
            except Exception as error:
                level = logging.DEBUG if link.state is None else logging.WARNING  # warn once, not at each retry
                log.log(level, "replica %s is lost: %s", link.id, error or type(error).__name__)
            self._lose(link)
            if not link.is_leaving:
                await asyncio.sleep(_RETRY_SECONDS)
        del self._links[link.id], self._followers[link.id]

    async def _listen(self, link: Link) -> None:
        """Receive messages until the stream ends, or until a replica that is leaving isn't needed any more."""
        async with aclosing(self._transport.follow(link.id, self._client)) as messages:
            while not link.is_leaving or link.sent or link in self._ready_links():
                async with asyncio.timeout(SILENCE_SECONDS):
                    message = await anext(messages, None)
                if message is None:
                    return
                if isinstance(message, Batch):
                    await self._deliver(link, message)
                else:
                    link.greet(message, self._base_digest)

    async def _deliver(self, link: Link, batch: Batch) -> None:
        for number, output in enumerate(batch.outputs, 1):
            if (sent := link.sent.get(output.request_id)) is not None:
                self._hand_on(sent, output)
            if number % 64 == 0:  # let readers catch up: a burst after a stall must not overflow their buffers
                await asyncio.sleep(0)
        for request_id, error in batch.failures:
            if (sent := link.sent.get(request_id)) is not None:
                self._fail(sent, error)
        if batch.state is not None:
            was_ready = link.is_ready
            link.take(batch.state)
            if not was_ready:
                self._max_in_flight = max(self._max_in_flight, fleet.limit_of(self._ready_links()))
                async with self._changed:
                    self._changed.notify_all()

    def _hand_on(self, sent: Sent, output: SequenceOutput) -> None:
        if isinstance(output.error, EngineDead):
            self._fail(sent, output.error)
            return
        sent.has_output = True
        if (new := sent.new_part(output)) is None:
            return
        if new.finish_reason is not None:
            sent.num_unfinished -= 1
            if not sent.num_unfinished:
                self._forget(sent)
                self._sent.pop(new.request_id, None)
        sent.put(new)

    def _lose(self, link: Link) -> None:
        """Handle the loss of a replica: call `_fail` for each of its requests."""
        link.state = None
        link.blocks = set()
        for call in link.calls:
            call.cancel()
        for sent in list(link.sent.values()):
            self._fail(sent, EngineDead())

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
