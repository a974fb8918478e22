"""What a run, or a merge, tells the world while it works."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol


class Reporter(Protocol):
    """Who listens to a run. Any of these may raise to end it; what was checkpointed stays."""

    def yield_or_leave(self) -> None:
        """Called at least once a micro-batch, and a module that is computed: yields to serving, and leaves where
        that is wanted.
        """
        ...

    def transferring(self, num_bytes: int) -> AbstractContextManager[None]:
        """A block that writes or reads so many bytes in calls that can't say how far they are."""
        ...

    def computing(self, num_tokens: int) -> AbstractContextManager[None]:
        """A block that trains on or measures so many tokens, in calls that can't say how far they are."""
        ...

    def progress(self, progress: Mapping[str, object], metrics: Mapping[str, object]) -> None:
        """How far the run is, after each step."""
        ...

    def metrics(self, message: str, data: Mapping[str, object]) -> None:
        """Measurements of the step `data["step"]`."""
        ...

    def checkpointed(self, step: int) -> None:
        """A checkpoint of that step is on the disk."""
        ...
