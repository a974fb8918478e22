"""Read values for /metrics in a thread, so that a database that doesn't answer never blocks a scrape."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

WAIT_SECONDS = 0.5


class Aside:
    """Runs one read at a time in a thread. Not thread-safe."""

    def __init__(self, wait_seconds: float = WAIT_SECONDS) -> None:
        self._wait_seconds = wait_seconds
        self._is_free: Callable[[], bool] = lambda: True

    def run(self, work: Callable[[], T]) -> T:
        """Return the result of `work`.

        Raise TimeoutError if `work` takes longer than `wait_seconds`, or at once if a former call still runs.
        """
        if not self._is_free():
            raise TimeoutError("the last read hasn't ended yet")
        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(work())
            except BaseException as error:
                result.set_exception(error)

        self._is_free = result.done
        threading.Thread(target=run, name="metrics", daemon=True).start()
        return result.result(self._wait_seconds)
