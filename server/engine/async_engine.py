"""A request's outputs on their way to whoever reads them, on one event loop.

Tells a step that hangs from one that takes long, or whose process was stopped meanwhile. Plain arithmetic.

A step's age is added up from regular looks, each of which counts for `_LONGEST_PAUSE` at most: while the whole
process is stopped (SIGSTOP, a suspended machine, a debugger) nobody looks, and that time is nobody's.

The engine behind an event loop: one thread steps it, others send it messages and await its news.

The thread and the loop share an inbox, under a condition, and snapshots that are replaced whole; everything else
of the engine is the thread's alone. Outputs go over to the loop a step at a time. The loop watches the thread:
where it has died or hangs, everybody in flight is told so, and the engine is dead.
"""

import asyncio
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from adapters.errors import SmoloraError
from server.engine.admission import InFlight, QueueRate
from server.engine.engine import Engine, EngineConfig
from server.engine.request import EngineStats, GenerationRequest, SequenceOutput
from server.errors import Draining, EngineDead, GenerationFailed, NotReady, QueueFull, ReadTooSlowly

MAX_UNREAD = 1 << 18
"""Tokens that may wait for a reader, and the likeliest ones beside them: some 30 MB."""


class OutputStream:
    """The outputs of one request, until all its choices have ended. `aclose` aborts what is left."""

    def __init__(self, num_choices: int, abandon: Callable[[], None]) -> None:
        """`abandon` tells whoever `put`s that nobody reads any more; it may be called after the end, and twice."""
        self._num_unfinished = num_choices  # choices whose end the reader has not seen
        self._abandon = abandon
        self._queue: asyncio.Queue[SequenceOutput | SmoloraError] = asyncio.Queue()
        self._num_unread = 0
        self._is_over = False  # nothing more is taken

    def __aiter__(self) -> "OutputStream":
        return self

    async def __anext__(self) -> SequenceOutput:
        if not self._num_unfinished:
            raise StopAsyncIteration
        output = await self._queue.get()
        if isinstance(output, SmoloraError):
            self._num_unfinished = 0
            raise output
        self._num_unread -= _size(output)
        if output.finish_reason is not None:
            self._num_unfinished -= 1
        return output

    async def aclose(self) -> None:
        """Free what the request holds at the engine's next step. Closing twice is closing once."""
        self._num_unfinished = 0
        self._abandon()

    def put(self, output: SequenceOutput | SmoloraError) -> None:
        """Hand on news of a choice, or what ends all of them, and with them what the request holds.

        So does a reader who is too far behind.
        """
        if self._is_over:
            return
        if not isinstance(output, SmoloraError):
            self._num_unread += _size(output)
            if self._num_unread > MAX_UNREAD:
                output = ReadTooSlowly()
                while not self._queue.empty():  # who reads little at a time would keep it for as long
                    self._queue.get_nowait()
        self._queue.put_nowait(output)
        if isinstance(output, SmoloraError):
            self._is_over = True
            asyncio.get_running_loop().call_soon(self._abandon)  # whoever puts is at work on the request just now


def _size(output: SequenceOutput) -> int:
    return output.num_new_tokens + sum(len(entry.top) for entry in output.logprobs)


LEAST_SECONDS = 30.0
"""A step is never given up before it is so old."""
FACTOR = 20.0
"""Nor before it has taken so many times as long as the longest one before it."""
_LONGEST_PAUSE = 1.0  # seconds between two looks that may have been work


class Watchdog:
    """Watches over one thread's steps. Have it `look` every fraction of a second."""

    def __init__(self, least_seconds: float = LEAST_SECONDS) -> None:
        self._least_seconds = least_seconds
        self._looked_at: float | None = None
        self._step: int | None = None
        self._age = 0.0
        self._longest = 0.0  # of the steps that have ended

    @property
    def limit(self) -> float:
        """Seconds after which a step counts as stalled."""
        return max(self._least_seconds, FACTOR * self._longest)

    def look(self, step: int | None, now: float) -> bool:
        """Whether the step under way has stalled. `step`: its number, None between steps; `now`: seconds."""
        pause = 0.0 if self._looked_at is None else min(now - self._looked_at, _LONGEST_PAUSE)
        self._looked_at = now
        if step is not None and step == self._step:
            self._age += pause
        else:
            self._longest = max(self._longest, self._age)
            self._step, self._age = step, 0.0
        return self._age > self.limit


log = logging.getLogger(__name__)

_WATCH_SECONDS = 0.25  # between two looks at the thread
_STOP_SECONDS = 0.005  # likewise, while it is awaited
_WAIT_ERROR = 1.25
"""By how much a wait exceeds its estimate in the worst of a hundred cases, as seen at five times the peak."""
_STATS_INTERVAL = 0.05  # seconds between snapshots while steps follow each other


Put = Callable[[SequenceOutput | SmoloraError], None]
"""Is handed each output of a request, or what ends all of it. It must not take long."""


@dataclass
class _Taken:
    """A request that was taken and has not ended."""

    request: GenerationRequest
    put: Put
    num_undelivered: int  # choices whose end the engine has not told
    has_begun: bool = False  # whether it has had a place in the batch


class AsyncEngine:
    """One engine and its thread. `start`, `submit` and the streams belong to one event loop."""

    def __init__(
        self,
        build: Callable[[Callable[[], None]], Engine],
        *,
        max_queue: int = 256,
        queue_timeout: float = math.inf,
        watchdog: Watchdog | None = None,
        watch_seconds: float = _WATCH_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`build(wake)` makes the engine, at once; it calls `wake` from any thread when it may have work.

        What would wait for a place longer than `queue_timeout` seconds is refused by `check_queue`.
        """
        self._engine = build(self._wake)
        num_places = self._engine.config.scheduler.max_num_seqs
        self._rate = QueueRate(num_places)
        self._in_flight = InFlight(num_places, num_places + max_queue)
        self._queue_timeout = queue_timeout
        self._inbox: deque[GenerationRequest | str] = deque()  # requests, and ids of requests to abort
        self._news = threading.Condition()
        self._is_woken = False
        self._is_stopping = False
        self._is_draining = False
        self._is_dead = False
        self._is_hung = False
        self._stats = self._engine.stats
        self._watchdog = watchdog or Watchdog()
        self._watch_seconds = watch_seconds
        self._clock = clock
        self._watching: asyncio.Task[None] | None = None
        self._step: int | None = None  # the step under way, counted from 0
        self._taken: dict[str, _Taken] = {}  # by the request's id
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be taken and worked on."""
        return self._thread.is_alive() and not (self._is_dead or self._is_draining)

    @property
    def draining(self) -> bool:
        """Whether it takes nothing new, for good: the process is about to end."""
        return self._is_draining

    @property
    def dead(self) -> bool:
        """Whether the engine can't go on; the process should end."""
        return self._is_dead

    @property
    def hung(self) -> bool:
        """Whether it is dead because a step doesn't end: nobody may wait for its thread."""
        return self._is_hung

    @property
    def num_in_flight(self) -> int:
        """Sequences that were taken and have not ended."""
        return self._in_flight.num

    @property
    def max_in_flight(self) -> int:
        """As many as that may be, but for one request alone, which may have more."""
        return self._in_flight.max_num

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def config(self) -> EngineConfig:
        return self._engine.config

    @property
    def max_num_tokens(self) -> int:
        """Of one sequence: its prompt and its answer."""
        return self._engine.max_num_tokens

    def cached_blocks(self) -> list[bytes]:
        """The keys of all blocks that a prompt could find in the cache now."""
        return self._engine.blocks.cached_keys()

    def start(self) -> None:
        """Start the thread. Call it once, on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._watching = self._loop.create_task(self._watch())

    async def stop(self) -> None:
        """End what runs and the thread, but for one that hangs."""
        with self._news:
            self._is_stopping = True
            self._news.notify()
        while self._thread.is_alive() and not self._is_hung:
            await asyncio.sleep(_STOP_SECONDS)
        if self._watching is not None:
            self._watching.cancel()
        self._fail_all(Draining())
        if not self._is_hung:
            await asyncio.to_thread(self._engine.close)

    def drain(self) -> None:
        """Take no new requests; those in flight go on."""
        self._is_draining = True

    def check_queue(self, num_sequences: int, project: str = "") -> None:
        """Raise where so many of a project would be refused now, or wait for too long, whatever they are.

        For whoever has work to do before there is a request: QueueFull, Draining, NotReady, EngineDead.
        """
        self._check_room(num_sequences, project)
        wait = _WAIT_ERROR * self._rate.wait(self._clock(), self._in_flight.num_ahead(project))
        if wait > self._queue_timeout:
            message = f"the queue takes up to {wait:.0f} s, more than SMOLORA_QUEUE_TIMEOUT"
            raise QueueFull(message, retry_after=wait - self._queue_timeout)

    def submit(self, request: GenerationRequest) -> OutputStream:
        """Queue a request, or raise at once: QueueFull, Draining, NotReady, EngineDead, InvalidInput."""
        stream = OutputStream(request.n, partial(self.abandon, request.request_id))
        self.submit_to(request, stream.put)
        return stream

    def submit_to(self, request: GenerationRequest, put: Put) -> None:
        """The same for whoever collects outputs of many: `put` gets a step's one after the other, on the loop."""
        self._check_room(request.n, request.project)
        self._engine.check(request)
        self._taken[request.request_id] = _Taken(request, put, request.n)
        self._in_flight.add(request.project, request.n)
        self._observe()
        self._send(request)

    def abandon(self, request_id: str) -> None:
        """Free what the request holds at the next step; nothing more is told of it. Nothing where it has ended."""
        if request_id in self._taken:
            self._forget(request_id)
            self._send(request_id)

    def _check_room(self, num_sequences: int, project: str) -> None:
        if self._is_dead:
            raise EngineDead
        if self._is_draining or self._is_stopping:
            raise Draining
        if not self.ready:
            raise NotReady
        if not self._in_flight.has_room(project, num_sequences):
            raise QueueFull("the queue is full (SMOLORA_MAX_QUEUE)")

    def _observe(self, num_ended: int = 0) -> None:
        """The number in flight has changed; so many had a place in the batch and have given it up."""
        self._rate.observe(self._clock(), self._in_flight.num, num_ended)

    async def _watch(self) -> None:
        """Notice what the thread itself can't tell: that it has died, or that it hangs."""
        while not (self._is_dead or self._is_stopping) or self._thread.is_alive():
            await asyncio.sleep(self._watch_seconds)
            self._is_hung = self._watchdog.look(self._step, self._clock())
            if self._is_hung:
                log.critical("a step of the engine has taken more than %.0f s", self._watchdog.limit)
            if self._is_hung or not (self._thread.is_alive() or self._is_stopping):
                self._is_dead = True
                self._fail_all(EngineDead())
                return

    def _forget(self, request_id: str) -> None:
        taken = self._taken.pop(request_id)
        num_begun = taken.request.n if taken.has_begun else 0
        self._in_flight.end(taken.request.project, taken.request.n, num_begun)
        self._observe(num_begun)

    def _deliver(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            taken = self._taken.get(output.request_id)
            if taken is not None:
                taken.put(output)
                if not taken.has_begun:
                    taken.has_begun = True
                    self._in_flight.begin(taken.request.project, taken.request.n)
                taken.num_undelivered -= output.finish_reason is not None
                if not taken.num_undelivered:
                    self._forget(output.request_id)

    def _fail(self, request_id: str, error: SmoloraError) -> None:
        """End a request with the reason, if it hasn't ended."""
        taken = self._taken.get(request_id)
        if taken is not None:
            self._forget(request_id)
            taken.put(error)

    def _fail_all(self, error: SmoloraError) -> None:
        for request_id in list(self._taken):
            self._fail(request_id, error)

    def _send(self, message: GenerationRequest | str) -> None:
        with self._news:
            self._inbox.append(message)
            self._news.notify()

    def _wake(self) -> None:
        with self._news:
            self._is_woken = True
            self._news.notify()

    def _run(self) -> None:
        """The thread: take messages, step, hand outputs over; wait where there is nothing to do."""
        try:
            self._step_until_stopped()
        except BaseException:  # some of what libraries raise is no Exception
            log.exception("the engine's thread failed")
            self._is_dead = True
        if self._is_dead:
            self._call(partial(self._fail_all, EngineDead()))

    def _step_until_stopped(self) -> None:
        last_snapshot = 0.0
        has_progress = False
        for step in itertools.count():
            with self._news:
                while not (self._inbox or self._is_woken or self._is_stopping or has_progress):
                    self._news.wait()
                if self._is_stopping or self._is_dead:
                    return
                messages = list(self._inbox)
                self._inbox.clear()
                self._is_woken = False
            self._step = step
            for message in messages:
                self._take_message(message)
            num_steps, num_failures = self._engine.num_steps, self._engine.num_failures
            now = time.monotonic()
            outputs = self._engine.step()
            self._step = None
            # A step that computed nothing waits for an adapter: the loader wakes us, so does any message.
            has_changed = self._engine.num_steps > num_steps or self._engine.num_failures > num_failures
            has_progress = self._engine.has_work and (has_changed or bool(outputs))
            if not has_progress or now - last_snapshot > _STATS_INTERVAL:
                self._stats = self._engine.stats
                last_snapshot = now
            if outputs:
                self._call(partial(self._deliver, outputs))
            if self._engine.is_dead:
                self._is_dead = True
                return

    def _take_message(self, message: GenerationRequest | str) -> None:
        """Add or abort a request. An exception fails that request alone."""
        try:
            if isinstance(message, str):
                self._engine.abort(message)
            else:
                self._engine.add(message)
        except Exception:
            log.exception("a request could not be added or aborted")
            if not isinstance(message, str):
                error = GenerationFailed("the engine failed to take this request; try it again")
                self._call(partial(self._fail, message.request_id, error))
                self._take_message(message.request_id)  # the choices that were added

    def _call(self, function: Callable[[], None]) -> None:
        """Have the event loop call the function; nothing where the loop has ended."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed: nobody listens any more
            log.debug("outputs after the end of the event loop")
