"""Share engine time equally among the projects that have sequences running.

Each project has a clock: the seconds of engine time that it is charged with. A step's seconds of work are divided
among its projects in proportion to their tokens, and added to their clocks. This is start-time fair queueing
(Sheng et al., "Fairness in Serving Large Language Models", 2024, charge tokens instead of seconds). A project
whose clock is ahead of the slowest running project's clock by `SLACK` skips steps until the slowest one has caught
up. A project that has used nothing lately starts `SLACK` behind the slowest one, so a short request of a light
project runs as if it were alone. Unused time is not saved up.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from server.engine.sequence import Chunk

SLACK = 0.25
"""Seconds of engine time. A larger slack leaves more answers of a light project undisturbed, but pauses heavy
projects for longer."""
_AHEAD = 0.999 * SLACK  # allows for rounding, since clocks are sums of floats
_MAX_LEAD = 1.0  # seconds ahead of the slowest project; one long step must not pause its projects for long
_MAX_IDLE = 64  # number of clocks that are kept for projects without running sequences


class ProjectShares:
    """Each project's clock: how many seconds of engine time the project is charged with."""

    def __init__(self) -> None:
        self._used: dict[str, float] = {}
        self._floor = 0.0  # the slowest running project's clock; it never decreases
        self._resting: set[str] = set()  # projects that sit out until the slowest one has caught up

    def enter(self, project: str) -> None:
        """Limit how far the project's clock is ahead of or behind the slowest running project's.

        A project's clock is the engine time that it is charged with. Call this before the project starts a
        sequence, if none of its sequences runs.
        """
        least = self._floor - SLACK
        self._used[project] = min(max(self._used.get(project, least), least), self._floor + _MAX_LEAD)
        self._resting.discard(project)

    def used(self, project: str) -> float:
        """Return how many seconds of engine time the project is charged with.

        The project must have running sequences, or `enter` must have been called for it.
        """
        return self._used[project]

    def lead(self, project: str, other: str) -> float:
        """Return how many seconds of engine time more `project` is charged with than `other`."""
        return self._used[project] - self._used[other]

    def is_ahead(self, project: str, other: str) -> bool:
        """Return whether `project` is charged with at least `SLACK` seconds of engine time more than `other`."""
        return self.lead(project, other) >= _AHEAD

    def due(self, running: Collection[str]) -> frozenset[str]:
        """Return which of the `running` projects take part in the next step: at least one."""
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
        """Divide a step's seconds among the projects of its chunks, in proportion to their tokens.

        `running` are all projects with running sequences.
        """
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
        """Forget all projects. Call this when nothing is running or waiting."""
        self._used.clear()
        self._resting.clear()
        self._floor = 0.0
