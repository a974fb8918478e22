"""How long a request would wait for a place in the batch, by how fast places have become free. Plain arithmetic.

Only time in which all places are taken counts: an idle server's answers say nothing of how fast it is.

How many sequences are in flight, by project: whether more are taken, and how many must end before one begins.

Nothing is kept of a project whose sequences have all ended, and nothing here takes longer the more there are.
"""

from collections import deque
from dataclasses import dataclass


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


@dataclass
class _Counts:
    """Of one project: its sequences, and how many of them have had a place in the batch."""

    num: int = 0
    num_begun: int = 0

    @property
    def num_waiting(self) -> int:
        return self.num - self.num_begun


class InFlight:
    """Counts of sequences, of which `num_places` run at once and `max_num` may be in flight.

    Once so many are, a project is still given its share of `max_num`, by the number of projects with something in
    flight, so that no other can keep it out. That ends at twice `max_num`.
    """

    def __init__(self, num_places: int, max_num: int) -> None:
        self.num = 0
        self.num_places = num_places
        self.max_num = max_num
        self._projects: dict[str, _Counts] = {}
        self._num_projects_waiting = 0

    def has_room(self, project: str, num: int) -> bool:
        """Whether so many more of the project are taken. Where there are none at all, any number is."""
        if not self.num or self.num + num <= self.max_num:
            return True
        own = self._projects.get(project, _Counts())
        num_projects = len(self._projects) + (not own.num)
        is_below_share = own.num * num_projects < self.max_num
        return is_below_share and own.num + num <= self.max_num and self.num + num <= 2 * self.max_num

    def add(self, project: str, num: int) -> None:
        """So many of the project are in flight from now on."""
        self._change(project, num, 0)

    def begin(self, project: str, num: int) -> None:
        """So many of its sequences in flight have got a place."""
        self._change(project, 0, num)

    def end(self, project: str, num: int, num_begun: int) -> None:
        """So many are in flight no more, of which so many had a place."""
        self._change(project, -num, -num_begun)

    def num_ahead(self, project: str) -> int:
        """Return how many sequences will end before one more of the project has a place; 0: it begins at once.

        A project gets its equal share of the places from projects that have more (`server.engine.scheduler`), so
        its first sequences wait only if there are more projects than places. The others wait for their turns.
        """
        num_before = self.num + 1 - self.num_places  # if all of them came first
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
        assert 0 <= own.num_begun <= own.num, "ended twice, or never taken"
        if not own.num:
            del self._projects[project]
