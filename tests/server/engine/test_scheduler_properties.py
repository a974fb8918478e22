"""The scheduler under random traffic: no leaks, no starvation, and everything ends."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from server.engine.sequence import Sequence
from tests.kits.properties import num_examples
from tests.server.engine.small import prompt, simulation, unlike


class Machine(RuleBasedStateMachine):
    """Requests, steps, aborts and crashes in any order."""

    @initialize(
        seed=st.integers(0, 10**6),
        num_blocks=st.integers(3, 14),
        capacity=st.integers(1, 4),
        max_load_steps=st.integers(1, 4),
        max_num_seqs=st.integers(1, 5),
        chunk_size=st.sampled_from([1, 4, 6, 16]),
        max_prefill_tokens=st.integers(1, 24),
        max_bypass=st.integers(0, 4),
        drafts=st.booleans(),
    )
    def begin(self, drafts: bool, **options: int) -> None:
        self.sim, self.gate = simulation(failing=frozenset("z"), drafts=drafts, **options)
        self.num_added = 0

    @rule(
        length=st.integers(1, 30),
        max_tokens=st.integers(1, 10),
        adapters=st.lists(st.sampled_from("abcdez"), max_size=3),
        n=st.sampled_from([1, 1, 1, 2, 4]),
        project=st.sampled_from(["", "", "x", "y"]),
    )
    def add(self, length: int, max_tokens: int, adapters: list[str], n: int, project: str) -> None:
        self.sim.add(prompt(self.sim.rng, length), max_tokens, tuple(adapters), n, project)
        self.num_added += n

    @rule(num=st.integers(1, 5))
    def step(self, num: int) -> None:
        for _ in range(num):
            self.sim.step()

    @precondition(lambda self: self.sim.live())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.sim.live()) - 1))
        self.sim.abort(self.sim.live()[index])
        self.num_added -= 1

    @precondition(lambda self: self.sim.live())
    @rule()
    def crash(self) -> None:
        self.sim.step(crash=True)

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            self.sim.drain(self.sim.bound())
            assert len(self.sim.finished) + len(self.sim.failed) == self.num_added
            assert not +self.gate.holds


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=num_examples(150), stateful_step_count=30, deadline=None)


def test_long_random_traffic() -> None:
    """Many seeds with tight limits and without shrinking find more than short runs."""
    num_preemptions = num_displaced = num_accepted = 0
    for seed in range(60):
        rng = random.Random(seed)
        sim, gate = simulation(
            seed=seed,
            num_blocks=rng.randint(4, 20),
            capacity=rng.randint(1, 5),
            max_load_steps=rng.randint(1, 6),
            failing=frozenset("z"),
            max_num_seqs=rng.choice((1, 2, 4, 8)),
            chunk_size=rng.choice((4, 5, 16)),
            max_prefill_tokens=rng.choice((4, 16, 64)),
            max_bypass=rng.choice((0, 1, 5)),
            drafts=seed % 2 == 1,
        )
        for _ in range(300):
            if rng.random() < 0.3 and len(sim.live()) < 20:
                digests = tuple(rng.choice("abcdefghz") for _ in range(rng.choice((0, 1, 1, 2, 3))))
                project = rng.choice("wwwxyz"[seed % 6 :])  # with some seeds there is only one project
                n = rng.choice((1, 1, 3))
                sim.add(prompt(rng, rng.randint(1, 40)), rng.randint(1, 15), digests, n, project)
            if rng.random() < 0.03 and sim.live():
                sim.abort(rng.choice(sim.live()))
            sim.step(crash=rng.random() < 0.01)
        sim.drain(sim.bound())
        assert not +gate.holds
        num_preemptions += sim.scheduler.num_preemptions
        num_displaced += len(sim.displaced)
        num_accepted += sim.num_accepted
    assert num_preemptions - num_displaced > 100
    assert num_displaced > 10
    assert num_accepted > 1000


def test_the_wait_for_room_is_bounded_for_every_set() -> None:
    """With random sets of one to three adapters over a pool of three, every wait is bounded."""
    for seed in range(10):
        rng = random.Random(seed)
        sim, _ = simulation(num_blocks=60, max_num_seqs=6, capacity=3, max_bypass=4, max_load_steps=3, seed=seed)
        since: dict[Sequence, int] = {}
        for step in range(400):
            if len(sim.live()) < 12:
                digests = tuple(rng.sample("abcdefg", rng.randint(1, 3)))
                for new in sim.add(unlike(step, rng.randint(1, 20)), rng.randint(1, 6), digests):
                    since[new] = step
            sim.step()
            oldest = min((since[s] for s in sim.live()), default=step)
            assert step - oldest < 250, "somebody starves"
        sim.drain(sim.bound())
