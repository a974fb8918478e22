"""Share engine time equally among the projects that have sequences running.

A step's seconds of work are charged to its projects by their tokens, on a clock for each (start-time fair
queueing; Sheng et al., "Fairness in Serving Large Language Models", 2024, count tokens). A project whose clock is
ahead of the slowest running project's by `SLACK` sits out until the others have caught up. A project that begins
to run starts `SLACK` behind, so a short request of a light project runs as if it were alone. Unused time is not
saved up.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from server.engine.sequence import Chunk

SLACK = 0.25
"""Seconds of engine time. A larger slack leaves more answers of a light project undisturbed, but pauses heavy
projects for longer."""
_AHEAD = 0.999 * SLACK  # allows for rounding, since clocks are sums of floats
_MAX_LEAD = 1.0  # seconds; one long step must not pause its projects for long
_MAX_IDLE = 64  # projects without running sequences whose clocks are kept


class ProjectShares:
    """The projects' clocks, in seconds of engine time."""

    def __init__(self) -> None:
        self._used: dict[str, float] = {}
        self._floor = 0.0  # the slowest running project's clock; it never decreases
        self._resting: set[str] = set()  # projects that sit out until the slowest one has caught up

    def enter(self, project: str) -> None:
        """Set the clock of a project that has nothing running, before it begins."""
        least = self._floor - SLACK
        self._used[project] = min(max(self._used.get(project, least), least), self._floor + _MAX_LEAD)
        self._resting.discard(project)

    def used(self, project: str) -> float:
        """Return the clock of a project that has something running or has entered."""
        return self._used[project]

    def lead(self, project: str, other: str) -> float:
        """Return by how many seconds one project's clock is ahead of another's."""
        return self._used[project] - self._used[other]

    def is_ahead(self, project: str, other: str) -> bool:
        """Return whether one project's clock is ahead of another's by the slack."""
        return self.lead(project, other) >= _AHEAD

    def due(self, running: Collection[str]) -> frozenset[str]:
        """Return the projects, of those with sequences running, that take part in the next step: at least one."""
        if len(running) > 1:
            least = min(self._used[project] for project in running)
            for project in running:
                if self._used[project] - least >= _AHEAD:
                    self._resting.add(project)
                elif self._used[project] <= least:
                    self._resting.discard(project)
        else:
            self._resting.clear()
        return frozenset(running) - self._resting

    def charge(self, chunks: Sequence[Chunk], seconds: float, running: Collection[str]) -> None:
        """Charge a step to its projects by their tokens. `running` are all projects with sequences running."""
        tokens: Counter[str] = Counter()
        for chunk in chunks:
            tokens[chunk.sequence.request.project] += chunk.num_tokens
        for project, num in tokens.items():
            self._used[project] += seconds * num / tokens.total()
        self._floor = max(self._floor, min(self._used[project] for project in running))
        for project in tokens:
            self._used[project] = min(self._used[project], self._floor + _MAX_LEAD)
        if len(self._used) > len(running) + _MAX_IDLE:
            self._used = {p: used for p, used in self._used.items() if p in running or used > self._floor}

    def clear(self) -> None:
        """Forget all projects: nothing is running or waiting."""
        self._used.clear()
        self._resting.clear()
        self._floor = 0.0
