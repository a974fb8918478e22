"""The pool of resident adapters: load adapters for requests, and evict the least recently used ones.

A resident adapter's matrices are in rows of the pool's tensors (`server.model.rank_rows`). A sequence holds all of
its adapters or none (`AdapterHold`), because two sequences with some adapters each could wait for each other
forever. A held adapter is never evicted. Threads of executors read adapters that aren't resident, and copy them
into the pool while other sequences run. Only the engine's thread uses the pool itself.
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
from adapters.lora import AdapterRef, LoraWeights
from server.errors import GenerationFailed
from server.model.device import is_out_of_memory
from server.model.lora_batch import Parts
from server.model.rank_rows import Needs, Placement, RankRows, Run, Stored

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
Load = Callable[[str], Stored]
Space = tuple[str, str]
"""The key of one of the pool's tensors: a group, and "rows" or "units"."""
NUM_READERS = 8
"""Threads that read adapters. A read from an object store can take most of a minute."""


class Extents:
    """A first-fit allocator of runs, which are integer ranges [start, start + length) below `capacity`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_free = capacity
        self._free: list[tuple[int, int]] = [(0, capacity)] if capacity else []  # (start, length), in order

    def allocate(self, length: int) -> int | None:
        """Return the start of a new range of `length` (at least 1) integers, or None if no gap is long enough."""
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
        """Free a range that `allocate` returned."""
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
        """Mark exactly these runs (start, length) as allocated. The runs must be sorted and not overlap."""
        self._free, end = [], 0
        for start, length in (*taken, (self.capacity, 0)):
            if start > end:
                self._free.append((end, start - end))
            end = start + length
        self.num_free = sum(gap for _, gap in self._free)


def started(num_threads: int, name: str) -> ThreadPoolExecutor:
    """Return an executor whose threads have all started, since the system may have no threads left later.

    Raise RuntimeError if a thread can't start.
    """
    executor = ThreadPoolExecutor(num_threads, name)
    all_started = threading.Barrier(num_threads)  # keeps each thread busy, so that each job starts a new one
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
    """Submit a call to an executor. `wake` is called when the call has ended or was cancelled.

    If the executor accepts no calls, the future fails with Unavailable.
    """
    try:
        future = executor.submit(function, *args, **kwargs)
    except RuntimeError:
        future = Future()
        future.set_exception(Unavailable("no thread of the server can load an adapter now"))
    future.add_done_callback(lambda _: wake())
    return future


class Reads:
    """Reads of adapters from disk or an object store. Each read is a future.

    A read that has begun can't be stopped, so later requests for its adapter reuse it. `wake` is called from
    another thread when a read has ended or was cancelled.
    """

    def __init__(self, load: Load, readers: Executor, wake: Callable[[], None]) -> None:
        self._load = load
        self._readers = readers
        self._wake = wake
        self._left: dict[str, Future[Stored]] = {}  # reads in progress that no request waits for

    def begin(self, digest: str) -> Future[Stored]:
        """Return a read of the adapter: one that was abandoned but is still in progress, or else a new one."""
        self._forget_ended()
        reading = self._left.pop(digest, None)
        if reading is None:
            reading = submit(self._readers, self._wake, self._load, digest)
        return reading

    def leave(self, digest: str, reading: Future[Stored]) -> None:
        """Abandon a read that no request waits for. Cancel it if it hasn't begun, else keep it for `begin`."""
        self._forget_ended()
        if not (reading.cancel() or reading.done()):
            self._left[digest] = reading

    def _forget_ended(self) -> None:
        self._left = {digest: reading for digest, reading in self._left.items() if not reading.done()}


@dataclass(eq=False)
class Adapter:
    """An adapter that is resident or being loaded. It has rows in the pool if and only if `placement` is set.

    The pool keeps the adapter while a sequence holds it (`AdapterHold`), and afterwards until its rows are needed
    for other adapters.
    """

    digest: str
    reading: Future[Stored]
    stored: Stored | None = None  # set after the read, until it is placed
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
        """Whether the adapter can be evicted."""
        return not self.num_holds and self.placing is not None and self.placing.done()

    @property
    def pending(self) -> Future[Stored] | Future[None] | None:
        """The future of the read or the copy that is loading the adapter, or None if neither is in progress."""
        work = self.reading if self.placing is None else self.placing
        return None if work.done() else work

    def start(self, space: Space) -> int:
        """Return the start of the adapter's run in a tensor of the pool (`space`).

        A run is the contiguous range of a tensor that one adapter occupies (`server.model.rank_rows`). The adapter
        must have a run in this tensor.
        """
        group, kind = space
        assert self.placement is not None
        run = self.placement[group]
        return run.first_row if kind == "rows" else run.first_unit

    def move(self, space: Space, start: int) -> None:
        """Record the new start of the adapter's run in a tensor of the pool (`space`)."""
        group, kind = space
        assert self.placement is not None
        run = self.placement[group]
        moved = replace(run, first_row=start) if kind == "rows" else replace(run, first_unit=start)
        self.placement = Placement({**self.placement, group: moved})

    @property
    def failure(self) -> SmoloraError | None:
        """The error if the adapter couldn't be copied into the pool, else None."""
        reason = self.placing.exception() if self.placing is not None and self.placing.done() else None
        if isinstance(reason, SmoloraError):
            return reason
        if reason is not None and is_out_of_memory(reason):
            return GenerationFailed("the device has no memory for an adapter of this request now; try it again")
        return None if reason is None else CorruptAdapter("An adapter of this request could not be loaded.")


@dataclass(eq=False)
class AdapterHold:
    """A sequence's hold on all of its adapters. Once `is_held` is set, none of its adapters is evicted.

    Before that, an adapter may still have to be read, or may be evicted and read again.
    """

    pool: "AdapterPool" = field(repr=False)
    refs: tuple[AdapterRef, ...]
    adapters: tuple[Adapter, ...] = ()
    is_held: bool = False  # whether the adapters have rows, filled or not, which they keep until `release`
    lacks_room: bool = False  # whether it only waits for other holds to free rows
    error: SmoloraError | None = None  # why it can never become ready
    loading: tuple[float, float] | None = None  # when the wait for cold adapters began and ended
    _cold_since: float | None = field(default=None, repr=False)
    _parts: Parts | None = field(default=None, repr=False)
    _num_moves: int = 0  # the pool's `num_moves` when `_parts` was made
    _hurry_seconds: float = 0.02  # total time that `hurry` may wait: less than a step of a full batch

    @property
    def ready(self) -> bool:
        """Whether all adapters have been copied into the pool and can be used."""
        return self.is_held and all(adapter.is_placed for adapter in self.adapters)

    def advance(self) -> bool:
        """Continue loading the adapters as far as possible without waiting. Return whether all are ready."""
        try:
            is_ready = self.pool.advance(self)
        except Exception:  # other sequences in the step don't depend on this hold
            log.exception("an adapter's load failed")
            self.error = GenerationFailed("the engine failed to load an adapter of this request; try it again")
            return False
        if not is_ready:
            self._cold_since = self._cold_since or self.pool.clock()
        elif self._cold_since is not None and self.loading is None:
            self.loading = (self._cold_since, self.pool.clock())
        return is_ready

    def hurry(self) -> None:
        """Wait for the adapters to become ready, for up to `_hurry_seconds` in all calls together."""
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
        """The adapters' placements in the pool, with their weights in the request. Use this only if `ready`."""
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
    """The resident adapters of one engine. `wake` is called from other threads when a load has progressed."""

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
        self.num_moves = 0  # times that adapters were moved to join the free rows
        self._reads = Reads(load, readers, wake)
        self._placers = placers
        self._wake = wake
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()  # least recently used first
        self._resident: frozenset[str] = frozenset()
        self._filling: list[Adapter] = []  # being placed, or placed since `_resident` was updated
        self._num_freed = 0
        self._settling: list[Adapter] = []  # released, but their rows may still be being filled
        self._spaces: dict[Space, Extents] = {}
        for group in rows.layouts:
            self._spaces[group, "rows"] = Extents(rows.num_rows(group))
            self._spaces[group, "units"] = Extents(rows.num_units(group))

    @property
    def resident(self) -> frozenset[str]:
        """The digests of the adapters that are in the pool and can be used now."""
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
        """A counter. Whenever it has grown, try sequences again whose adapters didn't fit into the pool.

        The counter grows when rows become free. It also grows when an adapter that a waiting sequence had read is
        evicted, since the next try begins to read that adapter again.
        """
        filling = [adapter for adapter in self._settling if not adapter.is_idle]
        self._num_freed += len(self._settling) - len(filling)
        self._settling = filling
        return self._num_freed

    def share(self, holds: Iterable[AdapterHold]) -> float:
        """Return the share of the pool (0 to 1) that the adapters of these holds take together."""
        adapters = self._of(holds)
        return max(_size(adapters, space) / max(extents.capacity, 1) for space, extents in self._spaces.items())

    def fits(self, hold: AdapterHold, without: Collection[AdapterHold]) -> bool:
        """Return whether a hold's adapters would fit into the pool if the holds in `without` were released.

        Call this only if the hold's adapters don't fit now.
        """
        adapters = self._of([hold])
        num_released = Counter(ref.digest for other in without for ref in other.refs)
        released = [a for a in self._of(without) if num_released[a.digest] == a.num_holds and a not in adapters]
        missing = [adapter for adapter in adapters if adapter.placement is None]
        if len(adapters) < len(hold.refs) or any(adapter.stored is None for adapter in missing):
            return False  # an adapter is being read again
        spare = released + [a for a in self._adapters.values() if a.is_idle and a not in adapters]
        return self._is_room_for(missing, spare)

    def _of(self, holds: Iterable[AdapterHold]) -> list[Adapter]:
        """Return the adapters of these holds that are in the pool or being loaded, each once."""
        digests = {ref.digest for hold in holds for ref in hold.refs}
        return [self._adapters[digest] for digest in digests if digest in self._adapters]

    def hold(self, refs: tuple[AdapterRef, ...]) -> AdapterHold:
        """Return a new hold on these adapters. It isn't ready before `advance` has loaded them."""
        return AdapterHold(self, refs, is_held=not refs)

    def advance(self, hold: AdapterHold) -> bool:
        """Continue loading a hold's adapters without waiting, and return whether the hold is ready.

        Set the hold's `error` if it can never become ready: an adapter can't be loaded, or the adapters
        together are larger than the pool.
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
        """Release a hold. Its adapters stay resident until their rows are needed for other adapters."""
        for adapter in hold.adapters:
            adapter.num_wanting -= 1
            if hold.is_held:
                adapter.num_holds -= 1
                assert adapter.num_holds >= 0, "a hold was released twice"
                if not adapter.num_holds:
                    self._settling.append(adapter)
                self._adapters.move_to_end(adapter.digest)  # it was in use until now
            elif not adapter.num_wanting and adapter.placement is None and self._has(adapter):
                del self._adapters[adapter.digest]  # only this hold waited for its read
                self._reads.leave(adapter.digest, adapter.reading)
        hold.adapters, hold.is_held, hold._parts = (), False, None
        if self.rows.lacks_pages:  # only now: earlier it would slow the steps before the first token
            submit(self._placers, lambda: None, self.rows.take_ahead)

    def _want(self, hold: AdapterHold) -> tuple[Adapter, ...]:
        """Set and return `hold.adapters`, and begin to read the adapters that the pool lacks."""
        adapters = tuple(self._find(ref.digest) for ref in hold.refs)
        for adapter in adapters:
            adapter.num_wanting += adapter not in hold.adapters
        hold.adapters = adapters
        return adapters

    def _has(self, adapter: Adapter) -> bool:
        """Return whether the pool still has this adapter object, and not a newer object with the same digest."""
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
        """Return whether the adapters would fit into the pool if all other idle adapters were evicted."""
        missing = [adapter for adapter in adapters if adapter.placement is None]
        idle = [adapter for adapter in self._adapters.values() if adapter.is_idle and adapter not in adapters]
        return self._is_room_for(missing, idle)

    def _is_room_for(self, missing: Sequence[Adapter], spare: Sequence[Adapter]) -> bool:
        return all(
            _size(missing, space) <= extents.num_free + _size(spare, space)
            for space, extents in self._spaces.items()
        )

    def _take_rows(self, adapters: Sequence[Adapter]) -> bool:
        """Allocate pool rows for all adapters that lack rows. If that fails, allocate none and return False.

        Evict idle adapters for this, the least recently used first. Adapters that a waiting hold wants are evicted
        last, since they would have to be read again. If `_has_room` is true, this fails only if an adapter whose
        rows are being filled separates the free rows. The next `advance` tries again.
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
            self._num_freed += evicted.num_wanting > 0  # the waiting hold must read it again
        for adapter in missing:
            self._place(adapter)
        for adapter in adapters:
            adapter.num_holds += 1
        return True

    def _move_together(self) -> None:
        """Move adapters so that the free rows are contiguous. Adapters that are being filled aren't moved."""
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
        """Allocate rows for all adapters and return True. If one doesn't fit, allocate none and return False."""
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
        adapter.placement = Placement(
            {
                group: Run(needs, starts[group, "rows"], starts[group, "units"])
                for group, needs in adapter.needs.items()
            }
        )
        return True

    def _place(self, adapter: Adapter) -> None:
        assert adapter.stored is not None
        assert adapter.placement is not None
        adapter.placing = submit(self._placers, self._wake, self.rows.place, adapter.stored, adapter.placement)
        adapter.stored = None  # so that the file is unmapped after the copy
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
