"""Serving first: a flag under HOME that says whether requests run, and the pauses of trainers while they do.

Nice doesn't reach across containers, nor across sessions; a file on the volume that they share does. It holds a
number of 8 bytes for each that serves, which is written and read whole: a time by this machine's monotonic clock,
in ms, and how many sequences run. One that wasn't renewed for STALE_SECONDS, or is another machine's, counts as
none. (Plain reads and writes of the page cache cost 1 µs; a mapping would save that, and kill the server where a
full disk has no room for the page.)
"""

import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

FILE_NAME = "serving"
STALE_SECONDS = 2.0

_RENEW_SECONDS = 0.5
_LOOK_SECONDS = 0.02
_MAX_WORKED_SECONDS = 30.0
NUM_PLACES = 64
"""Of those that may serve from one HOME at once."""
_FORMAT = struct.Struct("=Q")
_COUNT_BITS = 16

Clock = Callable[[], float]


class BusyFlag:
    """The flag of one HOME, for the processes that serve and for those that train."""

    def __init__(self, home: Path, clock: Clock = time.monotonic, place: int = 0) -> None:
        """Makes HOME's file where there is none. `place`, below NUM_PLACES, is its own there. Raises OSError."""
        self._clock = clock
        self._offset = place * _FORMAT.size
        self._file = os.open(home / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._last = (0, float("-inf"))  # what was set, and when

    def set(self, num_running: int) -> None:
        """Say how many sequences run. Call it often while there are any; it writes only as often as it must."""
        now = self._clock()
        before, since = self._last
        if num_running == before and (not num_running or now - since < _RENEW_SECONDS):
            return
        self._last = (num_running, now)
        count = min(num_running, (1 << _COUNT_BITS) - 1)
        with suppress(OSError):  # a full disk, at worst: then trainers don't yield
            os.pwrite(self._file, _FORMAT.pack(int(now * 1000) << _COUNT_BITS | count), self._offset)

    def read(self) -> int:
        """How many sequences run."""
        stored = os.pread(self._file, _FORMAT.size * NUM_PLACES, 0)
        now, found = self._clock(), 0
        for (value,) in _FORMAT.iter_unpack(stored[: len(stored) // _FORMAT.size * _FORMAT.size]):
            if abs(now - (value >> _COUNT_BITS) / 1000) < STALE_SECONDS:
                found += value & ((1 << _COUNT_BITS) - 1)
        return found

    def close(self) -> None:
        os.close(self._file)


class Yielding:
    """A trainer's pauses: it takes at most `share` of the cores' time while requests run, all while none do."""

    def __init__(
        self,
        num_running: Callable[[], int],
        share: float,
        *,
        work: Clock | None = None,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`num_running` is a BusyFlag's `read`. The first piece of work begins now.

        `work`: seconds that it has computed so far, had it all to itself. Beside requests that compute on the same
        cores that is less than `clock` says, which counts where there is no `work`.
        """
        self._num_running = num_running
        self._share = share
        self._work = work or clock
        self._clock = clock
        self._sleep = sleep
        self._since, self._worked = clock(), self._work()
        self._debt = 0.0  # seconds to pause for; below 0: that requests had beyond their part

    def pause(self, go_on: Callable[[], bool] = lambda: True) -> float:
        """Call it after each micro-step: sleeps until the work so far is `share` of the time; the seconds.

        It ends early once no requests run, or `go_on`, which is asked every few milliseconds, says no.
        """
        start = now = self._clock()
        elapsed = start - self._since
        worked = min(self._work() - self._worked, elapsed)
        self._debt += worked / self._share - elapsed if self._share else float("inf")
        most = _MAX_WORKED_SECONDS * (1 / self._share - 1) if self._share else float("inf")
        until = start + min(self._debt, most)
        while (busy := self._num_running()) and now < until and go_on():
            self._sleep(min(_LOOK_SECONDS, until - now))
            now = self._clock()
        self._debt = max(until - now, -_MAX_WORKED_SECONDS) if busy and self._share else 0.0
        self._since, self._worked = now, self._work()
        return now - start
