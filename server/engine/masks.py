"""Compute the masks of constrained sequences, on the engine's thread within a budget, or else on another thread.

All sequences of a step wait for the masks that the engine's thread computes. So this thread only computes masks
that fit into its budget, a share of the step's time. The projects whose sequences lack a mask share the budget
equally. The other thread computes the remaining masks concurrently with the forward pass, and takes the projects
in turn. Meanwhile all sequences under the same grammar skip steps (`Constraint.awaits_mask`). This delays their
tokens, but doesn't change them.
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
"""The budget as a share of the last step's time. These times are processor time of the engine's thread."""
_LEAST_SECONDS = 1e-3
"""The minimum budget."""
_BATCH = 4  # masks that the mask thread computes at a time
_FADE = 0.9
"""Factor on a grammar's estimated mask time each time the mask thread, which doesn't measure it, gets masks."""


class Masks:
    """The computation of masks, on the engine's thread and on a mask thread.

    Only the engine's thread may call the methods.
    """

    def __init__(self, vocab_size: int, wake: Callable[[], None]) -> None:
        """`wake` is called on the mask thread when all requested masks of a grammar are ready."""
        self._vocab_size = vocab_size
        self._wake = wake
        self._debts: dict[str, float] = {}  # seconds that projects used beyond their shares
        self._step_begun = math.inf  # processor time of the engine's thread when the last step began
        self._news = threading.Condition()
        self._queues: OrderedDict[str, deque[_Asked]] = OrderedDict()  # by project; the next turn is first
        self._is_closed = False
        # The executor's threads have a low priority. `_thread` must not have one: it holds the GIL at times, and
        # other threads wait for the GIL.
        with ThreadPoolExecutor(1, initializer=step_back) as niced:
            self._executor = niced.submit(LLExecutor, 1).result()
        self._thread = threading.Thread(target=self._run, name="grammar-masks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the mask thread."""
        with self._news:
            self._is_closed = True
            self._news.notify()
        self._thread.join()

    def prepare(self, running: Iterable[Sequence]) -> None:
        """Compute the masks that `running` sequences lack, or request them from the mask thread.

        Call this before each step.
        """
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
            for compiled, asked in sorted(grammars.items(), key=_seconds_of):  # the quickest first
                left[project] -= self._compute_here(project, compiled, asked, left[project])
        for project, members in constraints.items():
            for constraint in members:
                constraint.spare_seconds = max(left.get(project, share), 0.0) / len(members)
        self._debts = {project: -seconds for project, seconds in left.items() if seconds < 0}
        self._step_begun = thread_time()

    def _compute_here(self, project: str, compiled: Compiled, asked: Seq["_Asked"], seconds: float) -> float:
        """Compute a grammar's masks on the engine's thread if all are expected to fit into `seconds`.

        Masks that aren't computed here are requested from the mask thread. Return the processor time used.
        """
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
        """Run the mask thread: compute masks until closed."""
        while batch := self._next_batch():
            self._compute(batch)
            for one in batch:
                with self._news:
                    one.constraint.compiled.num_pending -= 1
                    is_last = not one.constraint.compiled.num_pending
                if is_last:
                    self._wake()

    def _next_batch(self) -> Seq["_Asked"]:
        """Wait until masks are requested, and return some of the requests. Projects take turns.

        Return an empty list if `close` was called.
        """
        batch: list[_Asked] = []
        with self._news:
            while not (self._queues or self._is_closed):
                self._news.wait()
            while self._queues and len(batch) < _BATCH and not self._is_closed:
                project, queue = self._queues.popitem(last=False)
                batch.append(queue.popleft())
                if queue:
                    self._queues[project] = queue  # after the other projects
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
    """A request for a mask: a sequence that lacks a mask, and its constraint."""

    sequence: Sequence
    constraint: Constraint


def _is_computed(constraint: Constraint) -> bool:
    with _giving_up(constraint):
        if not constraint.compute_mask():
            return False
    return True


@contextmanager
def _giving_up(*constraints: Constraint) -> Iterator[None]:
    """If the code in the context raises, fail the sequences of these constraints and no others."""
    try:
        yield
    except BaseException:  # a panic of llguidance isn't an Exception
        log.exception("a mask can't be computed")
        for constraint in constraints:
            constraint.give_up()


def _seconds_of(grammar: tuple[Compiled, Seq[_Asked]]) -> float:
    """Estimate the processor time for all masks that were requested for a grammar."""
    compiled, asked = grammar
    return len(asked) * compiled.mask_seconds
