"""Sets that lack room are tried only when something was freed, however many wait."""

import random

from server.engine.adapter_pool import AdapterHold, AdapterPool
from server.engine.kv_cache import BlockManager
from server.engine.scheduler import SchedulerLimits
from server.engine.sequence import Sequence
from tests.server.engine.adapter_pool.pool_bench import Bench, adapter
from tests.server.engine.simulation import Simulation
from tests.server.engine.small import SIZE, unlike

NUM_SETS = 60


class CountingPool(AdapterPool):
    """A pool that counts the attempts to advance a hold."""

    num_attempts = 0

    def advance(self, hold: AdapterHold) -> bool:
        self.num_attempts += bool(hold.refs)
        return super().advance(hold)


class CountingBlocks(BlockManager):
    """A block manager that counts the attempts to admit a sequence."""

    num_attempts = 0

    def admit(self, sequence: Sequence, *, num_spare_blocks: int) -> bool:
        self.num_attempts += 1
        return super().admit(sequence, num_spare_blocks=num_spare_blocks)


def world(
    *, num_blocks: int = 400, max_rank: int = 1, max_num_seqs: int = 4, max_bypass: int = 10**6
) -> tuple[Simulation, CountingPool, CountingBlocks]:
    """Return a simulation over the real pool, with adapters 00 to 60 of rank 1. Loads end with the step."""
    bench = Bench({f"{i:02}": adapter(float(i)) for i in range(NUM_SETS + 1)}, max_rank)
    pool = CountingPool(bench.pool.rows, bench.load, bench.executor, bench.executor, bench.wake)
    blocks = CountingBlocks(num_blocks + 1, SIZE)
    sim = Simulation(
        SchedulerLimits(max_num_seqs, chunk_size=8, max_prefill_tokens=64, max_bypass=max_bypass),
        blocks,
        pool,
        lambda: bool(bench.executor.tasks),
        random.Random(0),
        on_step=bench.executor.run_all,
    )
    return sim, pool, blocks


def test_sets_without_rows_are_retried_once_per_freed_adapter() -> None:
    """One sequence holds the only adapter for two hundred steps, while sixty others wait."""
    sim, pool, _ = world()
    (hog,) = sim.add(unlike(0, 4), 200, ("00",))
    for _ in range(3):
        sim.step()
    others = [sim.add(unlike(i, 4), 2, (f"{i:02}",))[0] for i in range(1, NUM_SETS + 1)]
    for _ in range(3):
        sim.step()
    before = pool.num_attempts  # each has been read and tried by now
    for _ in range(150):
        assert len(sim.step().chunks) == 1
    assert hog in sim.live()
    assert pool.num_attempts == before
    sim.drain(sim.bound())
    assert set(sim.finished) == {hog, *others}
    assert pool.num_attempts < before + NUM_SETS * (NUM_SETS + 4)


def test_sets_without_blocks_are_retried_once_per_ended_sequence() -> None:
    sim, _, blocks = world(num_blocks=60, max_rank=NUM_SETS + 1)
    (hog,) = sim.add(unlike(0, 80), 150, ("00",))
    for _ in range(14):
        sim.step()
    others = [sim.add(unlike(i, 180), 2, (f"{i:02}",))[0] for i in range(1, 20)]
    for _ in range(4):
        sim.step()
    before = blocks.num_attempts
    for _ in range(100):
        assert len(sim.step().chunks) == 1
    assert hog in sim.live()
    assert blocks.num_attempts == before
    sim.drain(sim.bound())
    assert set(sim.finished) == {hog, *others}
    assert blocks.num_attempts < before + len(others) * (len(others) + 4)


def test_reading_ahead_does_not_retry_in_vain() -> None:
    """All places are taken. The next adapters are read once, and then not tried again."""
    sim, pool, _ = world(max_rank=2, max_num_seqs=2)
    for i in range(2):
        sim.add(unlike(i, 4), 200, (f"{i:02}",))
    for _ in range(3):
        sim.step()
    for i in range(2, 12):
        sim.add(unlike(i, 4), 2, (f"{i:02}",))
    for _ in range(3):
        sim.step()
    before = pool.num_attempts
    for _ in range(100):
        sim.step()
    assert pool.num_attempts == before
    sim.drain(sim.bound())


def test_a_set_without_rows_is_passed_over_a_limited_number_of_times() -> None:
    """A set that isn't tried because nothing was freed still counts as passed over."""
    sim, _, _ = world(max_rank=2, max_num_seqs=4, max_bypass=5)
    (hog,) = sim.add(unlike(0, 4), 60, ("00",))
    (large,) = sim.add(unlike(1, 4), 2, ("01", "02"))
    for _ in range(3):
        sim.step()
    for i in range(2, 40):
        sim.add(unlike(i, 4), 2)  # of the base, which needs no rows
    for _ in range(40):
        sim.step()
    passed = [s for s in sim.admissions[1:] if s is not large]
    assert len(passed) == 5
    assert hog in sim.live()
    sim.drain(sim.bound())
    assert large in sim.finished


def test_an_adapter_released_during_placement_makes_room_afterwards() -> None:
    """Its rows become free only when they have been filled. Then waiting sets are tried again."""
    bench = Bench({"00": adapter(0.0), "01": adapter(1.0)}, 1)
    blocks = BlockManager(41, SIZE)
    sim = Simulation(
        SchedulerLimits(4, 8, 16, 3), blocks, bench.pool, lambda: bool(bench.executor.tasks), random.Random(0)
    )
    (gone,) = sim.add(unlike(0, 4), 2, ("00",))
    sim.step()
    bench.executor.run_all()  # read
    sim.step()
    assert len(bench.executor.tasks) == 1  # being placed
    (waiting,) = sim.add(unlike(1, 4), 2, ("01",))
    sim.abort(gone)
    for _ in range(3):
        sim.step()
        while len(bench.executor.tasks) > 1:
            bench.executor.run_one(1)
    assert waiting.hold is not None
    assert waiting.hold.lacks_room
    bench.executor.run_all()
    for _ in range(6):
        sim.step()
        bench.executor.run_all()
    assert sim.finished == [waiting]


def test_adapters_of_waiting_sets_are_evicted_last() -> None:
    """A set lacks room for half of its adapters. Its other half, which is idle, stays resident."""
    bench = Bench({name: adapter(float(i), rank=i + 1) for i, name in enumerate("abcd")}, 6)
    bench.ready("a").release()  # rank 1, least recently used
    bench.ready("b").release()  # rank 2
    holder = bench.ready("c")  # rank 3: all rows are taken
    waiting = bench.hold("a", "d")  # rank 4 more
    waiting.advance()
    bench.executor.run_all()
    assert not waiting.advance()
    assert waiting.lacks_room
    bench.library["e"] = adapter(9.0, rank=2)
    bench.ready("b").release()  # now used later than a
    bench.ready("e").release()
    assert bench.pool.resident == {"a", "c", "e"}
    holder.release()
    waiting.release()
