"""The chunks that get a draft, its length, and the blocks that it takes and frees."""

from collections.abc import Sequence as Seq

import pytest

from server.engine.guidance import Constraint
from server.engine.kv_cache import BlockManager
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.runner import Drawn
from server.engine.sampling import Sampled
from server.engine.sequence import Chunk, Sequence
from server.engine.speculation import MAX_DRAFT, Acceptance, Speculator
from tests.server.engine.speculation.drafting import SetCosts

EOS = 99
PROMPT = (*range(20), *range(4))
"""After which 4, 5, 6 … is guessed."""


def decoding(
    blocks: BlockManager, prompt: Seq[int] = PROMPT, max_tokens: int = 64, speculates: bool = True
) -> Sequence:
    """Return a sequence that has computed its prompt except the last token."""
    params = SamplingParams(max_tokens=max_tokens, speculates=speculates)
    sequence = Sequence(GenerationRequest("a", tuple(prompt), params), 0, 0.0, blocks.block_size)
    assert blocks.admit(sequence, num_spare_blocks=0)
    assert blocks.reserve(sequence, len(prompt))
    sequence.num_computed_tokens = len(prompt) - 1
    return sequence


def chunk_of(sequence: Sequence) -> Chunk:
    return Chunk(sequence, sequence.num_computed_tokens, sequence.num_tokens)


def speculator_of(blocks: BlockManager, max_num_seqs: int = 32, cost: float = 0.0) -> Speculator:
    speculator = Speculator(blocks, [EOS], max_num_seqs)
    speculator.costs = SetCosts(cost)
    return speculator


def draft(blocks: BlockManager, sequence: Sequence, cost: float = 0.0) -> tuple[int, ...]:
    (chunk,) = speculator_of(blocks, cost=cost).extend([chunk_of(sequence)])
    return chunk.draft


def test_tokens_that_followed_before_are_drafted() -> None:
    blocks = BlockManager(9, 16)
    sequence = decoding(blocks)
    speculator = speculator_of(blocks)
    (chunk,) = speculator.extend([chunk_of(sequence)])
    assert chunk.draft == tuple(range(4, 4 + MAX_DRAFT))
    assert chunk.token_ids == (3, *chunk.draft)
    assert chunk.num_tokens == 1 + MAX_DRAFT
    assert speculator.num_drafted_tokens == MAX_DRAFT
    assert sequence.token_ids == list(PROMPT)
    assert len(sequence.block_table) == 3
    blocks.check([sequence])


@pytest.mark.parametrize(("max_tokens", "num_drafted"), [(1, 0), (2, 1), (9, 8), (16, MAX_DRAFT), (64, MAX_DRAFT)])
def test_a_draft_respects_max_tokens(max_tokens: int, num_drafted: int) -> None:
    """The token drawn after the draft is at most the last one."""
    blocks = BlockManager(9, 16)
    assert len(draft(blocks, decoding(blocks, max_tokens=max_tokens))) == num_drafted


def test_drafts_can_be_turned_off() -> None:
    blocks = BlockManager(9, 16)
    sequence = decoding(blocks, speculates=False)
    assert draft(blocks, sequence) == ()
    assert draft(blocks, decoding(blocks, range(30))) == ()  # nothing stands there twice
    chunks = [chunk_of(decoding(blocks))]
    assert Speculator(blocks, [EOS], 32, is_on=False).extend(chunks) == chunks


class Forcing(Constraint):
    """A grammar that leaves no choice of the next tokens, as far as a speculator sees it."""

    error = None
    awaits_mask = False
    is_complete = False
    max_draft = 1000

    def __init__(self, *token_ids: int, end: int | None = None) -> None:
        self._left = token_ids
        self._end = end  # the token that completes it

    def forced(self, max_tokens: int) -> tuple[int, ...]:
        return self._left[:max_tokens]

    def num_allowed(self, token_ids: Seq[int]) -> int:
        return len(token_ids)

    def forbidden(self) -> None:
        return None

    def accept(self, token_id: int) -> None:
        self._left = self._left[1:]

    def after(self, token_ids: Seq[int]) -> "Forcing":
        moved = Forcing(end=self._end)
        moved.is_complete = token_ids[-1] == self._end
        return moved


def test_forced_tokens_are_drafted() -> None:
    """Forced tokens replace a guess, respect max_tokens, and are drafted even if rows are expensive."""
    blocks = BlockManager(9, 16)
    for max_tokens, token_ids, expected in (
        (64, (70, 71, 72), (70, 71, 72)),
        (3, (70, 71, 72), (70, 71)),
        (64, (70, EOS, 71), (70,)),
        (64, tuple(range(40)), tuple(range(MAX_DRAFT))),
    ):
        sequence = decoding(blocks, max_tokens=max_tokens)
        sequence.constraint = Forcing(*token_ids)
        assert draft(blocks, sequence, cost=0.9) == expected
        blocks.free(sequence)


def test_the_completing_token_is_not_drafted() -> None:
    """It is drawn after the token before it, and no token follows it."""
    blocks = BlockManager(9, 16)
    sequence = decoding(blocks)
    sequence.constraint = Forcing(70, 71, 72, end=72)
    assert draft(blocks, sequence) == (70, 71)
    sequence.constraint = Forcing(72, end=72)
    assert draft(blocks, sequence) == ()


def test_forced_tokens_do_not_count_as_guesses() -> None:
    """Forced tokens are always correct, so they don't show how good guesses are."""
    blocks = BlockManager(9, 16)
    sequence = decoding(blocks)
    speculator = speculator_of(blocks)
    for num_forced in (3, 2, 1):
        sequence.constraint = Forcing(*range(70, 70 + num_forced))
        (chunk,) = speculator.extend([chunk_of(sequence)])
        assert len(chunk.draft) == num_forced
        sequence.token_ids += chunk.draft
        sequence.num_computed_tokens += num_forced
    assert vars(speculator._states[sequence].acceptance) == vars(Acceptance())


def test_prompts_have_no_drafts() -> None:
    blocks = BlockManager(9, 16)
    sequence = decoding(blocks)
    for chunk in (Chunk(sequence, 0, 20), Chunk(sequence, 0, 24), Chunk(sequence, 22, 23)):
        assert list(speculator_of(blocks).extend([chunk])) == [chunk]


def test_end_tokens_are_not_drafted() -> None:
    blocks = BlockManager(9, 16)
    prompt = (0, 1, 2, 3, EOS, 5, 0, 1)
    assert draft(blocks, decoding(blocks, prompt)) == (2, 3)
    assert draft(blocks, decoding(blocks, (0, 1, EOS, 2, 0, 1))) == ()


def test_an_expensive_row_is_not_drafted() -> None:
    blocks = BlockManager(9, 16)
    sizes = [len(draft(blocks, decoding(BlockManager(9, 16)), cost=cost)) for cost in (0.0, 0.1, 0.3, 1.0)]
    assert sizes[0] == MAX_DRAFT > sizes[1] > sizes[2]
    assert sizes[3] == 0


@pytest.mark.parametrize("num_usable", [2, 3])
def test_a_draft_only_takes_free_blocks(num_usable: int) -> None:
    """Without free blocks the draft ends with the sequence's last block."""
    blocks = BlockManager(num_usable + 1, 16)
    sequence = decoding(blocks)
    assert len(draft(blocks, sequence)) == (8 if num_usable == 2 else MAX_DRAFT)
    blocks.check([sequence])


def test_a_rejected_drafts_block_is_reused_first() -> None:
    blocks = BlockManager(9, 16)
    sequence = decoding(blocks)
    table = sequence.block_table[:]
    draft(blocks, sequence)
    taken = sequence.block_table[-1]
    sequence.token_ids.append(50)
    sequence.num_computed_tokens += 1
    blocks.trim(sequence)
    assert sequence.block_table == table
    blocks.check([sequence])
    assert blocks.reserve(sequence, 33)
    assert sequence.block_table[-1] == taken


def test_drafts_share_the_rows_that_the_batch_leaves() -> None:
    blocks = BlockManager(99, 16)
    chunks = [chunk_of(decoding(blocks)) for _ in range(4)]
    for max_num_seqs, num_drafted in ((32, 28), (18, 14), (4, 12), (1, 12), (64, 60)):
        found = speculator_of(blocks, max_num_seqs).extend(chunks)
        assert sum(len(chunk.draft) for chunk in found) == num_drafted
        assert sum(1 + len(chunk.draft) for chunk in found) <= max(max_num_seqs, 1 + MAX_DRAFT)
    full = [chunk_of(decoding(blocks)) for _ in range(16)]
    assert list(speculator_of(blocks, 16).extend(full)) == full


def test_acceptance_is_learnt_without_drafts() -> None:
    """Drafting stops after wrong guesses, and resumes when guesses are correct again."""
    blocks = BlockManager(30, 16)
    sequence = decoding(blocks, (*range(50), *range(4)), max_tokens=200)
    speculator = speculator_of(blocks, cost=0.3)

    def step(token_id: int) -> int:
        (chunk,) = speculator.extend([chunk_of(sequence)])
        sequence.token_ids.append(token_id)
        sequence.num_computed_tokens = sequence.num_tokens - 1
        blocks.trim(sequence)
        assert blocks.reserve(sequence, sequence.num_tokens)
        return len(chunk.draft)

    rng = iter(range(1000, 2000))
    failing = []
    for start in range(10, 40, 3):  # the guess is wrong each time, and a familiar pair of tokens follows
        failing.append(step(next(rng)))
        step(start)
        step(start + 1)
    assert failing[-1] == 0
    coming_true = [step(token_id) for token_id in range(39, 50)]
    assert coming_true[-1] > 0
    speculator.forget(sequence)
    assert not speculator._states


def tokens(*token_ids: int | None) -> tuple[Sampled, ...]:
    return tuple(Sampled(token_id, None) for token_id in token_ids)


@pytest.mark.parametrize(
    ("draft", "drawn", "agreed"),
    [
        ((), (5,), (5,)),
        ((5, 6), (5, 6, 7), (5, 6, 7)),
        ((5, 6), (5, 9, 7), (5, 9)),
        ((5, 6), (9, 6, 7), (9,)),
        ((5, 6), (5, None, 7), (5,)),
        ((5, 6), (5, 6, None), (5, 6)),
        ((5,), (None, 6), (None,)),
    ],
)
def test_agreed_tokens_equal_plain_decoding(
    draft: tuple[int, ...], drawn: tuple[int | None, ...], agreed: tuple[int | None, ...]
) -> None:
    sequence = decoding(BlockManager(9, 16))
    chunk = Chunk(sequence, 23, 24, draft)
    assert tuple(Drawn(chunk, tokens(*drawn)).agreed()) == tokens(*agreed)
