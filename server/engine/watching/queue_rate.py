"""How long a request would wait for a place in the batch, by how fast places have become free. Plain arithmetic.

Only time in which all places are taken counts: an idle server's answers say nothing of how fast it is.
"""

from collections import deque


class QueueRate:
    """Watches over so many places. Have it `observe` before and after each change of the number in flight."""

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self._full_seconds = 0.0  # that all places were taken for
        self._since: float | None = None  # when they came to be; None: they aren't
        self._num_ended = 0  # within that time
        self._ends = deque([(0.0, 0)])  # (`_full_seconds`, `_num_ended`), for about two batches

    def observe(self, now: float, num_in_flight: int, num_ended: int = 0) -> None:
        """At `now` (seconds) so many sequences are in flight, after so many have just given up their places."""
        if self._since is not None:
            self._full_seconds += now - self._since
            self._num_ended += num_ended
            if num_ended:
                self._ends.append((self._full_seconds, self._num_ended))
            while len(self._ends) > 1 and self._num_ended - self._ends[1][1] >= 2 * self.num_places:
                self._ends.popleft()
        self._since = now if num_in_flight >= self.num_places else None

    def wait(self, now: float, num_ahead: int) -> float:
        """Seconds until so many will have ended; 0 before a whole batch has: nobody knows."""
        start, before = self._ends[0]
        if num_ahead <= 0 or self._num_ended < self.num_places:
            return 0.0
        full_seconds = self._full_seconds + (0.0 if self._since is None else now - self._since)
        return num_ahead * (full_seconds - start) / (self._num_ended - before)
