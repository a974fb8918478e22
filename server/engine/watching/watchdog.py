"""Tells a step that hangs from one that takes long, or whose process was stopped meanwhile. Plain arithmetic.

A step's age is added up from regular looks, each of which counts for `_LONGEST_PAUSE` at most: while the whole
process is stopped (SIGSTOP, a suspended machine, a debugger) nobody looks, and that time is nobody's.
"""

LEAST_SECONDS = 30.0
"""A step is never given up before it is so old."""
FACTOR = 20.0
"""Nor before it has taken so many times as long as the longest one before it."""
_LONGEST_PAUSE = 1.0  # seconds between two looks that may have been work


class Watchdog:
    """Watches over one thread's steps. Have it `look` every fraction of a second."""

    def __init__(self, least_seconds: float = LEAST_SECONDS) -> None:
        self._least_seconds = least_seconds
        self._looked_at: float | None = None
        self._step: int | None = None
        self._age = 0.0
        self._longest = 0.0  # of the steps that have ended

    @property
    def limit(self) -> float:
        """Seconds after which a step counts as stalled."""
        return max(self._least_seconds, FACTOR * self._longest)

    def look(self, step: int | None, now: float) -> bool:
        """Whether the step under way has stalled. `step`: its number, None between steps; `now`: seconds."""
        pause = 0.0 if self._looked_at is None else min(now - self._looked_at, _LONGEST_PAUSE)
        self._looked_at = now
        if step is not None and step == self._step:
            self._age += pause
        else:
            self._longest = max(self._longest, self._age)
            self._step, self._age = step, 0.0
        return self._age > self.limit
