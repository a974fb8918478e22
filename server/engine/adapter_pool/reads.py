"""Reads of adapters. One that has begun can't be stopped: whoever asks for the same again waits for that one."""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from adapters.errors import Unavailable
from server.model.rank_rows import Stored

Load = Callable[[str], Stored]
NUM_READERS = 8
"""Threads that read: one that must fetch its adapter from an object store may take most of a minute."""

P = ParamSpec("P")
T = TypeVar("T")


def started(num_threads: int, name: str) -> ThreadPoolExecutor:
    """Return an executor whose threads have all been started: later there may be none to be had.

    Raises RuntimeError if the system has too few now.
    """
    executor = ThreadPoolExecutor(num_threads, name)
    all_started = threading.Barrier(num_threads)  # until then none is idle, so each job starts a thread
    try:
        jobs = [executor.submit(all_started.wait) for _ in range(num_threads)]
    except RuntimeError:
        all_started.abort()
        executor.shutdown()
        raise
    for job in jobs:
        job.result()
    return executor


def submit(
    executor: Executor, wake: Callable[[], None], function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> Future[T]:
    """Have an executor's thread call the function, and `wake` when it has ended or was cancelled.

    If the executor takes no jobs, the future has failed with Unavailable.
    """
    try:
        future = executor.submit(function, *args, **kwargs)
    except RuntimeError:
        future = Future()
        future.set_exception(Unavailable("no thread of the server can load an adapter now"))
    future.add_done_callback(lambda _: wake())
    return future


class Reads:
    """`wake` is called, from another thread, when one has ended or was cancelled."""

    def __init__(self, load: Load, readers: Executor, wake: Callable[[], None]) -> None:
        self._load = load
        self._readers = readers
        self._wake = wake
        self._left: dict[str, Future[Stored]] = {}  # under way, and nobody waits for them

    def begin(self, digest: str) -> Future[Stored]:
        """One that is awaited from now on: that which was left and is still under way, or a new one."""
        self._forget_ended()
        reading = self._left.pop(digest, None)
        if reading is None:
            reading = submit(self._readers, self._wake, self._load, digest)
        return reading

    def leave(self, digest: str, reading: Future[Stored]) -> None:
        """Nobody awaits it any more. One that has not begun never does: others' may wait behind it."""
        self._forget_ended()
        if not (reading.cancel() or reading.done()):
            self._left[digest] = reading

    def _forget_ended(self) -> None:
        self._left = {digest: reading for digest, reading in self._left.items() if not reading.done()}
