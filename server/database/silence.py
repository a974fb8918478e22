"""How long PostgreSQL has not answered, and whether it is worth asking it."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from adapters.errors import Silent

NOTICED_SECONDS = 3.0
"""Shorter silences don't count: an answer may be late because the machine is busy."""
PROBE_SECONDS = 1.0
"""While the server is silent, one thread in this time may ask it."""


class Silence:
    """How long the database has not answered. Thread-safe.

    `server.database.postgres.Notices` asks the server once a second, and reports here. Answers to other statements
    count, too. If nobody reports, as in a worker, the database never counts as silent.
    """

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`patience` is the silence, in seconds, after which callers aren't made to wait any longer."""
        self._patience = patience
        self._clock = clock
        self._since: float | None = None  # the oldest question without an answer
        self._probed_at = float("-inf")
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """The seconds for which the database has been silent, or 0 if it answers."""
        since = self._since
        seconds = 0.0 if since is None else self._clock() - since
        return seconds if seconds > NOTICED_SECONDS else 0.0

    @property
    def is_long(self) -> bool:
        """Whether the silence has lasted for longer than `patience`."""
        since = self._since
        return since is not None and self._clock() - since > self._patience

    def asked(self) -> None:
        """Report that the server is being asked. A question that isn't answered yet stays the oldest one."""
        with self._lock:
            self._since = self._clock() if self._since is None else self._since

    def answered(self) -> None:
        """Report the answer to the question that `asked` reported."""
        with self._lock:
            self._since = None

    def heard(self) -> None:
        """Report an answer to another question."""
        if self._since is not None:
            with self._lock:
                self._since = None if self._since is None else self._clock()

    def admit(self) -> None:
        """Raise Silent if the silence is long, except for one caller in PROBE_SECONDS."""
        if not self.is_long:
            return
        with self._lock:
            now = self._clock()
            if now - self._probed_at >= PROBE_SECONDS:
                self._probed_at = now
                return
        raise Silent


@dataclass(frozen=True)
class Outage:
    """What a server may serve from memory while its database doesn't answer.

    `silence` returns for how many seconds the database hasn't answered, or 0 if it answers. `names` and `keys` are
    the settings STALE_NAMES and STALE_KEYS: the age, in seconds, up to which names and keys may be used.
    """

    silence: Callable[[], float] = lambda: 0.0
    names: float = 0.0
    keys: float = 0.0

    @property
    def is_on(self) -> bool:
        """Whether the database doesn't answer."""
        return self.silence() > 0

    @property
    def is_survived(self) -> bool:
        """Whether requests with known keys and names can be served now."""
        return self.silence() <= min(self.names, self.keys)
