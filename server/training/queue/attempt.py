"""A worker's attempt at a job while it runs: its lease is kept, and what the queue asks of it is known."""

import logging
import threading
import time
from collections.abc import Mapping

from server.training.queue.leases import Claim, Directive, Leases

log = logging.getLogger("smolora.worker")


class Attempt:
    """A claim while it is worked on: within `with`, a thread keeps the lease and asks what is wanted."""

    def __init__(self, leases: Leases, claim: Claim, *, lease: float, heartbeat: float, look: float) -> None:
        """`lease` is how long each heartbeat keeps the job; `heartbeat` and `look` are between two heartbeats and
        between two looks at what is wanted. All in seconds.
        """
        self.claim = claim
        self.directive = Directive.GO_ON
        self.should_leave = False
        self.hindrance = ""  # why it couldn't go on, where that is no fault of the job's
        self.progress: Mapping[str, object] | None = None
        self.metrics: Mapping[str, object] | None = None
        self._leases = leases
        self._lease = lease
        self._heartbeat = heartbeat
        self._look = look
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @property
    def is_void(self) -> bool:
        """Whether nothing that comes of it counts any more."""
        return self.directive in (Directive.CANCEL, Directive.LOST)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        self._thread.join()

    def keep(self) -> None:
        """Keep the lease, and store how far the process is."""
        self.directive = self._leases.heartbeat(self.claim, self._lease, self.progress, self.metrics)

    def _run(self) -> None:
        due = 0.0
        while not self._has_ended.wait(self._look):
            try:
                if time.monotonic() >= due:
                    due = time.monotonic() + self._heartbeat
                    self.keep()
                else:
                    self.directive = self._leases.directive(self.claim)
            except Exception as error:  # the next one may succeed; if not, the lease is for others to take
                log.warning("no heartbeat: %s", error)
            if self.is_void or self.directive is Directive.ENDED:
                return
