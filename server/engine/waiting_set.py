"""The sequences of one project and adapter set that wait, and whether admitting one may succeed now."""

from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from server.engine.request import AdapterRef
from server.engine.sequence import Hold, Sequence


class Room(Protocol):
    """Something that sequences hold parts of: blocks, or adapters' rows."""

    @property
    def num_freed(self) -> int:
        """Grows whenever a part comes free: until then, whoever lacked room is tried in vain."""
        ...


class Adapters(Room, Protocol):
    """What the scheduler needs of `adapter_pool.AdapterPool`."""

    def hold(self, refs: tuple[AdapterRef, ...]) -> Hold:
        """A new hold on a set of adapters, not ready yet."""
        ...

    def share(self, holds: Iterable[Hold]) -> float:
        """Return the share of the rows (0 to 1) that the adapters of these holds take together."""
        ...

    def fits(self, hold: Hold, without: Collection[Hold]) -> bool:
        """Return whether a hold that lacks room would have it if the holds in `without` were released."""
        ...


@dataclass(frozen=True)
class _Refusal:
    """A sequence that lacked room, of what, and how much had been freed of it by then."""

    sequence: Sequence
    room: Room
    num_freed: int


@dataclass
class WaitingSet:
    """The waiting sequences of one adapter set of a project, in order of arrival; it is never empty."""

    project: str
    adapter_key: bytes
    sequences: OrderedDict[Sequence, None] = field(default_factory=OrderedDict)  # of which any goes at once
    num_bypassed: int = 0
    _refusal: _Refusal | None = None

    @property
    def first(self) -> Sequence:
        return next(iter(self.sequences))

    @property
    def lacks_room(self) -> bool:
        """Whether the first one lacked room and nothing has been freed since: trying again would be in vain."""
        refusal = self._refusal
        return (
            refusal is not None and refusal.sequence is self.first and refusal.num_freed == refusal.room.num_freed
        )

    def lacks(self, room: Room, num_freed: int) -> None:
        """The first one lacked `room`, of which so much had been freed when it was tried."""
        self._refusal = _Refusal(self.first, room, num_freed)

    def hurry(self, adapters: Adapters) -> None:
        """Wait for the first one's adapters, for some milliseconds in all."""
        if not self.advance(adapters).ready:
            assert self.first.hold is not None
            self.first.hold.hurry()
            self.advance(adapters)

    def advance(self, adapters: Adapters) -> Hold:
        """Bring the first one's adapters on their way, as far as that goes without waiting."""
        sequence = self.first
        if sequence.hold is None:
            sequence.hold = adapters.hold(sequence.request.adapters)
        num_freed = adapters.num_freed  # before: the attempt may itself free what is in its way
        if sequence.hold.error is None:
            sequence.hold.advance()
            sequence.loading = sequence.hold.loading or sequence.loading
        if sequence.hold.lacks_room:
            self.lacks(adapters, num_freed)
        return sequence.hold
