"""Runs of neighbouring rows in a pool of fixed size: first fit, and neighbours join when released.

Reads of adapters. One that has begun can't be stopped: whoever asks for the same again waits for that one.

One adapter of the pool, from its first reading until its rows are given to others.

Which adapters are resident: least recently used out, never one that a request holds.

A request's adapters are held all or none, as a `Hold`: one that had some and waited for others could wait for
ever. A cold adapter is read and its rows are filled by executors' threads, while other requests run; the pool
itself is touched by the engine's thread alone.
"""

import logging
import threading
import time
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar

from adapters.errors import CorruptAdapter, InvalidInput, SmoloraError, Unavailable
from adapters.lora import LoraWeights
from server.engine.request import AdapterRef
from server.errors import GenerationFailed
from server.model.device import is_out_of_memory
from server.model.lora_batch import Parts
from server.model.rank_rows import Needs, Placement, RankRows, Run, Stored


class Extents:
    """Hands out runs [start, start + length) of 0 … capacity - 1."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_free = capacity
        self._free: list[tuple[int, int]] = [(0, capacity)] if capacity else []  # (start, length), in order

    def allocate(self, length: int) -> int | None:
        """The start of a new run, or None where no gap is long enough. `length` is at least 1."""
        assert length > 0
        for i, (start, gap) in enumerate(self._free):
            if gap >= length:
                if gap == length:
                    del self._free[i]
                else:
                    self._free[i] = (start + length, gap - length)
                self.num_free -= length
                return start
        return None

    def release(self, start: int, length: int) -> None:
        """Take a run back, exactly as it was handed out."""
        i = bisect_left(self._free, (start, 0))
        if i < len(self._free):
            assert start + length <= self._free[i][0], "released twice"
        if i < len(self._free) and start + length == self._free[i][0]:
            length += self._free.pop(i)[1]
        if i and sum(self._free[i - 1]) >= start:
            assert sum(self._free[i - 1]) == start, "released twice"
            i -= 1
            before, gap = self._free.pop(i)
            start, length = before, gap + length
        self._free.insert(i, (start, length))
        self.num_free = sum(gap for _, gap in self._free)

    def reset(self, taken: Iterable[tuple[int, int]]) -> None:
        """Have just these runs (start, length) be taken; they are in order and don't overlap."""
        self._free, end = [], 0
        for start, length in (*taken, (self.capacity, 0)):
            if start > end:
                self._free.append((end, start - end))
            end = start + length
        self.num_free = sum(gap for _, gap in self._free)


Load = Callable[[str], Stored]
NUM_READERS = 8
"""Threads that read: one that must fetch its adapter from an object store may take most of a minute."""

P = ParamSpec("P")
T = TypeVar("T")


def started(num_threads: int, name: str) -> ThreadPoolExecutor:
    """Return an executor whose threads have all been started: later there may be none to be had.

    Raises RuntimeError if the system has too few now.
    """
    executor = ThreadPoolExecutor(num_threads, name)
    all_started = threading.Barrier(num_threads)  # until then none is idle, so each job starts a thread
    try:
        jobs = [executor.submit(all_started.wait) for _ in range(num_threads)]
    except RuntimeError:
        all_started.abort()
        executor.shutdown()
        raise
    for job in jobs:
        job.result()
    return executor


def submit(
    executor: Executor, wake: Callable[[], None], function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> Future[T]:
    """Have an executor's thread call the function, and `wake` when it has ended or was cancelled.

    If the executor takes no jobs, the future has failed with Unavailable.
    """
    try:
        future = executor.submit(function, *args, **kwargs)
    except RuntimeError:
        future = Future()
        future.set_exception(Unavailable("no thread of the server can load an adapter now"))
    future.add_done_callback(lambda _: wake())
    return future


class Reads:
    """`wake` is called, from another thread, when one has ended or was cancelled."""

    def __init__(self, load: Load, readers: Executor, wake: Callable[[], None]) -> None:
        self._load = load
        self._readers = readers
        self._wake = wake
        self._left: dict[str, Future[Stored]] = {}  # under way, and nobody waits for them

    def begin(self, digest: str) -> Future[Stored]:
        """One that is awaited from now on: that which was left and is still under way, or a new one."""
        self._forget_ended()
        reading = self._left.pop(digest, None)
        if reading is None:
            reading = submit(self._readers, self._wake, self._load, digest)
        return reading

    def leave(self, digest: str, reading: Future[Stored]) -> None:
        """Nobody awaits it any more. One that has not begun never does: others' may wait behind it."""
        self._forget_ended()
        if not (reading.cancel() or reading.done()):
            self._left[digest] = reading

    def _forget_ended(self) -> None:
        self._left = {digest: reading for digest, reading in self._left.items() if not reading.done()}


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


log = logging.getLogger(__name__)


@dataclass(eq=False)
class AdapterHold:
    """A hold on a set of adapters (`sequence.Hold`). Before `is_held`, `adapters` are only being read."""

    pool: "AdapterPool" = field(repr=False)
    refs: tuple[AdapterRef, ...]
    adapters: tuple[Adapter, ...] = ()
    is_held: bool = False
    lacks_room: bool = False
    error: SmoloraError | None = None
    loading: tuple[float, float] | None = None
    _cold_since: float | None = field(default=None, repr=False)
    _parts: Parts | None = field(default=None, repr=False)
    _num_moves: int = 0  # of the pool, when `_parts` was made
    _hurry_seconds: float = 0.02  # of waiting in all: less than a step of a full batch takes

    @property
    def ready(self) -> bool:
        return self.is_held and all(adapter.is_placed for adapter in self.adapters)

    def advance(self) -> bool:
        try:
            is_ready = self.pool.advance(self)
        except Exception:  # the others in the step don't depend on it
            log.exception("an adapter's load failed")
            self.error = GenerationFailed("the engine failed to load an adapter of this request; try it again")
            return False
        if not is_ready:
            self._cold_since = self._cold_since or self.pool.clock()
        elif self._cold_since is not None and self.loading is None:
            self.loading = (self._cold_since, self.pool.clock())
        return is_ready

    def hurry(self) -> None:
        end = self.pool.clock() + self._hurry_seconds
        while not (self.advance() or self.error or self.lacks_room) and self._hurry_seconds > 0:
            pending = next((work for adapter in self.adapters if (work := adapter.pending) is not None), None)
            if pending is None:
                break
            with suppress(TimeoutError, CancelledError):
                pending.exception(self._hurry_seconds)
            self._hurry_seconds = end - self.pool.clock()

    def release(self) -> None:
        self.pool.release(self)

    @property
    def parts(self) -> Parts:
        """Where the adapters lie, with their weights; only of a hold that is ready."""
        if self._parts is None or self._num_moves != self.pool.num_moves:
            self._num_moves = self.pool.num_moves
            placements = [adapter.placement for adapter in self.adapters]
            self._parts = tuple(
                (placement, ref.weight)
                for placement, ref in zip(placements, self.refs, strict=True)
                if placement is not None
            )
            assert len(self._parts) == len(self.refs), "a hold without rows was used"
        return self._parts


class AdapterPool:
    """The resident adapters of one engine. `wake` is called, from another thread, when a load has moved on."""

    def __init__(
        self,
        rows: RankRows,
        load: Load,
        readers: Executor,
        placers: Executor,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rows = rows
        self.clock = clock
        self.num_loads = 0
        self.num_evictions = 0
        self.num_moves = 0  # times that adapters were moved together
        self._reads = Reads(load, readers, wake)
        self._placers = placers
        self._wake = wake
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()  # least recently used first
        self._resident: frozenset[str] = frozenset()
        self._filling: list[Adapter] = []  # perhaps placed since `_resident` was made
        self._num_freed = 0
        self._settling: list[Adapter] = []  # given up, perhaps while their rows were being filled
        self._spaces: dict[Space, Extents] = {}
        for group in rows.layouts:
            self._spaces[group, "rows"] = Extents(rows.num_rows(group))
            self._spaces[group, "units"] = Extents(rows.num_units(group))

    @property
    def resident(self) -> frozenset[str]:
        """Digests of the adapters whose rows can be used at once."""
        filling: list[Adapter] = []
        placed: set[str] = set()
        for adapter in self._filling:
            if adapter.placing is None or not adapter.placing.done():
                filling.append(adapter)
            elif adapter.is_placed and self._has(adapter):
                placed.add(adapter.digest)
        self._filling = filling
        if placed:
            self._resident |= placed
        return self._resident

    @property
    def num_rows(self) -> int:
        return sum(extents.capacity for (_, kind), extents in self._spaces.items() if kind == "rows")

    @property
    def num_rows_used(self) -> int:
        return sum(
            extents.capacity - extents.num_free for (_, kind), extents in self._spaces.items() if kind == "rows"
        )

    @property
    def num_freed(self) -> int:
        """Grows whenever a hold that lacked room may fare otherwise: rows came free, or it lost some it had."""
        filling = [adapter for adapter in self._settling if not adapter.is_idle]
        self._num_freed += len(self._settling) - len(filling)
        self._settling = filling
        return self._num_freed

    def share(self, holds: Iterable[AdapterHold]) -> float:
        """Return the share of the rows (0 to 1) that the adapters of these holds take together."""
        adapters = self._of(holds)
        return max(_size(adapters, space) / max(extents.capacity, 1) for space, extents in self._spaces.items())

    def fits(self, hold: AdapterHold, without: Collection[AdapterHold]) -> bool:
        """Return whether a hold that lacks room would have it if the holds in `without` were released."""
        adapters = self._of([hold])
        num_released = Counter(ref.digest for other in without for ref in other.refs)
        released = [a for a in self._of(without) if num_released[a.digest] == a.num_holds and a not in adapters]
        missing = [adapter for adapter in adapters if adapter.placement is None]
        if len(adapters) < len(hold.refs) or any(adapter.stored is None for adapter in missing):
            return False  # one is being read again
        spare = released + [a for a in self._adapters.values() if a.is_idle and a not in adapters]
        return self._is_room_for(missing, spare)

    def _of(self, holds: Iterable[AdapterHold]) -> list[Adapter]:
        """Return the adapters of these holds, each once."""
        digests = {ref.digest for hold in holds for ref in hold.refs}
        return [self._adapters[digest] for digest in digests if digest in self._adapters]

    def hold(self, refs: tuple[AdapterRef, ...]) -> AdapterHold:
        """A new hold, which `advance` brings on its way and `release` ends."""
        return AdapterHold(self, refs, is_held=not refs)

    def advance(self, hold: AdapterHold) -> bool:
        """Do what can be done without waiting for the hold to become ready; whether it is.

        Sets `error` where it never will be: an adapter can't be read, or the set is larger than the pool.
        """
        if hold.is_held:
            hold.error = next(filter(None, (adapter.failure for adapter in hold.adapters)), None)
            return hold.ready
        if hold.error is not None:
            return False
        hold.lacks_room = False
        adapters = self._want(hold)
        if not all(adapter.reading.done() for adapter in adapters):
            return False
        for adapter in adapters:
            hold.error = hold.error or self._finish_reading(adapter)
        if hold.error is None and self._is_too_large(adapters):
            hold.error = InvalidInput.of(
                "adapter",
                "these adapters together need more memory than ADAPTER_CACHE_BYTES; use fewer or smaller ones",
            )
        if hold.error is None:
            hold.lacks_room = not self._has_room(adapters)
            hold.is_held = not hold.lacks_room and self._take_rows(adapters)
        return hold.ready

    def release(self, hold: AdapterHold) -> None:
        """Give up the hold; the adapters stay resident until their room is needed."""
        for adapter in hold.adapters:
            adapter.num_wanting -= 1
            if hold.is_held:
                adapter.num_holds -= 1
                assert adapter.num_holds >= 0, "a hold was released twice"
                if not adapter.num_holds:
                    self._settling.append(adapter)
                self._adapters.move_to_end(adapter.digest)  # it was in use until now
            elif not adapter.num_wanting and adapter.placement is None and self._has(adapter):
                del self._adapters[adapter.digest]  # it was read for this hold alone
                self._reads.leave(adapter.digest, adapter.reading)
        hold.adapters, hold.is_held, hold._parts = (), False, None
        if self.rows.lacks_pages:  # not sooner: it would take a core from the steps up to a first token
            submit(self._placers, lambda: None, self.rows.take_ahead)

    def _want(self, hold: AdapterHold) -> tuple[Adapter, ...]:
        """The hold's adapters; those that are not there begin to be read."""
        adapters = tuple(self._find(ref.digest) for ref in hold.refs)
        for adapter in adapters:
            adapter.num_wanting += adapter not in hold.adapters
        hold.adapters = adapters
        return adapters

    def _has(self, adapter: Adapter) -> bool:
        """Whether it was not dropped, and perhaps read anew, since a hold found it."""
        return self._adapters.get(adapter.digest) is adapter

    def _find(self, digest: str) -> Adapter:
        adapter = self._adapters.get(digest)
        if adapter is not None and adapter.failure and not adapter.num_holds:
            self._drop(adapter)
            adapter = None
        if adapter is None:
            adapter = self._adapters[digest] = Adapter(digest, self._reads.begin(digest))
        self._adapters.move_to_end(digest)
        return adapter

    def _finish_reading(self, adapter: Adapter) -> SmoloraError | None:
        failure = adapter.reading.exception()
        if failure is not None:
            self._adapters.pop(adapter.digest, None)  # the next request tries again
            if isinstance(failure, SmoloraError):
                return failure
            return CorruptAdapter("An adapter of this request could not be read.")
        if not adapter.needs:
            adapter.stored = adapter.reading.result()
            adapter.needs = self.rows.needs(adapter.stored)
        return None

    def _is_too_large(self, adapters: Sequence[Adapter]) -> bool:
        return any(_size(adapters, space) > extents.capacity for space, extents in self._spaces.items())

    def _has_room(self, adapters: Sequence[Adapter]) -> bool:
        """Return whether the adapters would have rows if all that nobody holds were evicted."""
        missing = [adapter for adapter in adapters if adapter.placement is None]
        idle = [adapter for adapter in self._adapters.values() if adapter.is_idle and adapter not in adapters]
        return self._is_room_for(missing, idle)

    def _is_room_for(self, missing: Sequence[Adapter], spare: Sequence[Adapter]) -> bool:
        return all(
            _size(missing, space) <= extents.num_free + _size(spare, space)
            for space, extents in self._spaces.items()
        )

    def _take_rows(self, adapters: Sequence[Adapter]) -> bool:
        """Place what is not placed, evicting the least recently used that nobody holds; all or none.

        Those that a waiting hold wants go last: they would be read again. Returns False if the free rows are not
        one run and an adapter between them is being filled, which ends soon.
        """
        missing = [adapter for adapter in adapters if adapter.placement is None]
        idle = [a for a in self._adapters.values() if a.is_idle and a not in adapters]
        idle.sort(key=lambda adapter: adapter.num_wanting > 0)
        while not self._allocate_all(missing):
            if not idle:
                self._move_together()
                if self._allocate_all(missing):
                    break
                return False
            evicted = idle.pop(0)
            self._drop(evicted)
            self.num_evictions += 1
            self._num_freed += evicted.num_wanting > 0  # whoever waits must have it read again
        for adapter in missing:
            self._place(adapter)
        for adapter in adapters:
            adapter.num_holds += 1
        return True

    def _move_together(self) -> None:
        """Make one run of the free rows. Adapters that are being filled stay where they are."""
        self.num_moves += 1
        for space, extents in self._spaces.items():
            placed = [a for a in self._adapters.values() if a.placement is not None and _size([a], space)]
            taken: list[tuple[int, int]] = []
            end = 0
            for adapter in sorted(placed, key=lambda adapter: adapter.start(space)):
                start, length = adapter.start(space), _size([adapter], space)
                if adapter.placing is not None and adapter.placing.done():
                    self.rows.move(*space, start, length, end)
                    adapter.move(space, end)
                    start = end
                taken.append((start, length))
                end = start + length
            extents.reset(taken)

    def _allocate_all(self, adapters: Sequence[Adapter]) -> bool:
        """Rows for all or none: whoever begins anew after an eviction can't be in its own way."""
        for i, adapter in enumerate(adapters):
            if not self._allocate(adapter):
                for other in adapters[:i]:
                    self._free_rows(other)
                return False
        return True

    def _allocate(self, adapter: Adapter) -> bool:
        starts: dict[Space, int] = {}
        for space, extents in self._spaces.items():
            if length := _size([adapter], space):
                start = extents.allocate(length)
                if start is None:
                    for taken, first in starts.items():
                        self._spaces[taken].release(first, _size([adapter], taken))
                    return False
                starts[space] = start
        adapter.placement = {
            group: Run(needs, starts[group, "rows"], starts[group, "units"])
            for group, needs in adapter.needs.items()
        }
        return True

    def _place(self, adapter: Adapter) -> None:
        assert adapter.stored is not None
        assert adapter.placement is not None
        adapter.placing = submit(self._placers, self._wake, self.rows.place, adapter.stored, adapter.placement)
        adapter.stored = None  # so that the file is unmapped once it is copied
        adapter.reading = Future()
        adapter.reading.set_result(LoraWeights({}))
        self._filling.append(adapter)
        self.num_loads += 1

    def _free_rows(self, adapter: Adapter) -> None:
        for group, run in (adapter.placement or {}).items():
            self._spaces[group, "rows"].release(run.first_row, run.rows.num_rows)
            self._spaces[group, "units"].release(run.first_unit, run.rows.num_units)
        adapter.placement = None

    def _drop(self, adapter: Adapter) -> None:
        self._free_rows(adapter)
        del self._adapters[adapter.digest]
        self._resident -= {adapter.digest}


def _size(adapters: Sequence[Adapter], space: Space) -> int:
    group, kind = space
    total = 0
    for adapter in adapters:
        rows = adapter.needs.get(group)
        if rows is not None:
            total += rows.num_rows if kind == "rows" else rows.num_units
    return total
