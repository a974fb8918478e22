"""The worker's part of an attempt at a job: renew the lease, and read the queue's directive to the worker.

The worker also decides when the job gives way to another project's job: after a time slice, but not before the
first step. So every attempt makes progress, however long a job takes to start.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping

from server.jobs.leases import Claim, Directive, Leases

log = logging.getLogger("smolora.worker")


class Attempt:
    """A worker's attempt at a job that it has claimed.

    In a `with` statement, a thread renews the job's lease and reads the queue's directive to the worker.
    """

    def __init__(
        self,
        leases: Leases,
        claim: Claim,
        *,
        lease: float,
        heartbeat: float,
        look: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set the intervals. Every `heartbeat` seconds, the lease is extended to `lease` seconds from then.

        Every `look` seconds, the queue's directive is read.
        """
        self.claim = claim
        self.directive = Directive.GO_ON
        self.should_leave = False
        self.gives_way = False  # the process was asked to leave after its current step
        self.hindrance = ""  # why the attempt couldn't go on, if that isn't the job's fault
        self.progress: Mapping[str, object] | None = None
        self.metrics: Mapping[str, object] | None = None
        self._leases = leases
        self._lease = lease
        self._heartbeat = heartbeat
        self._look = look
        self._clock = clock
        self._began_at = clock()
        self._has_stepped = False
        self._was_awaited = False
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @property
    def is_void(self) -> bool:
        """Return whether the attempt's results no longer count."""
        return self.directive in (Directive.CANCEL, Directive.LOST)

    @property
    def seconds(self) -> float:
        """Return the seconds since the attempt began, or 0 if it hasn't completed its first step yet."""
        return self._clock() - self._began_at if self._has_stepped else 0.0

    def note(self, progress: Mapping[str, object] | None, metrics: Mapping[str, object] | None) -> None:
        """Keep what the job's process has reported. Progress and metrics are None before its first step."""
        self.progress, self.metrics = progress, metrics
        self._has_stepped |= progress is not None

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        self._thread.join()

    def keep(self) -> None:
        """Extend the lease, store the job's progress and metrics, and read the queue's directive."""
        self.directive = self._leases.heartbeat(self.claim, self._lease, self.progress, self.metrics)

    def give_way_if_awaited(self) -> None:
        """Make the job give way if its time slice is over and another project's job needs its worker.

        Another job must be waiting at two calls in a row: after only one call, an idle worker may still claim it.
        """
        if not self._leases.time_slice or self.directive is not Directive.GO_ON:
            return
        is_awaited = self._leases.is_awaited(self.claim)
        if is_awaited and self._was_awaited and self.seconds >= self._leases.time_slice:
            self._leases.give_way(self.claim)
        self._was_awaited = is_awaited

    def _run(self) -> None:
        due = 0.0
        while not self._has_ended.wait(self._look):
            try:
                if self._clock() >= due:
                    due = self._clock() + self._heartbeat
                    self.keep()
                    self.give_way_if_awaited()
                else:
                    self.directive = self._leases.directive(self.claim)
            except Exception as error:  # the next heartbeat may succeed; if none does, the lease runs out
                log.warning("no heartbeat: %s", error)
            if self.is_void or self.directive is Directive.ENDED:
                return
