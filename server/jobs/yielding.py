"""Priority for serving: a file under HOME says whether requests are running, and training pauses while they are.

Niceness has no effect across containers or sessions, but containers can share a file on a volume. The file has an
entry of 8 bytes for each serving process: a time by this machine's monotonic clock in ms, and the number of
running sequences. An entry is written and read in one piece. It is ignored if it wasn't renewed for STALE_SECONDS,
or if another machine wrote it. (Reads and writes of the page cache take 1 µs. A memory mapping would save that
time, but a full disk would then kill the server.)
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
"""The most processes that may serve from one HOME at once."""
_FORMAT = struct.Struct("=Q")
_COUNT_BITS = 16

Clock = Callable[[], float]


class BusyFlag:
    """The file under HOME with the number of sequences that each serving process is running."""

    def __init__(self, home: Path, clock: Clock = time.monotonic, place: int = 0) -> None:
        """Create the file if it is missing. Raise OSError if that fails.

        `place` is the index of this process's entry in the file, below NUM_PLACES.
        """
        self._clock = clock
        self._offset = place * _FORMAT.size
        self._file = os.open(home / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._last = (0, float("-inf"))  # the last value and its time

    def set(self, num_running: int) -> None:
        """Write this process's number of running sequences if it has changed or must be renewed.

        Call this at least every STALE_SECONDS while sequences run.
        """
        now = self._clock()
        before, since = self._last
        if num_running == before and (not num_running or now - since < _RENEW_SECONDS):
            return
        self._last = (num_running, now)
        count = min(num_running, (1 << _COUNT_BITS) - 1)
        with suppress(OSError):  # if the disk is full, trainers don't yield
            os.pwrite(self._file, _FORMAT.pack(int(now * 1000) << _COUNT_BITS | count), self._offset)

    def read(self) -> int:
        """Return the number of running sequences of all serving processes."""
        stored = os.pread(self._file, _FORMAT.size * NUM_PLACES, 0)
        now, found = self._clock(), 0
        for (value,) in _FORMAT.iter_unpack(stored[: len(stored) // _FORMAT.size * _FORMAT.size]):
            if abs(now - (value >> _COUNT_BITS) / 1000) < STALE_SECONDS:
                found += value & ((1 << _COUNT_BITS) - 1)
        return found

    def close(self) -> None:
        os.close(self._file)


class Yielding:
    """The pauses of a training process.

    The process gets at most `share` of the cores' time while requests run, and all of the time otherwise.
    """

    def __init__(
        self,
        num_running: Callable[[], int],
        share: float,
        *,
        work: Clock | None = None,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Begin to measure how long this process computes.

        `num_running` is a BusyFlag's `read`. `work` returns the seconds that this process would have taken so far
        with the cores to itself, which are fewer than have elapsed if requests computed on the same cores. If
        `work` is None, all the time that elapses by `clock` counts as computing.
        """
        self._num_running = num_running
        self._share = share
        self._work = work or clock
        self._clock = clock
        self._sleep = sleep
        self._since, self._worked = clock(), self._work()
        self._debt = 0.0  # seconds to pause; below 0: seconds that requests got beyond their share

    def pause(self, go_on: Callable[[], bool] = lambda: True) -> float:
        """Sleep until this process has computed for at most `share` of the time while requests ran.

        Return the seconds slept. Call this after each micro-batch. The pause ends early if no requests run, or if
        `go_on`, which is called every few milliseconds, returns false.
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
