"""Random operations on blocks: counts stay correct, and no sequence reads wrong content."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapters.lora import AdapterRef
from server.engine.kv_cache import BlockManager
from server.engine.sequence import Sequence
from tests.kits.properties import num_examples
from tests.server.engine.test_kv_cache import SIZE, sequence


class Blocks(RuleBasedStateMachine):
    """Random operations on sequences with few tokens and few adapters, so that many blocks are shared.

    The content of every block is simulated: what a sequence finds must be what it would have computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(9, SIZE)
        self.live: list[Sequence] = []
        self.content: dict[tuple[int, int], tuple[bytes, tuple[int, ...]]] = {}  # (block, offset) → what it holds

    def truth(self, of: Sequence, position: int) -> tuple[bytes, tuple[int, ...]]:
        """Return what keys and values depend on: the project, the adapters and all tokens up to this one."""
        return of.prefix_root, tuple(of.token_ids[: position + 1])

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=16),
        adapter=st.sampled_from(["", "a"]),
        project=st.sampled_from(["", "x"]),
    )
    def start(self, tokens: list[int], adapter: str, project: str) -> None:
        adapters = (AdapterRef(adapter),) if adapter else ()
        new = sequence(*tokens, adapters=adapters, project=project)
        spare = len(self.live)
        free = self.blocks.num_free_blocks
        if self.blocks.admit(new, num_spare_blocks=spare):
            assert new.num_computed_tokens < new.num_tokens
            assert new.num_computed_tokens == len(new.block_table) * SIZE
            self.live.append(new)
            assert self.blocks.reserve(new, new.num_tokens + 1), "what was admitted fits"
            assert self.blocks.num_free_blocks >= spare
        else:
            assert self.blocks.num_free_blocks == free
            assert not new.block_table

    @precondition(lambda self: self.live)
    @rule(data=st.data(), new=st.integers(1, 6))
    def advance(self, data: st.DataObject, new: int) -> None:
        one = data.draw(st.sampled_from(self.live))
        if one.num_computed_tokens == one.num_tokens:
            one.token_ids.append(new % 2)
        stop = min(one.num_computed_tokens + new, one.num_tokens)
        if not self.blocks.reserve(one, stop):
            return
        for position in range(one.num_computed_tokens, stop):
            place = one.block_table[position // SIZE], position % SIZE
            assert self.blocks._references[place[0]] == 1, "a shared block is written"
            self.content[place] = self.truth(one, position)
        one.num_computed_tokens = stop
        self.blocks.mark_computed(one)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.live))
        self.live.remove(one)
        self.blocks.free(one)

    @invariant()
    def counts_are_right(self) -> None:
        self.blocks.check(self.live)
        assert self.blocks.num_used_blocks + self.blocks.num_free_blocks == self.blocks.num_usable_blocks
        assert self.blocks.num_used_blocks == len({block for one in self.live for block in one.block_table})

    @invariant()
    def everyone_reads_what_it_would_have_computed(self) -> None:
        for one in self.live:
            for position in range(one.num_computed_tokens):
                place = one.block_table[position // SIZE], position % SIZE
                assert self.content[place] == self.truth(one, position)

    @invariant()
    def only_the_living_compute(self) -> None:
        assert all(any(owner is one for one in self.live) for owner in self.blocks._computing.values())


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=num_examples(60), stateful_step_count=40, deadline=None)


def test_random_operations_keep_the_invariants() -> None:
    """The same operations with larger numbers, without shrinking."""
    rng = random.Random(0)
    machine = Blocks()
    machine.blocks = BlockManager(40, SIZE)
    for _ in range(3000):
        if rng.random() < 0.3 or not machine.live:
            tokens = [int(rng.random() < 0.1) for _ in range(rng.randint(1, 40))]
            new = sequence(*tokens, adapters=(AdapterRef("a"),) if rng.random() < 0.5 else ())
            if machine.blocks.admit(new, num_spare_blocks=len(machine.live)):
                machine.live.append(new)
        elif rng.random() < 0.2:
            machine.blocks.free(machine.live.pop(rng.randrange(len(machine.live))))
        else:
            one = rng.choice(machine.live)
            if one.num_computed_tokens == one.num_tokens:
                one.token_ids.append(int(rng.random() < 0.1))
            stop = min(one.num_computed_tokens + rng.randint(1, 9), one.num_tokens)
            if machine.blocks.reserve(one, stop):
                for position in range(one.num_computed_tokens, stop):
                    machine.content[one.block_table[position // SIZE], position % SIZE] = machine.truth(
                        one, position
                    )
                one.num_computed_tokens = stop
                machine.blocks.mark_computed(one)
        machine.counts_are_right()
        machine.only_the_living_compute()
    machine.everyone_reads_what_it_would_have_computed()
