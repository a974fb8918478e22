"""Blocks: allocation, sharing by content and adapter set, and eviction."""

from array import array

import pytest

from adapters.lora import AdapterRef
from server.engine.kv_cache import BlockManager
from server.engine.request import GenerationRequest
from server.engine.sequence import Sequence, adapter_key, prefix_root

SIZE = 4


def sequence(*token_ids: int, adapters: tuple[AdapterRef, ...] = (), project: str = "") -> Sequence:
    return Sequence(GenerationRequest("r", token_ids, adapters=adapters, project=project), 0, 0.0, SIZE)


def admit(blocks: BlockManager, new: Sequence, num_spare_blocks: int = 0) -> bool:
    return blocks.admit(new, num_spare_blocks=num_spare_blocks)


def compute(blocks: BlockManager, of: Sequence, num_tokens: int | None = None) -> None:
    stop = of.num_tokens if num_tokens is None else num_tokens
    assert blocks.reserve(of, stop)
    of.num_computed_tokens = stop
    blocks.mark_computed(of)


def test_blocks_for() -> None:
    blocks = BlockManager(3, SIZE)
    assert [blocks.blocks_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_a_cache_needs_a_block_besides_the_padding() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockManager(1, SIZE)


def test_the_padding_block_is_never_allocated() -> None:
    blocks = BlockManager(4, SIZE)
    holder = sequence(*range(12))
    assert blocks.reserve(holder, 12)
    assert sorted(holder.block_table) == [1, 2, 3]
    assert not blocks.reserve(holder, 13)
    assert sorted(holder.block_table) == [1, 2, 3], "a refused reservation changes nothing"
    assert (blocks.num_free_blocks, blocks.num_used_blocks) == (0, 3)


def test_the_same_prompt_shares_full_blocks_but_computes_its_last_token() -> None:
    blocks = BlockManager(10, SIZE)
    first, second, third = sequence(*range(8)), sequence(*range(8)), sequence(*range(9))
    assert admit(blocks, first)
    compute(blocks, first)
    assert admit(blocks, second)
    assert second.block_table == first.block_table[:1]
    assert second.num_computed_tokens == 4, "the 8th token is computed, for its logits"
    assert admit(blocks, third)
    assert third.block_table == first.block_table[:2]
    assert third.num_computed_tokens == 8
    blocks.check([first, second, third])


def test_only_filled_blocks_are_found() -> None:
    blocks = BlockManager(10, SIZE)
    first, second = sequence(*range(12)), sequence(*range(12))
    assert admit(blocks, first)
    compute(blocks, first, 7)
    assert admit(blocks, second)
    assert second.num_computed_tokens == 4


@pytest.mark.parametrize(
    ("mine", "theirs", "are_same"),
    [
        ((), (), True),
        ((AdapterRef("a"),), (AdapterRef("a"),), True),
        ((AdapterRef("a", 0.5), AdapterRef("b")), (AdapterRef("b"), AdapterRef("a", 0.5)), True),
        ((), (AdapterRef("a"),), False),
        ((AdapterRef("a"),), (AdapterRef("b"),), False),
        ((AdapterRef("a"),), (AdapterRef("a", 0.999),), False),
        ((AdapterRef("a"),), (AdapterRef("a", -1.0),), False),
        ((AdapterRef("a"),), (AdapterRef("a"), AdapterRef("b")), False),
        ((AdapterRef("a", 0.1 + 0.2),), (AdapterRef("a", 0.3),), False),
    ],
)
def test_blocks_are_only_shared_under_the_same_adapters(
    mine: tuple[AdapterRef, ...], theirs: tuple[AdapterRef, ...], are_same: bool
) -> None:
    blocks = BlockManager(10, SIZE)
    first, second = sequence(*range(9), adapters=mine), sequence(*range(9), adapters=theirs)
    assert (adapter_key(mine) == adapter_key(theirs)) is are_same
    assert admit(blocks, first)
    compute(blocks, first)
    assert admit(blocks, second)
    assert second.num_computed_tokens == (8 if are_same else 0)


@pytest.mark.parametrize("adapters", [(), (AdapterRef("a"),)])
def test_no_project_finds_anothers_blocks(adapters: tuple[AdapterRef, ...]) -> None:
    blocks = BlockManager(20, SIZE)
    first = sequence(*range(9), adapters=adapters, project="x")
    others = [sequence(*range(9), adapters=adapters, project=project) for project in ("", "y", "xx", "x ")]
    assert admit(blocks, first)
    assert not any(blocks.is_being_computed(other) for other in others), "that it is computed is not to be seen"
    assert blocks.is_being_computed(sequence(*range(9), adapters=adapters, project="x"))
    compute(blocks, first)
    for other in others:
        assert other.adapter_key == first.adapter_key, "they run side by side"
        assert admit(blocks, other)
        assert other.num_computed_tokens == 0
        blocks.free(other)
    assert admit(blocks, mine := sequence(*range(9), adapters=adapters, project="x"))
    assert mine.num_computed_tokens == 8


def test_without_a_project_keys_are_those_of_the_adapters() -> None:
    key = adapter_key([AdapterRef("a")])
    assert prefix_root(key, "") == key
    tokens = sequence(1, 2, 3, 4)
    assert prefix_root(tokens.adapter_key, array("q", tokens.token_ids).tobytes().decode()) not in (
        *tokens.full_block_keys(),
        tokens.adapter_key,
    ), "a project named like a block's tokens"


def test_own_blocks_are_not_shared() -> None:
    blocks = BlockManager(20, SIZE)
    first, second = sequence(*range(12)), sequence(*range(12))
    assert admit(blocks, first)
    compute(blocks, first)
    assert admit(blocks, second)
    compute(blocks, second)
    assert (blocks.num_own_blocks(first), blocks.num_own_blocks(second)) == (1, 1)
    free = blocks.num_free_blocks
    blocks.free(second)
    assert blocks.num_free_blocks == free + 1
    assert blocks.num_own_blocks(first) == 3


def test_a_block_is_only_found_after_the_same_prefix() -> None:
    blocks = BlockManager(20, SIZE)
    first, other_start = sequence(*range(9)), sequence(9, 9, 9, 9, 4, 5, 6, 7, 8)
    assert admit(blocks, first)
    compute(blocks, first)
    assert admit(blocks, other_start)
    assert other_start.num_computed_tokens == 0


def test_freed_blocks_stay_cached_until_they_are_needed() -> None:
    blocks = BlockManager(6, SIZE)
    first = sequence(*range(9))
    assert admit(blocks, first)
    compute(blocks, first)
    table = first.block_table[:]
    blocks.free(first)
    assert (list(first.block_table), first.num_computed_tokens) == ([], 0)
    assert blocks.num_used_blocks == 0
    again = sequence(*range(9))
    assert admit(blocks, again)
    assert again.block_table == table[:2]
    blocks.free(again)
    greedy = sequence(*range(50, 70))
    assert admit(blocks, greedy) is False
    assert blocks.reserve(greedy, 20)
    blocks.free(greedy)
    assert admit(blocks, late := sequence(*range(9)))
    assert late.num_computed_tokens == 0


def test_the_oldest_blocks_are_reused_first_from_a_sequences_end() -> None:
    blocks = BlockManager(5, SIZE)
    for start in (0, 100):
        owner = sequence(*range(start, start + 8))
        assert admit(blocks, owner)
        compute(blocks, owner)
        blocks.free(owner)
    taker = sequence(7)
    compute(blocks, taker)
    for start, found in ((0, 4), (100, 8)):
        probe = sequence(*range(start, start + 9))
        assert admit(blocks, probe)
        assert probe.num_computed_tokens == found
        blocks.free(probe)


def test_admission_leaves_spare_blocks() -> None:
    blocks = BlockManager(6, SIZE)
    assert not admit(blocks, sequence(*range(8)), num_spare_blocks=3)  # 8 tokens and the next one: 3 blocks of 5
    assert admit(blocks, sequence(*range(8)), num_spare_blocks=2)


def test_idle_shared_blocks_count_as_needed() -> None:
    """A cached prefix that no sequence refers to also uses free blocks."""
    blocks = BlockManager(4, SIZE)
    first = sequence(*range(8))
    assert admit(blocks, first)
    compute(blocks, first)
    blocks.free(first)
    second = sequence(*range(9))
    assert not admit(blocks, second, num_spare_blocks=1)
    assert not second.block_table
    blocks.check([])
    assert admit(blocks, second)
    compute(blocks, second)
    blocks.check([second])


def test_a_sequence_waits_for_a_block_that_is_being_computed() -> None:
    blocks = BlockManager(20, SIZE)
    first, second, other = (
        sequence(*range(9)),
        sequence(*range(9)),
        sequence(*range(9), adapters=(AdapterRef("a"),)),
    )
    assert not blocks.is_being_computed(first)
    assert admit(blocks, first)
    assert not blocks.is_being_computed(first)
    assert blocks.is_being_computed(second)
    assert not blocks.is_being_computed(other)
    compute(blocks, first, 4)
    assert blocks.is_being_computed(second), "its second block is on its way"
    compute(blocks, first, 8)
    assert not blocks.is_being_computed(second)


def test_no_sequence_waits_for_an_aborted_one() -> None:
    blocks = BlockManager(20, SIZE)
    first, second = sequence(*range(9)), sequence(*range(9))
    assert admit(blocks, first)
    first.token_ids.append(7)
    blocks.free(first)
    assert not blocks.is_being_computed(second)
    assert blocks._computing == {}


def test_freeing_twice_fails() -> None:
    blocks = BlockManager(4, SIZE)
    holder = sequence(*range(4))
    compute(blocks, holder)
    table = holder.block_table[:]
    blocks.free(holder)
    blocks.free(holder)  # holds nothing: fine
    holder.block_table = table
    with pytest.raises(AssertionError, match="freed twice"):
        blocks.free(holder)
