"""One adapter of the pool, from its first reading until its rows are given to others."""

from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from adapters.errors import CorruptAdapter, SmoloraError
from server.errors import GenerationFailed
from server.model.gpu import is_out_of_memory
from server.model.rank_rows import Placement, Stored
from server.model.row_layout import Needs

Space = tuple[str, str]
"""A group and "rows" or "units": one of the pool's tensors."""


@dataclass(eq=False)
class Adapter:
    """One adapter that is resident or on its way. It has rows exactly while `placement` is set.

    It is kept while any hold wants it, held or waiting, or while it has rows that nobody needs.
    """

    digest: str
    reading: Future[Stored]
    stored: Stored | None = None  # between being read and being placed
    needs: Needs = field(default_factory=dict)
    placement: Placement | None = None
    placing: Future[None] | None = None
    num_wanting: int = 0
    num_holds: int = 0

    @property
    def is_placed(self) -> bool:
        return self.placing is not None and self.placing.done() and self.failure is None

    @property
    def is_idle(self) -> bool:
        """Whether its rows can be given to others."""
        return not self.num_holds and self.placing is not None and self.placing.done()

    @property
    def pending(self) -> Future[Stored] | Future[None] | None:
        """What it waits for: to be read, or to be placed. None: for nothing."""
        work = self.reading if self.placing is None else self.placing
        return None if work.done() else work

    def start(self, space: Space) -> int:
        """Return where its run begins; only of an adapter that has one there."""
        group, kind = space
        assert self.placement is not None
        run = self.placement[group]
        return run.first_row if kind == "rows" else run.first_unit

    def move(self, space: Space, start: int) -> None:
        """Note that its run begins elsewhere now."""
        group, kind = space
        assert self.placement is not None
        run = self.placement[group]
        moved = replace(run, first_row=start) if kind == "rows" else replace(run, first_unit=start)
        self.placement = {**self.placement, group: moved}

    @property
    def failure(self) -> SmoloraError | None:
        """Why it could not be placed."""
        reason = self.placing.exception() if self.placing is not None and self.placing.done() else None
        if isinstance(reason, SmoloraError):
            return reason
        if reason is not None and is_out_of_memory(reason):
            return GenerationFailed("the device has no memory for an adapter of this request now; try it again")
        return None if reason is None else CorruptAdapter("An adapter of this request could not be loaded.")
