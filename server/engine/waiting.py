"""Order the waiting sequences by project, and within a project by adapter set.

The waiting sequences of a project that use the same adapters form a waiting set. Projects take turns, and so do
the waiting sets of each project. So neither a busy project nor a hot adapter can starve others. Projects with
fewer running sequences come first. The scheduler decides whether a sequence can be admitted.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from server.engine.adapter_pool import AdapterHold, AdapterPool
from server.engine.kv_cache import BlockManager
from server.engine.sequence import Sequence


@dataclass(frozen=True)
class _Refusal:
    """A failed attempt to admit a sequence, for lack of blocks or of adapter memory."""

    sequence: Sequence
    room: BlockManager | AdapterPool
    num_freed: int  # `room.num_freed` at the attempt


@dataclass
class WaitingSet:
    """The waiting sequences of one project that use the same adapters, in order of arrival. It is never empty."""

    project: str
    adapter_key: bytes
    sequences: OrderedDict[Sequence, None] = field(default_factory=OrderedDict)  # an ordered set
    num_bypassed: int = 0
    _refusal: _Refusal | None = None

    @property
    def first(self) -> Sequence:
        return next(iter(self.sequences))

    @property
    def lacks_room(self) -> bool:
        """Whether the first sequence lacked room and would lack it again, since nothing has been freed."""
        refusal = self._refusal
        return (
            refusal is not None and refusal.sequence is self.first and refusal.num_freed == refusal.room.num_freed
        )

    def lacks(self, room: BlockManager | AdapterPool, num_freed: int) -> None:
        """Record that the first sequence couldn't be admitted for lack of `room`: blocks or adapter memory.

        `num_freed` is the value of `room.num_freed` at the attempt.
        """
        self._refusal = _Refusal(self.first, room, num_freed)

    def hurry(self, adapters: AdapterPool) -> None:
        """Wait for the first sequence's adapters, over all calls for at most some milliseconds."""
        if not self.advance(adapters).ready:
            assert self.first.hold is not None
            self.first.hold.hurry()
            self.advance(adapters)

    def advance(self, adapters: AdapterPool) -> AdapterHold:
        """Continue loading the first sequence's adapters without waiting, and return its `AdapterHold`."""
        sequence = self.first
        if sequence.hold is None:
            sequence.hold = adapters.hold(sequence.request.adapters)
        num_freed = adapters.num_freed  # read before the attempt, which may itself free rows
        if sequence.hold.error is None:
            sequence.hold.advance()
            sequence.loading = sequence.hold.loading or sequence.loading
        if sequence.hold.lacks_room:
            self.lacks(adapters, num_freed)
        return sequence.hold


_MAX_LISTED = 256  # sets in a snapshot, which is taken many times a second


class WaitingQueues:
    """All waiting sequences. `len` is their number, and iteration has no particular order."""

    def __init__(self) -> None:
        self._num_sequences = 0
        # By project, then by adapter key. The next turn is first in both.
        self._projects: OrderedDict[str, OrderedDict[bytes, WaitingSet]] = OrderedDict()

    def __len__(self) -> int:
        return self._num_sequences

    def __iter__(self) -> Iterator[Sequence]:
        for sets in self._projects.values():
            for queue in sets.values():
                yield from queue.sequences

    def digests(self) -> frozenset[str]:
        """Return the digests of waiting sequences' adapters, or of a sample if there are many waiting sets."""
        listed = islice((queue for sets in self._projects.values() for queue in sets.values()), _MAX_LISTED)
        return frozenset(ref.digest for queue in listed for ref in queue.first.request.adapters)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence behind the sequences of its project that use the same adapters."""
        self.set_of(sequence).sequences[sequence] = None
        self._num_sequences += 1

    def put_back(self, sequence: Sequence) -> None:
        """Requeue a preempted sequence before all other sequences of its project."""
        sequences = self.set_of(sequence).sequences
        sequences[sequence] = None
        sequences.move_to_end(sequence, last=False)
        self._num_sequences += 1
        self._projects[sequence.request.project].move_to_end(sequence.adapter_key, last=False)

    def remove(self, sequence: Sequence) -> None:
        """Remove a waiting sequence."""
        queue = self.set_of(sequence)
        del queue.sequences[sequence]
        self._num_sequences -= 1
        self._drop_if_empty(queue)

    def take_first(self, queue: WaitingSet) -> None:
        """Remove a waiting set's first sequence. Other projects, and the project's other sets, now come first."""
        queue.sequences.popitem(last=False)
        self._num_sequences -= 1
        self._projects[queue.project].move_to_end(queue.adapter_key)
        self._projects.move_to_end(queue.project)
        self._drop_if_empty(queue)

    def turn(self, num_running: Mapping[str, int], may_begin: Callable[[str], bool] = lambda _: True) -> "Turn":
        """Return the order in which to try to admit sequences in this step.

        Projects for which `may_begin` is false are left out.
        """
        projects = [project for project in self._projects if may_begin(project)]
        return Turn(self, deque(sorted(projects, key=lambda project: num_running.get(project, 0))))

    def sets(self, project: str) -> Iterable[WaitingSet]:
        """Return the waiting sets of a project, in the order in which to try them."""
        return self._projects.get(project, {}).values()

    def set_of(self, sequence: Sequence) -> WaitingSet:
        """Return the waiting set for the sequence's project and adapters, created as the last if it is missing."""
        project, key = sequence.request.project, sequence.adapter_key
        sets = self._projects.setdefault(project, OrderedDict())
        return sets.setdefault(key, WaitingSet(project, key))

    def _drop_if_empty(self, queue: WaitingSet) -> None:
        if not queue.sequences:
            sets = self._projects[queue.project]
            del sets[queue.adapter_key]
            if not sets:
                del self._projects[queue.project]


class Turn:
    """The waiting sets from which a step may still admit sequences.

    `take_first`, `pass_over` and `try_later` are about the waiting set `first`.
    """

    def __init__(self, queues: WaitingQueues, projects: deque[str]) -> None:
        self._queues = queues
        self._projects = projects
        self._left: dict[str, deque[WaitingSet]] = {}  # untried sets of the projects that had a turn

    @property
    def first(self) -> WaitingSet | None:
        """The waiting set to try next, or None if all have been tried."""
        while self._projects:
            project = self._projects[0]
            if project not in self._left:
                self._left[project] = deque(self._queues.sets(project))
            if left := self._left[project]:
                return left[0]
            self._projects.popleft()
        return None

    def take_first(self) -> None:
        """Remove the admitted sequence, the first one of the set `first`. Other projects and sets come next."""
        queue = self._pop()
        self._queues.take_first(queue)
        if queue.sequences:
            self._left[queue.project].append(queue)
        self._projects.rotate(-1)

    def pass_over(self) -> None:
        """Skip the waiting set `first` in this step, and try its project's next set. The queues don't change."""
        self._pop()

    def try_later(self) -> None:
        """Move the set `first` behind its project's other sets, since its first sequence has failed and left."""
        queue = self._pop()
        if queue.sequences:
            self._left[queue.project].append(queue)

    def __iter__(self) -> Iterator[WaitingSet]:
        """Yield the waiting sets not tried yet in this step, in the order in which they would be tried if all fit.

        Don't queue or remove sequences while iterating.
        """
        projects = deque(iter(self._left[p] if p in self._left else self._queues.sets(p)) for p in self._projects)
        while projects:
            queue = next(projects[0], None)
            if queue is None:
                projects.popleft()
            else:
                yield queue
                projects.rotate(-1)

    def _pop(self) -> WaitingSet:
        return self._left[self._projects[0]].popleft()
