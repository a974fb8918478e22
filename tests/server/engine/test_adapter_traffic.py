"""The scheduler over the real pool: competing adapter sets never deadlock."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from adapters.lora import MODULES, LoraWeights
from server.engine.kv_cache import BlockManager
from server.engine.scheduler import SchedulerLimits
from tests.kits.properties import num_examples
from tests.server.engine.adapter_pool.pool_bench import Bench, adapter
from tests.server.engine.simulation import Simulation

SIZE = 4


MODULE_SETS = (MODULES, ("q_proj",), ("q_proj", "v_proj"), ("o_proj", "down_proj"), ("k_proj", "gate_proj"))


def library(rng: random.Random, num: int, max_rank: int) -> dict[str, LoraWeights | Exception]:
    """Adapters of all sizes, up to the whole pool, and a broken one."""
    found: dict[str, LoraWeights | Exception] = {
        f"{i:02}": adapter(float(i), rng.randint(1, max_rank), rng.choice(MODULE_SETS)) for i in range(num)
    }
    return found | {"broken": OSError("no")}


def simulation(seed: int, num_adapters: int, max_rank: int, **limits: int) -> tuple[Simulation, Bench]:
    """The scheduler over the real pool; loads end at random steps and in random order."""
    rng = random.Random(seed)
    bench = Bench(library(rng, num_adapters, max_rank), max_rank)

    def on_step() -> None:
        for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
            if bench.executor.tasks:
                bench.executor.run_one(rng.randrange(len(bench.executor.tasks)))
        if rng.random() < 0.1:
            bench.check()

    sim = Simulation(
        SchedulerLimits(**limits),
        BlockManager(rng.randint(5, 40), SIZE),
        bench.pool,
        lambda: bool(bench.executor.tasks),
        rng,
        on_step=on_step,
    )
    return sim, bench


def check_end(bench: Bench) -> None:
    bench.executor.run_all()
    bench.check()
    for entry in bench.pool._adapters.values():
        assert (entry.num_holds, entry.num_wanting) == (0, 0)
        assert entry.placement is not None, "something read is kept for nobody"


class Machine(RuleBasedStateMachine):
    """Sets of adapters compete for a pool that fits few of them."""

    @initialize(
        seed=st.integers(0, 10**6),
        num_adapters=st.integers(1, 7),
        max_rank=st.integers(1, 9),
        max_num_seqs=st.integers(1, 5),
        max_bypass=st.integers(0, 3),
    )
    def begin(self, seed: int, num_adapters: int, max_rank: int, **limits: int) -> None:
        self.sim, self.bench = simulation(
            seed, num_adapters, max_rank, chunk_size=4, max_prefill_tokens=16, **limits
        )
        self.names = sorted(self.bench.library)
        self.num_added = 0

    @rule(length=st.integers(1, 20), max_tokens=st.integers(1, 6), data=st.data(), n=st.sampled_from([1, 1, 3]))
    def add(self, length: int, max_tokens: int, data: st.DataObject, n: int) -> None:
        names = data.draw(st.lists(st.sampled_from(self.names), max_size=4))
        self.sim.add(tuple(self.sim.rng.randrange(2) for _ in range(length)), max_tokens, tuple(names), n)
        self.num_added += n

    @rule(num=st.integers(1, 4))
    def step(self, num: int) -> None:
        for _ in range(num):
            self.sim.step()

    @precondition(lambda self: self.sim.live())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.sim.live()) - 1))
        self.sim.abort(self.sim.live()[index])
        self.num_added -= 1

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            self.sim.drain(self.sim.bound())
            assert len(self.sim.finished) + len(self.sim.failed) == self.num_added
            for sequence in self.sim.finished:
                assert all(ref.digest != "broken" for ref in sequence.request.adapters)
            check_end(self.bench)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=num_examples(120), stateful_step_count=25, deadline=None)


def test_competing_sets_all_finish_in_a_small_pool() -> None:
    """Many seeds of long traffic, without shrinking."""
    num_evictions = 0
    for seed in range(40):
        rng = random.Random(seed)
        sim, bench = simulation(
            seed,
            num_adapters=rng.randint(2, 12),
            max_rank=rng.randint(2, 10),
            max_num_seqs=rng.choice((1, 3, 8)),
            chunk_size=4,
            max_prefill_tokens=32,
            max_bypass=rng.choice((0, 1, 4)),
        )
        names = sorted(bench.library)
        for _ in range(200):
            if rng.random() < 0.4 and len(sim.live()) < 20:
                prompt = tuple(rng.randrange(2) for _ in range(rng.randint(1, 25)))
                sim.add(prompt, rng.randint(1, 8), tuple(rng.choices(names, k=rng.choice((0, 1, 2, 3, 5)))))
            if rng.random() < 0.05 and sim.live():
                sim.abort(rng.choice(sim.live()))
            sim.step(crash=rng.random() < 0.01)
        sim.drain(sim.bound())
        check_end(bench)
        num_evictions += bench.pool.num_evictions
    assert num_evictions > 200
