"""A worker's attempt at a job while it runs: keeps the lease, and reads what the queue asks of the job.

The attempt also decides when the job gives way to another project's: after a time slice, but not before the
attempt's first step, so that each turn makes progress however long a job takes to start.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping

from server.jobs.leases import Claim, Directive, Leases

log = logging.getLogger("smolora.worker")


class Attempt:
    """A claim while it is worked on: within `with`, a thread keeps the lease and asks what is wanted."""

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
        """`lease` is how long each heartbeat keeps the job; `heartbeat` and `look` are between two heartbeats and
        between two looks at what is wanted. All in seconds.
        """
        self.claim = claim
        self.directive = Directive.GO_ON
        self.should_leave = False
        self.gives_way = False  # its process was asked to leave after its step
        self.hindrance = ""  # why it couldn't go on, where that is no fault of the job's
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
        """Whether nothing that comes of it counts any more."""
        return self.directive in (Directive.CANCEL, Directive.LOST)

    @property
    def seconds(self) -> float:
        """How long the attempt has run; 0 before its first step."""
        return self._clock() - self._began_at if self._has_stepped else 0.0

    def note(self, progress: Mapping[str, object] | None, metrics: Mapping[str, object] | None) -> None:
        """Take in how far the process says that it is; None: it hasn't made a step."""
        self.progress, self.metrics = progress, metrics
        self._has_stepped |= progress is not None

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        self._thread.join()

    def keep(self) -> None:
        """Keep the lease, and store how far the process is."""
        self.directive = self._leases.heartbeat(self.claim, self._lease, self.progress, self.metrics)

    def give_way_if_awaited(self) -> None:
        """Have the job give way if its slice is over and another project's job waited the last time, too.

        By then an idle worker would have taken that job.
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
            except Exception as error:  # the next one may succeed; if not, the lease is for others to take
                log.warning("no heartbeat: %s", error)
            if self.is_void or self.directive is Directive.ENDED:
                return
