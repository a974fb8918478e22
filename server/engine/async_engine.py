"""Run the engine on its own thread, behind an event loop that sends it requests and receives outputs.

The thread and the loop share an inbox, protected by a condition variable, and values that are replaced as a whole,
such as the engine's statistics. The rest of the engine belongs to the thread. The thread passes outputs to the
loop once a step. The loop watches the thread. If the thread has died or hangs, all requests in flight fail, and
the engine is dead.
"""

import asyncio
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from adapters.errors import SmoloraError
from server.engine.admission import InFlight, QueueRate
from server.engine.engine import Engine, EngineConfig
from server.engine.request import EngineStats, GenerationRequest, SequenceOutput
from server.errors import Draining, EngineDead, GenerationFailed, NotReady, QueueFull, ReadTooSlowly

log = logging.getLogger(__name__)
MAX_UNREAD = 1 << 18
"""Maximum number of tokens that a stream buffers, about 30 MB. The likeliest tokens in log-probabilities count,
too."""
LEAST_SECONDS = 30.0
"""A step counts as hung only after this time."""
FACTOR = 20.0
"""A step counts as hung only after this many times the longest earlier step."""
_LONGEST_PAUSE = 1.0  # seconds: a longer time between two looks counts as this
_WATCH_SECONDS = 0.25  # between two looks at the thread
_STOP_SECONDS = 0.005  # between two looks whether the thread has ended
_WAIT_ERROR = 1.25
"""The 99th percentile of actual wait / estimated wait, measured at five times the peak load."""
_STATS_INTERVAL = 0.05  # seconds between snapshots while steps follow each other
Put = Callable[[SequenceOutput | SmoloraError], None]
"""A quick function that receives each output of a request, or an error that ends the request."""


class OutputStream:
    """The outputs of one request, until all its choices have ended. `aclose` aborts the unfinished choices."""

    def __init__(self, num_choices: int, abandon: Callable[[], None]) -> None:
        """`abandon` is called when the reader has stopped, possibly more than once or after the request's end."""
        self._num_unfinished = num_choices  # choices whose end the reader hasn't received
        self._abandon = abandon
        self._queue: asyncio.Queue[SequenceOutput | SmoloraError] = asyncio.Queue()
        self._num_unread = 0
        self._is_over = False  # whether further outputs are ignored

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
        """Abort the request, whose resources are freed at the engine's next step. Closing twice is a no-op."""
        self._num_unfinished = 0
        self._abandon()

    def put(self, output: SequenceOutput | SmoloraError) -> None:
        """Pass an output of a choice, or an error that ends all choices, to the reader.

        If the reader is too far behind, end the request with ReadTooSlowly instead.
        """
        if self._is_over:
            return
        if not isinstance(output, SmoloraError):
            self._num_unread += _size(output)
            if self._num_unread > MAX_UNREAD:
                output = ReadTooSlowly()
                while not self._queue.empty():  # a slow reader would keep this memory for long
                    self._queue.get_nowait()
        self._queue.put_nowait(output)
        if isinstance(output, SmoloraError):
            self._is_over = True
            asyncio.get_running_loop().call_soon(self._abandon)  # later: the caller is still handling the request


def _size(output: SequenceOutput) -> int:
    return output.num_new_tokens + sum(len(entry.top) for entry in output.logprobs)


class Watchdog:
    """A detector of steps that hang. Call `look` several times a second.

    The age of a step is the sum of the times between calls of `look`, each at most `_LONGEST_PAUSE`. So the time
    for which the whole process is stopped (SIGSTOP, a suspended machine, a debugger) hardly counts.
    """

    def __init__(self, least_seconds: float = LEAST_SECONDS) -> None:
        self._least_seconds = least_seconds
        self._looked_at: float | None = None
        self._step: int | None = None
        self._age = 0.0
        self._longest = 0.0  # age of the longest step that has ended

    @property
    def limit(self) -> float:
        """Seconds after which a step counts as hung."""
        return max(self._least_seconds, FACTOR * self._longest)

    def look(self, step: int | None, now: float) -> bool:
        """Return whether the current step hangs.

        `step` is the current step's number, or None between steps; `now` is a time in seconds.
        """
        pause = 0.0 if self._looked_at is None else min(now - self._looked_at, _LONGEST_PAUSE)
        self._looked_at = now
        if step is not None and step == self._step:
            self._age += pause
        else:
            self._longest = max(self._longest, self._age)
            self._step, self._age = step, 0.0
        return self._age > self.limit


@dataclass
class _Taken:
    """A request that was accepted and has not ended."""

    request: GenerationRequest
    put: Put
    num_undelivered: int  # choices whose end the engine hasn't reported
    has_begun: bool = False  # whether it has had a place in the batch


class AsyncEngine:
    """One engine and its thread. Use `start`, `submit` and the streams on one event loop."""

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
        """Build the engine with `build(wake)`. The engine calls `wake` from any thread when it may have work.

        `check_queue` refuses requests that would wait longer than `queue_timeout` seconds for a place in the
        batch.
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
        """Whether the engine accepts requests now."""
        return self._thread.is_alive() and not (self._is_dead or self._is_draining)

    @property
    def draining(self) -> bool:
        """Whether the engine refuses new requests, because the process is about to end."""
        return self._is_draining

    @property
    def dead(self) -> bool:
        """Whether the engine can't continue, so that the process should end."""
        return self._is_dead

    @property
    def hung(self) -> bool:
        """Whether the engine is dead because a step hangs. If so, don't wait for its thread."""
        return self._is_hung

    @property
    def num_in_flight(self) -> int:
        """The number of sequences that were accepted and have not ended."""
        return self._in_flight.num

    @property
    def max_in_flight(self) -> int:
        """The maximum of `num_in_flight`. A larger request is accepted if nothing else is in flight."""
        return self._in_flight.max_num

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def config(self) -> EngineConfig:
        return self._engine.config

    @property
    def max_num_tokens(self) -> int:
        """The most tokens that one sequence can have: its prompt and its answer."""
        return self._engine.max_num_tokens

    def cached_blocks(self) -> list[bytes]:
        """Return the keys of all blocks in the prefix cache."""
        return self._engine.blocks.cached_keys()

    def stats_by_replica(self, *, is_complete: bool) -> Mapping[str, EngineStats]:
        """Return the statistics with the name "": this engine is no replica of a cluster."""
        return {"": self.stats}

    def start(self) -> None:
        """Start the thread. Call it once, on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._watching = self._loop.create_task(self._watch())

    async def stop(self) -> None:
        """Fail all requests, and end the engine's thread unless a step hangs."""
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
        """Refuse new requests from now on. Requests in flight continue."""
        self._is_draining = True

    def check_queue(self, num_sequences: int, project: str = "") -> None:
        """Raise QueueFull if `num_sequences` of a project would be refused now or would wait for too long.

        Raise Draining, NotReady or EngineDead if the engine is draining, not ready or dead. Call this before the
        slow work of preparing a request.
        """
        self._check_room(num_sequences, project)
        wait = _WAIT_ERROR * self._rate.wait(self._clock(), self._in_flight.num_ahead(project))
        if wait > self._queue_timeout:
            message = f"the queue takes up to {wait:.0f} s, more than SMOLORA_QUEUE_TIMEOUT"
            raise QueueFull(message, retry_after=wait - self._queue_timeout, reason="queue")

    def submit(self, request: GenerationRequest) -> OutputStream:
        """Queue a request. Raise QueueFull, Draining, NotReady, EngineDead or InvalidInput if it is refused."""
        stream = OutputStream(request.n, partial(self.abandon, request.request_id))
        self.submit_to(request, stream.put)
        return stream

    def submit_to(self, request: GenerationRequest, put: Put) -> None:
        """Queue a request like `submit`, but pass its outputs to `put`, on the event loop."""
        self._check_room(request.n, request.project)
        self._engine.check(request)
        self._taken[request.request_id] = _Taken(request, put, request.n)
        self._in_flight.add(request.project, request.n)
        self._observe()
        self._send(request)

    def abandon(self, request_id: str) -> None:
        """Abort a request at the next step, without further outputs. A no-op if the request has ended."""
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
            raise QueueFull("the queue is full (SMOLORA_MAX_QUEUE)", reason="queue")

    def _observe(self, num_ended: int = 0) -> None:
        """Record the new number of sequences in flight, after `num_ended` sequences have left the batch."""
        self._rate.observe(self._clock(), self._in_flight.num, num_ended)

    async def _watch(self) -> None:
        """Fail all requests if the thread has died or hangs."""
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
        """End a request with this error, unless the request has ended already."""
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
        """Run the engine's thread: take messages, step, pass on outputs, and wait if there is no work."""
        try:
            self._step_until_stopped()
        except BaseException:  # libraries also raise other exceptions than Exception
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
            # After a step that computed nothing, wait for an adapter's load or a message, which wake this thread.
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
                self._take_message(message.request_id)  # abort the choices that were added

    def _call(self, function: Callable[[], None]) -> None:
        """Schedule a call of the function on the event loop, unless the loop is closed."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed
            log.debug("outputs after the end of the event loop")
