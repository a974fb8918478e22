"""When and where masks are computed: on the engine's thread within a budget, else on another thread.

A step waits for every mask that the engine's thread computes, and so does everybody in it. So that thread computes
only what fits into a share of the step's time, divided equally among the projects whose sequences lack a mask. The
rest is computed concurrently with the forward pass, on a thread that takes the projects in turn. All sequences
under a grammar sit steps out while masks of it are computed there (`Constraint.awaits_mask`): that changes when
their tokens come, and nothing else.
"""

import logging
import math
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from time import thread_time
from typing import NamedTuple

from llguidance import LLExecutor

from server.engine.guidance import Compiled, Constraint, Mask, masks_of
from server.engine.sequence import Sequence, Status
from server.system.threads import step_back

log = logging.getLogger(__name__)

_SHARE = 0.1
"""Of the last step's time: what masks may add to a step. Both are processor time of the engine's thread."""
_LEAST_SECONDS = 1e-3
"""What they may take in any case."""
_BATCH = 4  # masks that the other thread computes before it looks who is next
_FADE = 0.9
"""What a grammar is still assumed to take, each time it goes to the other thread, which doesn't measure."""


class Masks:
    """The budget and the other thread. The engine's thread calls it."""

    def __init__(self, vocab_size: int, wake: Callable[[], None]) -> None:
        """`wake` is called, on the other thread, each time all masks of a grammar have come."""
        self._vocab_size = vocab_size
        self._wake = wake
        self._debts: dict[str, float] = {}  # seconds that projects took beyond their shares
        self._step_begun = math.inf  # when the last step began, by the processor time of the engine's thread
        self._news = threading.Condition()
        self._queues: OrderedDict[str, deque[_Asked]] = OrderedDict()  # whose turn is next: first
        self._is_closed = False
        # Masks are computed at low priority, and nothing that needs the GIL is: others would wait for it.
        with ThreadPoolExecutor(1, initializer=step_back) as niced:
            self._executor = niced.submit(LLExecutor, 1).result()
        self._thread = threading.Thread(target=self._run, name="grammar-masks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread."""
        with self._news:
            self._is_closed = True
            self._news.notify()
        self._thread.join()

    def prepare(self, running: Iterable[Sequence]) -> None:
        """Have the masks computed that `running` sequences lack. Called before each step."""
        step_seconds = thread_time() - self._step_begun
        constraints: dict[str, list[Constraint]] = defaultdict(list)
        lacking: dict[str, dict[Compiled, list[_Asked]]] = defaultdict(lambda: defaultdict(list))
        for sequence in running:
            constraint, project = sequence.constraint, sequence.request.project
            if constraint is not None and not constraint.awaits_mask:
                constraints[project].append(constraint)
                if constraint.lacks_mask:
                    lacking[project][constraint.compiled].append(_Asked(sequence, constraint))
        share = max(_SHARE * step_seconds, _LEAST_SECONDS) / max(len(lacking), 1)
        left = {project: share - self._debts.get(project, 0.0) for project in {*lacking, *self._debts}}
        for project, grammars in lacking.items():
            for compiled, asked in sorted(grammars.items(), key=_seconds_of):  # what takes least comes first
                left[project] -= self._compute_here(project, compiled, asked, left[project])
        for project, members in constraints.items():
            for constraint in members:
                constraint.spare_seconds = max(left.get(project, share), 0.0) / len(members)
        self._debts = {project: -seconds for project, seconds in left.items() if seconds < 0}
        self._step_begun = thread_time()

    def _compute_here(self, project: str, compiled: Compiled, asked: Seq["_Asked"], seconds: float) -> float:
        """Compute a grammar's masks if all fit into `seconds`, and leave the rest to the other thread. Return the
        processor time that this took."""
        spent, todo = 0.0, deque(asked)
        if not compiled.num_pending and len(asked) * compiled.mask_seconds <= seconds:
            while todo and spent < seconds:
                begun = thread_time()
                is_there = _is_computed(todo[0].constraint)
                spent += thread_time() - begun
                if not is_there:
                    break
                todo.popleft()
        if todo:
            compiled.mask_seconds *= _FADE
            with self._news:
                compiled.num_pending += len(todo)
                self._queues.setdefault(project, deque()).extend(todo)
                self._news.notify()
        return spent

    def _run(self) -> None:
        """Compute masks until closed: the other thread."""
        while batch := self._next_batch():
            self._compute(batch)
            for one in batch:
                with self._news:
                    one.constraint.compiled.num_pending -= 1
                    is_last = not one.constraint.compiled.num_pending
                if is_last:
                    self._wake()

    def _next_batch(self) -> Seq["_Asked"]:
        """Wait for work, and take some from the projects in turn. Empty once closed."""
        batch: list[_Asked] = []
        with self._news:
            while not (self._queues or self._is_closed):
                self._news.wait()
            while self._queues and len(batch) < _BATCH and not self._is_closed:
                project, queue = self._queues.popitem(last=False)
                batch.append(queue.popleft())
                if queue:
                    self._queues[project] = queue  # behind the others
        return batch

    def _compute(self, batch: Seq["_Asked"]) -> None:
        live = [one.constraint for one in batch if one.sequence.status is not Status.FINISHED]
        masks: Seq[Mask | None] = ()
        if live:
            with _giving_up(*live):
                masks = masks_of(self._executor, [constraint.matcher for constraint in live], self._vocab_size)
        for constraint, mask in zip(live, masks, strict=False):
            with _giving_up(constraint):
                constraint.receive(mask)


class _Asked(NamedTuple):
    """A sequence that lacks a mask."""

    sequence: Sequence
    constraint: Constraint


def _is_computed(constraint: Constraint) -> bool:
    with _giving_up(constraint):
        if not constraint.compute_mask():
            return False
    return True


@contextmanager
def _giving_up(*constraints: Constraint) -> Iterator[None]:
    """Have the sequences of these constraints fail, and nobody else, if their masks can't be computed."""
    try:
        yield
    except BaseException:  # a panic of llguidance is no Exception
        log.exception("a mask can't be computed")
        for constraint in constraints:
            constraint.give_up()


def _seconds_of(grammar: tuple[Compiled, Seq[_Asked]]) -> float:
    """Return how long all of a grammar's masks may take."""
    compiled, asked = grammar
    return len(asked) * compiled.mask_seconds
