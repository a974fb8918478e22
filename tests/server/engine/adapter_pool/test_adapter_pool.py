"""The adapter pool: room, eviction, failures and aborts."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from adapters.errors import CorruptAdapter, InvalidInput, NotFound
from adapters.lora import MODULES, AdapterRef, LoraModule, LoraWeights, ModuleKey
from server.engine.adapter_pool import AdapterPool
from tests.server.engine.adapter_pool.pool_bench import Bench, adapter


def test_a_cold_adapter_is_read_then_placed_and_wakes_each_time() -> None:
    bench = Bench({"a": adapter(1.0)}, 2)
    hold = bench.hold("a")
    assert not hold.advance()
    assert len(bench.executor.tasks) == 1
    assert not hold.advance(), "asking again starts nothing new"
    assert len(bench.executor.tasks) == 1
    bench.executor.run_one()
    assert bench.num_wakes == 1
    assert not hold.advance()
    assert hold.is_held
    assert not hold.ready
    assert bench.pool.resident == frozenset()
    bench.executor.run_one()
    assert bench.num_wakes == 2
    assert hold.advance()
    assert bench.pool.resident == {"a"}
    assert (bench.pool.num_loads, bench.pool.num_evictions) == (1, 0)
    bench.check()


def test_the_base_needs_no_rows() -> None:
    hold = Bench({}, 1).hold()
    assert hold.advance()
    assert hold.parts == ()


def test_parts_have_each_adapters_place_and_weight() -> None:
    bench = Bench({"a": adapter(1.0), "b": adapter(2.0)}, 4)
    hold = bench.pool.hold((AdapterRef("a", 0.5), AdapterRef("b", -2.0)))
    bench.ready("a", "b")
    assert hold.advance()
    assert [weight for _, weight in hold.parts] == [0.5, -2.0]
    for (placement, _), digest in zip(hold.parts, "ab", strict=True):
        assert placement is bench.pool._adapters[digest].placement


def test_resident_adapters_are_not_read_again() -> None:
    bench = Bench({"a": adapter(1.0)}, 1)
    bench.ready("a").release()
    assert bench.hold("a").advance()
    assert bench.num_reads == 1


def test_the_least_recently_used_adapter_is_evicted_first() -> None:
    bench = Bench({name: adapter(float(i)) for i, name in enumerate("abcd")}, 3)
    for name in "abc":
        bench.ready(name).release()
    bench.ready("a").release()
    bench.ready("d").release()
    assert bench.pool.resident == {"a", "c", "d"}
    assert bench.pool.num_evictions == 1


def test_use_lasts_until_the_release() -> None:
    bench = Bench({name: adapter(float(i)) for i, name in enumerate("abc")}, 2)
    long_user = bench.ready("a")
    bench.ready("b").release()
    long_user.release()
    bench.ready("c")
    assert bench.pool.resident == {"a", "c"}


def test_adapters_in_use_are_never_evicted() -> None:
    bench = Bench({name: adapter(float(i)) for i, name in enumerate("abc")}, 2)
    first, second = bench.ready("a"), bench.ready("b")
    third = bench.hold("c")
    third.advance()
    bench.executor.run_all()
    assert not third.advance()
    assert (third.lacks_room, third.is_held) == (True, False)
    assert bench.pool.resident == {"a", "b"}
    second.release()
    third.advance()
    bench.executor.run_all()
    assert third.advance()
    assert not third.lacks_room
    assert bench.pool.resident == {"a", "c"}
    assert first.ready


def test_all_or_none() -> None:
    """Two overlapping sets of which only one fits: neither holds a part that the other needs."""
    bench = Bench({name: adapter(float(i)) for i, name in enumerate("abcd")}, 3)
    first = bench.ready("a", "b")
    second = bench.hold("b", "c", "d")
    second.advance()
    bench.executor.run_all()
    assert not second.advance()
    assert second.lacks_room
    assert bench.pool.num_rows_used == 2 * len(MODULES)
    first.release()
    second.advance()
    bench.executor.run_all()
    assert second.advance()
    bench.check()


def test_a_set_larger_than_the_pool_is_refused() -> None:
    bench = Bench({"a": adapter(1.0, rank=2), "b": adapter(2.0, rank=2)}, 3)
    hold = bench.hold("a", "b")
    hold.advance()
    bench.executor.run_all()
    assert not hold.advance()
    assert isinstance(hold.error, InvalidInput)
    assert hold.error.errors[0].loc == ("adapter",)
    hold.release()
    assert not bench.pool._adapters, "what was read for it alone is dropped"
    bench.ready("a").release()


def test_an_adapters_size_depends_on_its_modules() -> None:
    """Eight q-only adapters of rank 3 fill the rows that eight ranks of q, k and v have; one more evicts."""
    bench = Bench({str(i): adapter(float(i), rank=3, modules=("q_proj",)) for i in range(9)}, 8)
    for i in range(5):
        bench.ready(str(i)).release()
    assert bench.pool.num_evictions == 0
    for i in range(9):
        bench.ready(str(i)).release()
    assert bench.pool.num_evictions > 0
    bench.check()


def test_an_adapter_does_not_block_its_own_set() -> None:
    """There is enough room, but not in one piece: x is in the middle, and is itself part of the requested set."""
    bench = Bench({"s": adapter(1.0, rank=3), "x": adapter(2.0, rank=4), "y": adapter(3.0, rank=6)}, 10)
    spacer = bench.ready("s")
    bench.ready("x").release()
    spacer.release()
    filler = bench.hold("s")  # s is resident but idle: it can be evicted
    filler.release()
    bench.ready("x", "y")
    assert bench.pool.resident == {"x", "y"}


def test_a_failed_read_fails_its_hold_and_the_next_one_tries_again() -> None:
    bench = Bench({"a": CorruptAdapter("gone"), "b": adapter(1.0)}, 2)
    hold, other = bench.hold("a", "b"), bench.hold("b")
    hold.advance()
    other.advance()
    bench.executor.run_all()
    assert not hold.advance()
    assert str(hold.error) == "gone"
    assert not hold.advance()
    assert len(bench.executor.tasks) == 0, "a hold that has failed reads nothing more"
    hold.release()
    other.advance()
    bench.executor.run_all()
    assert other.advance(), "b is fine"
    bench.library["a"] = adapter(2.0)
    bench.ready("a")


@pytest.mark.parametrize(
    "fault", [NotFound("no such adapter"), OSError("/secret/path"), KeyError("x"), MemoryError()]
)
def test_the_error_reveals_no_secrets(fault: Exception) -> None:
    bench = Bench({"a": fault}, 2)
    hold = bench.hold("a")
    hold.advance()
    bench.executor.run_all()
    hold.advance()
    assert hold.error is not None
    assert "secret" not in str(hold.error)
    assert isinstance(hold.error, NotFound if isinstance(fault, NotFound) else CorruptAdapter)


@pytest.mark.parametrize(
    "misfit",
    [
        LoraWeights({ModuleKey(0, "q_proj"): LoraModule(torch.ones(1, 5), torch.ones(8, 1), 1.0)}),
        LoraWeights({ModuleKey(1, "o_proj"): LoraModule(torch.ones(1, 4), torch.ones(5, 1), 1.0)}),
        LoraWeights({ModuleKey(2, "q_proj"): LoraModule(torch.ones(1, 4), torch.ones(8, 1), 1.0)}),
    ],
    ids=["in", "out", "layers"],
)
def test_an_adapter_of_another_base_fails_and_leaves_no_rows_behind(misfit: LoraWeights) -> None:
    bench = Bench({"misfit": misfit, "a": adapter(1.0), "b": adapter(2.0)}, 2)
    first, second = bench.hold("misfit"), bench.hold("a", "misfit")
    for hold in (first, second):
        for _ in range(4):
            hold.advance()
            bench.executor.run_all()
        assert isinstance(hold.error, CorruptAdapter)
        assert "misfit" not in bench.pool.resident
    first.release()
    second.release()
    bench.ready("a", "b")
    bench.check()


def test_an_abort_does_not_restart_another_read() -> None:
    """Clients that give up while a slow adapter is read must not starve the others."""
    bench = Bench({"a": adapter(1.0), "b": adapter(2.0)}, 4)
    first, second = bench.hold("a"), bench.hold("a", "b")
    first.advance()
    second.advance()
    assert len(bench.executor.tasks) == 2
    first.release()
    assert not second.advance()
    assert len(bench.executor.tasks) == 2
    bench.executor.run_all()
    second.advance()
    bench.executor.run_all()
    assert second.advance()
    assert bench.num_reads == 2


def test_a_read_for_an_aborted_request_is_dropped() -> None:
    bench = Bench({"a": adapter(1.0)}, 1)
    for num_done in (0, 1):
        hold = bench.hold("a")
        hold.advance()
        if num_done:
            bench.executor.run_all()
        hold.release()
        assert not bench.pool._adapters
    bench.executor.run_all()
    bench.ready("a")


def test_a_queued_read_for_an_aborted_request_is_cancelled() -> None:
    """Other reads wait behind it, and fetching it may take long."""
    bench = Bench({name: adapter(1.0) for name in "abc"}, 2)
    gone, stays = bench.hold("a", "b"), bench.hold("b", "c")
    for hold in (gone, stays):
        hold.advance()
    gone.release()
    bench.executor.run_all()
    assert bench.num_reads == 2
    assert not stays.advance()
    bench.executor.run_all()
    assert stays.advance()
    stays.release()
    bench.ready("a")


def test_a_read_in_progress_is_reused_after_an_abort() -> None:
    """A client that gave up and retried used to occupy one more thread each time."""
    slow = Bench({"slow": adapter(1.0), "quick": adapter(2.0)}, 2)
    for _ in range(3):
        hold = slow.hold("slow")
        hold.advance()
        ((reading, task),) = slow.executor.tasks
        assert reading.running() or reading.set_running_or_notify_cancel()
        hold.release()
        assert not slow.pool._adapters
    hold = slow.hold("slow")
    assert not hold.advance()
    slow.executor.tasks.clear()
    reading.set_result(task())
    hold.advance()
    slow.executor.run_all()
    assert hold.advance()
    assert slow.num_reads == 1


def test_a_failed_read_without_a_waiting_request_is_ignored() -> None:
    bench = Bench({"a": adapter(1.0)}, 1)
    hold = bench.hold("a")
    hold.advance()
    ((reading, _),) = bench.executor.tasks
    reading.set_running_or_notify_cancel()
    hold.release()
    bench.executor.tasks.clear()
    reading.set_exception(OSError("the store doesn't answer"))
    bench.ready("a")


def test_repeated_requests_leave_threads_to_others() -> None:
    """A slow adapter may occupy only one of the threads."""
    began, go, quick = threading.Semaphore(0), threading.Event(), threading.Event()

    def load(digest: str) -> LoraWeights:
        if digest == "quick":
            quick.set()
        else:
            began.release()
            assert go.wait(60)
        return adapter(1.0)

    bench = Bench({}, 2)
    with ThreadPoolExecutor(2) as readers:
        pool = AdapterPool(bench.pool.rows, load, readers, bench.executor, bench.wake)
        try:
            for seconds in (60, 0.2):  # only the first one starts
                hold = pool.hold((AdapterRef("slow"),))
                hold.advance()
                began.acquire(timeout=seconds)
                hold.release()
            pool.hold((AdapterRef("quick"),)).advance()
            assert quick.wait(10)
        finally:
            go.set()


def test_an_abort_frees_rows_only_after_they_are_filled() -> None:
    bench = Bench({"a": adapter(1.0), "b": adapter(2.0)}, 1)
    first = bench.hold("a")
    first.advance()
    bench.executor.run_all()
    first.advance()
    assert first.is_held
    first.release()
    second = bench.hold("b")
    second.advance()
    assert len(bench.executor.tasks) == 2  # a being placed, b being read
    bench.executor.run_one(1)
    assert not second.advance()
    assert second.lacks_room
    assert not second.is_held, "the rows are still being written"
    bench.executor.run_one(0)
    second.advance()
    bench.executor.run_all()
    assert second.advance()
    bench.check()


def test_an_adapter_without_modules() -> None:
    bench = Bench({"nothing": LoraWeights({}), "a": adapter(1.0)}, 1)
    hold = bench.ready("a", "nothing")
    assert [len(placement) for placement, _ in hold.parts] == [4, 0]
    hold.release()
    again = bench.hold("nothing")
    assert again.advance()
    again.release()


def test_holds_of_the_same_adapter_share_its_rows() -> None:
    bench = Bench({"a": adapter(1.0)}, 1)
    first, second = bench.ready("a"), bench.ready("a")
    assert first.parts[0][0] is second.parts[0][0]
    first.release()
    assert second.ready
    assert bench.pool._adapters["a"].num_holds == 1


def test_a_hold_records_how_long_its_adapters_loaded() -> None:
    """The time runs from the first attempt to the one that finds them loaded. It is 0 if they were loaded
    already."""
    bench = Bench({"a": adapter(1.0)}, 2)
    now = [10.0]
    bench.pool.clock = lambda: now[0]
    cold = bench.hold("a")
    assert not cold.advance()
    for moment in (11.0, 12.5):
        now[0] = moment
        bench.executor.run_one()
        assert cold.loading is None
        is_ready = cold.advance()
    assert is_ready
    now[0] = 99.0
    assert cold.advance()
    assert cold.loading == (10.0, 12.5)
    warm = bench.hold("a")
    assert warm.advance()
    assert warm.loading is None


def test_adapters_are_moved_if_the_free_rows_are_not_one_run() -> None:
    """A large set used to wait for long answers to end, although there were enough free rows."""
    bench = Bench({name: adapter(float(i), rank=2) for i, name in enumerate("abcd")}, 8)
    bench.library["large"] = adapter(9.0, rank=4)
    holds = [bench.ready(name) for name in "abcd"]
    parts = holds[1].parts
    holds[0].release()
    holds[2].release()  # two runs of two rows are left, between b and d
    large = bench.ready("large")
    assert bench.pool.num_moves == 1
    assert bench.pool.resident == {"b", "d", "large"}
    assert holds[1].parts != parts, "a hold tells where its adapters are now"
    assert holds[1].parts[0][0]["o"].first_row == 0
    for hold in (holds[1], holds[3], large):
        for (placement, _), ref in zip(hold.parts, hold.refs, strict=True):
            assert placement is bench.pool._adapters[ref.digest].placement
    bench.check()


def test_adapters_that_are_being_filled_are_not_moved() -> None:
    bench = Bench({name: adapter(float(i), rank=2) for i, name in enumerate("abc")}, 6)
    bench.library["large"] = adapter(9.0, rank=4)
    first = bench.ready("a")
    second = bench.hold("b")
    second.advance()
    bench.executor.run_all()  # read
    second.advance()  # its rows are being filled
    first.release()
    large = bench.hold("large")
    large.advance()
    bench.executor.run_one(1)  # read, while b is still being filled
    assert not large.advance()
    assert not large.lacks_room, "this ends by itself"
    bench.executor.run_all()
    large.advance()
    bench.executor.run_all()
    assert large.advance()
    assert second.ready
    bench.check()


def test_the_share_of_the_rows_counts_each_adapter_once() -> None:
    bench = Bench({"a": adapter(1.0), "b": adapter(2.0, rank=2), "q": adapter(3.0, modules=("q_proj",))}, 8)
    a, again, both, q = bench.ready("a"), bench.ready("a"), bench.ready("a", "b"), bench.ready("q")
    assert bench.pool.share([]) == 0.0
    assert bench.pool.share([a, again]) == 1 / 8
    assert bench.pool.share([a, both]) == 3 / 8
    assert bench.pool.share([q]) == 1 / (8 * 2), "units of q: the largest share of any space, 2 of 32"


def test_a_hold_fits_if_all_holds_in_its_way_would_be_released() -> None:
    bench = Bench({"a": adapter(1.0, rank=3), "b": adapter(2.0), "c": adapter(3.0, rank=3)}, 4)
    first, second, other = bench.ready("a"), bench.ready("a"), bench.ready("b")
    waiting = bench.hold("c")
    waiting.advance()
    bench.executor.run_all()
    waiting.advance()
    assert waiting.lacks_room
    assert not bench.pool.fits(waiting, [])
    assert not bench.pool.fits(waiting, [first, other])
    assert bench.pool.fits(waiting, [first, second])
    for hold in (first, second):
        hold.release()
    waiting.advance()
    assert waiting.is_held


def test_the_resident_set_is_updated_incrementally() -> None:
    """A snapshot is taken twenty times a second, however many adapters there are."""
    bench = Bench({str(i): adapter(float(i)) for i in range(6)}, 4)
    for i in range(6):
        bench.ready(str(i)).release()
    assert bench.pool.resident == {"2", "3", "4", "5"}
    assert bench.pool.resident is bench.pool.resident


def test_a_hold_that_hurries_is_ready_at_once_if_its_adapters_load_quickly() -> None:
    bench = Bench({"a": adapter(1.0), "b": adapter(2.0)}, 2)
    with ThreadPoolExecutor(2) as threads:
        pool = AdapterPool(bench.pool.rows, bench.load, threads, threads, bench.wake)
        hold = pool.hold((AdapterRef("a"), AdapterRef("b")))
        assert not hold.advance()
        for _ in range(200):  # the machine may be busy for longer than a hold waits
            hold._hurry_seconds = 0.005
            hold.hurry()
            if hold.ready:
                break
        assert hold.ready


def test_a_hold_hurries_for_some_milliseconds_in_total() -> None:
    bench = Bench({"a": adapter(1.0)}, 2)
    hold = bench.hold("a")
    hold.advance()
    begun = time.monotonic()
    hold.hurry()  # no task of the executor is run
    hold.hurry()
    assert 0.004 < time.monotonic() - begun < 1
    assert not hold.ready
