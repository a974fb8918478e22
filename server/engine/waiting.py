"""The sequences of one project and adapter set that wait, and whether admitting one may succeed now.

Whose turn it is: the waiting sequences by project, and within a project by adapter set.

Projects take turns, and so do the sets of each, so neither a busy project nor a hot adapter can hold another back.
Projects with fewer sequences running come before those with more. The scheduler decides whether a sequence can be
admitted.
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
    """A sequence that lacked room, of what, and how much had been freed of it by then."""

    sequence: Sequence
    room: BlockManager | AdapterPool
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

    def lacks(self, room: BlockManager | AdapterPool, num_freed: int) -> None:
        """The first one lacked `room`, of which so much had been freed when it was tried."""
        self._refusal = _Refusal(self.first, room, num_freed)

    def hurry(self, adapters: AdapterPool) -> None:
        """Wait for the first one's adapters, for some milliseconds in all."""
        if not self.advance(adapters).ready:
            assert self.first.hold is not None
            self.first.hold.hurry()
            self.advance(adapters)

    def advance(self, adapters: AdapterPool) -> AdapterHold:
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


_MAX_TOLD = 256  # sets, in a snapshot that is taken many times a second


class WaitingQueues:
    """Every waiting sequence, of which `len` is the number; iterates over them in no particular order."""

    def __init__(self) -> None:
        self._num_sequences = 0
        # By project, then by adapter key; who comes next is first, in both.
        self._projects: OrderedDict[str, OrderedDict[bytes, WaitingSet]] = OrderedDict()

    def __len__(self) -> int:
        return self._num_sequences

    def __iter__(self) -> Iterator[Sequence]:
        for sets in self._projects.values():
            for queue in sets.values():
                yield from queue.sequences

    def digests(self) -> frozenset[str]:
        """Of the adapters that sequences wait with; of some sets where there are very many."""
        every = (queue for sets in self._projects.values() for queue in sets.values())
        return frozenset(ref.digest for queue in islice(every, _MAX_TOLD) for ref in queue.first.request.adapters)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, behind those of its set."""
        self.set_of(sequence).sequences[sequence] = None
        self._num_sequences += 1

    def put_back(self, sequence: Sequence) -> None:
        """Queue a preempted sequence, before all others of its project."""
        sequences = self.set_of(sequence).sequences
        sequences[sequence] = None
        sequences.move_to_end(sequence, last=False)
        self._num_sequences += 1
        self._projects[sequence.request.project].move_to_end(sequence.adapter_key, last=False)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it waits."""
        queue = self.set_of(sequence)
        del queue.sequences[sequence]
        self._num_sequences -= 1
        self._drop_if_empty(queue)

    def take_first(self, queue: WaitingSet) -> None:
        """Take the first one of a set out, whose turn is over then, and its project's."""
        queue.sequences.popitem(last=False)
        self._num_sequences -= 1
        self._projects[queue.project].move_to_end(queue.adapter_key)
        self._projects.move_to_end(queue.project)
        self._drop_if_empty(queue)

    def turn(self, num_running: Mapping[str, int], may_begin: Callable[[str], bool] = lambda _: True) -> "Turn":
        """Return the order to try the sets in, of the projects that may begin something in this step."""
        projects = [project for project in self._projects if may_begin(project)]
        return Turn(self, deque(sorted(projects, key=lambda project: num_running.get(project, 0))))

    def sets(self, project: str) -> Iterable[WaitingSet]:
        """Return the sets of a project, the one whose turn is next first; none if it has none."""
        return self._projects.get(project, {}).values()

    def set_of(self, sequence: Sequence) -> WaitingSet:
        """The set that the sequence waits in, or will; a new one is the last of its project."""
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
    """The sets that a step may still try. What is said of one is said of the `first`."""

    def __init__(self, queues: WaitingQueues, projects: deque[str]) -> None:
        self._queues = queues
        self._projects = projects
        self._left: dict[str, deque[WaitingSet]] = {}  # of the projects that have been looked at

    @property
    def first(self) -> WaitingSet | None:
        """The set to try next; None: all have been tried."""
        while self._projects:
            project = self._projects[0]
            if project not in self._left:
                self._left[project] = deque(self._queues.sets(project))
            if left := self._left[project]:
                return left[0]
            self._projects.popleft()
        return None

    def take_first(self) -> None:
        """Its first sequence is admitted: other sets come before its next one, and other projects before those."""
        queue = self._pop()
        self._queues.take_first(queue)
        if queue.sequences:
            self._left[queue.project].append(queue)
        self._projects.rotate(-1)

    def pass_over(self) -> None:
        """It isn't tried again in this step. It keeps its place, and the project tries another."""
        self._pop()

    def try_later(self) -> None:
        """Its first sequence has left it otherwise; the next is tried after the project's other sets."""
        queue = self._pop()
        if queue.sequences:
            self._left[queue.project].append(queue)

    def __iter__(self) -> Iterator[WaitingSet]:
        """Those left, as they would come if each were admitted. Nothing may be queued or taken meanwhile."""
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
