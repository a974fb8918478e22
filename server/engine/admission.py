"""Decide whether the engine accepts more sequences, and estimate how long they would wait to begin.

`InFlight` counts the sequences of each project. `QueueRate` measures how fast sequences end while all places in
the batch are taken. Their methods are plain arithmetic, whose time doesn't depend on the number of sequences.
"""

from collections import deque
from dataclasses import dataclass


class QueueRate:
    """The rate at which sequences end while all `num_places` places in the batch are taken.

    Times at which a place is free don't count, since they don't show the server's throughput.
    """

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self._full_seconds = 0.0  # time in which all places were taken
        self._since: float | None = None  # the last `observe` if all places were taken then; else None
        self._num_ended = 0  # sequences that ended in `_full_seconds`
        self._ends = deque([(0.0, 0)])  # (`_full_seconds`, `_num_ended`) after each end, for two batches

    def observe(self, now: float, num_in_flight: int, num_ended: int = 0) -> None:
        """Record at time `now` how many sequences are in flight, and that `num_ended` have left the batch.

        Call this after each change of the number in flight. Times are in seconds.
        """
        if self._since is not None:
            self._full_seconds += now - self._since
            self._num_ended += num_ended
            if num_ended:
                self._ends.append((self._full_seconds, self._num_ended))
            while len(self._ends) > 1 and self._num_ended - self._ends[1][1] >= 2 * self.num_places:
                self._ends.popleft()
        self._since = now if num_in_flight >= self.num_places else None

    def wait(self, now: float, num_ahead: int) -> float:
        """Estimate the seconds until `num_ahead` sequences have ended.

        Return 0 while fewer than `num_places` sequences have ended, since the rate isn't known yet.
        """
        start, before = self._ends[0]
        if num_ahead <= 0 or self._num_ended < self.num_places:
            return 0.0
        full_seconds = self._full_seconds + (0.0 if self._since is None else now - self._since)
        return num_ahead * (full_seconds - start) / (self._num_ended - before)


@dataclass
class _Counts:
    """How many sequences of one project are in flight."""

    num: int = 0
    num_begun: int = 0  # sequences that have had a place in the batch

    @property
    def num_waiting(self) -> int:
        return self.num - self.num_begun


class InFlight:
    """The number of sequences in flight by project.

    `num_places` sequences run at once, and up to `max_num` are accepted. When `max_num` are in flight, a project
    with less than its equal share may still add sequences, so that other projects can't keep it out. The hard
    limit is twice `max_num`.
    """

    def __init__(self, num_places: int, max_num: int) -> None:
        self.num = 0
        self.num_places = num_places
        self.max_num = max_num
        self._projects: dict[str, _Counts] = {}
        self._num_projects_waiting = 0

    def has_room(self, project: str, num: int) -> bool:
        """Return whether `num` more sequences of the project are accepted.

        If no sequences are in flight, any number is accepted.
        """
        if not self.num or self.num + num <= self.max_num:
            return True
        own = self._projects.get(project, _Counts())
        num_projects = len(self._projects) + (not own.num)
        is_below_share = own.num * num_projects < self.max_num
        return is_below_share and own.num + num <= self.max_num and self.num + num <= 2 * self.max_num

    def add(self, project: str, num: int) -> None:
        """Count `num` new sequences of the project."""
        self._change(project, num, 0)

    def begin(self, project: str, num: int) -> None:
        """Record that `num` of the project's sequences have got a place in the batch."""
        self._change(project, 0, num)

    def end(self, project: str, num: int, num_begun: int) -> None:
        """Remove `num` sequences of the project. `num_begun` of them had a place in the batch."""
        self._change(project, -num, -num_begun)

    def num_ahead(self, project: str) -> int:
        """Return how many sequences will end before one more sequence of the project gets a place in the batch.

        The scheduler gives a project its equal share of the places by preempting projects that have more. So the
        project's first sequences wait only if there are more projects than places. For further sequences, the
        waiting projects take turns.
        """
        num_before = self.num + 1 - self.num_places  # if all others came first
        if num_before <= 0:
            return 0
        own = self._projects.get(project, _Counts())
        num_projects = len(self._projects) + (not own.num)
        share = max(self.num_places // num_projects, 1)
        num_own = max(own.num + 1 - max(min(own.num_begun, self.num_places), share), 0)
        num_turns = self._num_projects_waiting + (not own.num_waiting)
        num_lacking = 0 if own.num_begun else max(num_projects - self.num_places, 0)
        return min(num_before, num_own * num_turns + num_lacking)

    def _change(self, project: str, num: int, num_begun: int) -> None:
        own = self._projects.setdefault(project, _Counts())
        self._num_projects_waiting -= own.num_waiting > 0
        own.num += num
        own.num_begun += num_begun
        self.num += num
        self._num_projects_waiting += own.num_waiting > 0
        assert 0 <= own.num_begun <= own.num, "ended twice, or never accepted"
        if not own.num:
            del self._projects[project]
