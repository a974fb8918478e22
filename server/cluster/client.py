"""Engine replicas behind the API's `EngineClient`: where a request goes, and what becomes of it if a replica dies.

Everything belongs to one event loop. A request goes to the best replica that takes it (`fleet.best`). One whose
replica is lost before it told anything goes to another one, once: its seed goes too, so the answer is the same.
Later it ends with EngineDead. Where there is no replica at the moment, what was taken waits a while for one.

What an API process has in the place of an engine.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine
from contextlib import aclosing, suppress
from functools import lru_cache, partial

from adapters.errors import SmoloraError
from adapters.store.store import AdapterStore
from server.cluster import fleet
from server.cluster.fleet import Counts, Link, Sent, Transport
from server.cluster.messages import Batch
from server.cluster.transport import ServeTransport, join
from server.engine.async_engine import OutputStream
from server.engine.request import EngineStats, GenerationRequest, SequenceOutput
from server.errors import Draining, EngineDead, TryAgain
from server.model.base.weights import BaseModel
from server.serve.startup import Connect

log = logging.getLogger(__name__)

SILENCE_SECONDS = 15.0  # after which a replica is given up; it tells something every half second
_PATIENCE_SECONDS = 30.0  # for a replica to come, where there is none
_RETRY_SECONDS = 0.5  # before a replica that is said to be there is followed again
_MAX_LOST = 1


class ReplicatedEngine:
    """The engines of all replicas, as one. `start`, `submit` and the streams belong to one event loop."""

    def __init__(self, transport: Transport, base_digest: str, size_of: Callable[[str], int]) -> None:
        """Replicas of another base are not used. `size_of(digest)`: an adapter's bytes."""
        self._transport = transport
        self._base_digest = base_digest
        self._size_of = size_of
        self._client = uuid.uuid4().hex
        self._links: dict[str, Link] = {}
        self._counts = Counts()
        self._followers: dict[str, asyncio.Task[None]] = {}  # a task for each link
        self._tasks: set[asyncio.Task[None]] = set()
        self._sent: dict[str, Sent] = {}
        self._is_draining = False
        self._is_stopped = False
        self._changed = asyncio.Condition()  # which links are ready

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be taken and worked on."""
        return bool(self._ready_links()) and not (self._is_draining or self._is_stopped)

    @property
    def draining(self) -> bool:
        """Whether it takes nothing new, for good: this process is about to end."""
        return self._is_draining

    @property
    def dead(self) -> bool:
        """Never: replicas that die are replaced, and this process waits for them."""
        return False

    @property
    def hung(self) -> bool:
        """Never: no thread here could."""
        return False

    @property
    def num_in_flight(self) -> int:
        """Sequences that this process was sent and that have not ended."""
        return sum(sent.num_unfinished for sent in self._sent.values())

    @property
    def max_in_flight(self) -> int | None:
        """As many as the replicas take together, those that are away for a while too; None: that isn't known."""
        return fleet.max_in_flight(list(self._links.values()), self._base_digest, self._counts)

    @property
    def max_num_tokens(self) -> int | None:
        """Of one sequence, whichever replica it goes to; None: there is none."""
        return fleet.max_num_tokens(self._ready_links())

    @property
    def stats(self) -> EngineStats:
        """Of all replicas together; counters are of what this process has seen them do."""
        return fleet.total(list(self._links.values()), self._counts)

    def start(self) -> None:
        """Find the replicas, and follow them. Call it once, on the event loop."""
        self._transport.watch(self._told)

    async def stop(self) -> None:
        """End what runs."""
        self._is_stopped = True
        for sent in list(self._sent.values()):
            self._finish(sent, Draining())
        tasks = [*self._tasks, *self._followers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._transport.close()

    def drain(self) -> None:
        """Take no new requests; those in flight go on."""
        self._is_draining = True

    def check_queue(self, num_sequences: int, project: str = "") -> None:
        """Raise QueueFull, Draining or NotReady where no replica would take anything now; each has its own say."""
        if self._is_draining or self._is_stopped:
            raise Draining
        fleet.check_queues(self._ready_links())

    def submit(self, request: GenerationRequest) -> OutputStream:
        """Send a request, or raise at once: QueueFull, Draining, NotReady, InvalidInput.

        What the replicas refuse it for is what its stream begins with.
        """
        self.check_queue(request.n, request.project)
        fleet.check(self._ready_links(), request)
        stream = OutputStream(request.n, partial(self._abandon, request.request_id))
        sent = self._sent[request.request_id] = Sent(request, stream.put, request.n)
        self._spawn(self._send(sent))
        return stream

    def _ready_links(self) -> list[Link]:
        """Those that may be sent something. Where all leave, and who comes has yet to say a word, it is they."""
        links = list(self._links.values())
        ready = [link for link in links if link.is_ready]
        return ready or [link for link in links if link.state and any(other.is_coming for other in links)]

    async def _send(self, sent: Sent) -> None:
        """Have a replica take it; where all refuse it, it ends with what the last one said."""
        refused: set[str] = set()
        error: SmoloraError = EngineDead()
        try:
            while not sent.is_abandoned:
                if not self._ready_links():
                    async with asyncio.timeout(_PATIENCE_SECONDS), self._changed:
                        await self._changed.wait_for(self._ready_links)
                links = [link for link in self._ready_links() if link.id not in refused]
                if not links:
                    break
                link = fleet.best(links, sent, self._size_of)
                answer = await self._offer(sent, link)
                if answer is None:
                    return
                error = answer
                refused.add(link.id)
                if not isinstance(error, TryAgain):
                    break
        except TimeoutError:
            log.warning("no replica came in %.0f s", _PATIENCE_SECONDS)
        self._finish(sent, error)

    async def _offer(self, sent: Sent, link: Link) -> SmoloraError | None:
        """What the replica refuses it for. None: it took it, or was lost, and what follows is under way."""
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
                self._abort(link, request.request_id)  # it may have taken it, for all we know
                self._fail(sent, EngineDead())
            return None
        if sent.link is not link:  # lost as it answered: another one is asked already
            return None
        sent.is_offered = False
        if (refused := call.result()) is not None:
            self._forget(sent)
        elif sent.is_abandoned:
            self._forget(sent)
            self._abort(link, request.request_id)
        return refused

    def _abandon(self, request_id: str) -> None:
        """Nobody reads its outputs any more."""
        if (sent := self._sent.pop(request_id, None)) is not None:
            sent.is_abandoned = True
            if sent.link is not None and not sent.is_offered:  # else `_offer` sees to it, once it has an answer
                self._abort(sent.link, request_id)
                self._forget(sent)

    def _abort(self, link: Link, request_id: str) -> None:
        async def abort() -> None:
            with suppress(Exception):  # it is gone, or will be told by the end of `follow`
                await self._transport.abort(link.id, self._client, request_id)

        self._spawn(abort())

    def _forget(self, sent: Sent) -> None:
        """It is with no replica any more."""
        if sent.link is not None:
            sent.link.sent.pop(sent.request.request_id, None)
            sent.link = None

    def _finish(self, sent: Sent, error: SmoloraError) -> None:
        """End it with an error."""
        self._forget(sent)
        if self._sent.pop(sent.request.request_id, None) is not None:
            sent.put(error)

    def _fail(self, sent: Sent, error: SmoloraError) -> None:
        """Its replica can't go on with it: another one may, where nothing was told yet."""
        self._forget(sent)
        sent.num_lost += 1
        is_lost = isinstance(error, EngineDead | Draining) and not sent.has_output and sent.num_lost <= _MAX_LOST
        if is_lost and not (sent.is_abandoned or self._is_stopped):
            self._spawn(self._send(sent))
        else:
            self._finish(sent, error)

    def _told(self, ids: frozenset[str]) -> None:
        """These are the replicas from now on."""
        for name, link in self._links.items():
            link.is_leaving = name not in ids
        for name in ids - self._links.keys():
            link = self._links[name] = Link(name, counts=self._counts)
            self._followers[name] = asyncio.create_task(self._follow(link))

    async def _follow(self, link: Link) -> None:
        """Take what the replica tells, until it is gone."""
        while not (link.is_leaving or self._is_stopped):
            try:
                await self._listen(link)
            except Exception as error:
                level = logging.DEBUG if link.state is None else logging.WARNING  # it may take a while to be gone
                log.log(level, "replica %s is lost: %s", link.id, error or type(error).__name__)
            self._lose(link)
            if not link.is_leaving:
                await asyncio.sleep(_RETRY_SECONDS)
        del self._links[link.id], self._followers[link.id]

    async def _listen(self, link: Link) -> None:
        """One call of `follow`. A replica that is to leave is left once nothing of ours runs, or may go, there."""
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
            if number % 64 == 0:  # what comes at once after a stall is no fault of whoever reads it
                await asyncio.sleep(0)
        for request_id, error in batch.failures:
            if (sent := link.sent.get(request_id)) is not None:
                self._fail(sent, error)
        if batch.state is not None:
            was_ready = link.is_ready
            link.take(batch.state)
            if not was_ready:
                self._counts.note(self._ready_links())
                async with self._changed:
                    self._changed.notify_all()

    def _hand_on(self, sent: Sent, output: SequenceOutput) -> None:
        if isinstance(output.error, EngineDead) and not sent.has_output:
            self._fail(sent, output.error)
            return
        sent.has_output = True
        if output.finish_reason is not None:
            sent.num_unfinished -= 1
            if not sent.num_unfinished:
                self._forget(sent)
                self._sent.pop(output.request_id, None)
        sent.put(output)

    def _lose(self, link: Link) -> None:
        """Nothing comes any more of what it has."""
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


_MAX_SIZES = 100_000


def connect_to(address: str) -> Connect:
    """For `startup.build`: joins the Ray cluster at `address`. Raises StartupError where there is none."""

    def connect(base: BaseModel, store: AdapterStore) -> ReplicatedEngine:
        @lru_cache(_MAX_SIZES)
        def size_of(digest: str) -> int:
            return store.num_bytes(digest) or 1  # of those that aren't here, each counts for as much

        join(address)
        return ReplicatedEngine(ServeTransport(), base.digest, size_of)

    return connect
