"""Guesses of prompt lookup compared with an exhaustive search."""

import random

import pytest

from server.engine.speculation import MAX_MATCH, MIN_MATCH, PromptLookup


def expected(token_ids: list[int], max_tokens: int) -> tuple[list[int], int] | None:
    """Return the guess and its match: of the longest matches before the end, the latest."""
    best = (0, 0)
    for end in range(MIN_MATCH, len(token_ids)):
        match = 0
        while match < min(MAX_MATCH, end) and token_ids[end - 1 - match] == token_ids[-1 - match]:
            match += 1
        best = max(best, (match, end))
    match, end = best
    if match < MIN_MATCH:
        return None
    known = list(token_ids)
    for i in range(max_tokens):
        known.append(known[end + i])
    return known[len(token_ids) :], match


def found(lookup: PromptLookup, token_ids: list[int], max_tokens: int) -> tuple[list[int], int] | None:
    guess = lookup.guess(token_ids, max_tokens)
    return None if guess is None else (list(guess.token_ids), guess.match)


@pytest.mark.parametrize("num_words", [1, 2, 3, 8, 20])
def test_the_latest_of_the_longest_matches_is_continued(num_words: int) -> None:
    """Some token ids have the same bytes as others if read from the middle of a token."""
    words = [1 + 256**i % 65_000 * j for i in range(3) for j in range(1, 1 + -(-num_words // 3))][:num_words]
    num_found = 0
    for seed in range(30):
        rng = random.Random(seed)
        token_ids = rng.choices(words, k=rng.randint(1, 20))
        lookup = PromptLookup()
        for _ in range(30):
            guess = found(lookup, token_ids, 6)
            assert guess == expected(token_ids, 6)
            num_found += guess is not None
            token_ids += rng.choices(words, k=rng.randint(1, 3))
    assert num_found > 30


def test_unaligned_bytes_do_not_match() -> None:
    """0x01010101 repeated: the pair's bytes also occur across token borders."""
    one, other = 0x01010101, 0x01010100
    assert found(PromptLookup(), [one, one, other, one, one], 2) == ([other, one], 2)
    assert found(PromptLookup(), [other, one, one, 7, other, one], 1) == ([one], 2)
    assert found(PromptLookup(), [5, one, one, other, 7, one, other], 1) == ([7], 2)
    assert found(PromptLookup(), [one, one, 0x01010102, 3, 0x02010101, one], 1) is None


def test_a_guess_repeats_at_the_sequences_end() -> None:
    assert found(PromptLookup(), [9, 1, 2, 3, 1, 2, 3, 1, 2], 7) == ([3, 1, 2, 3, 1, 2, 3], 5)
    assert found(PromptLookup(), [4, 4, 4], 3) == ([4, 4, 4], 2)


@pytest.mark.parametrize("token_ids", [[1], [1, 1], [1, 2, 3], [1, 2, 1]])
def test_a_guess_needs_two_matching_tokens(token_ids: list[int]) -> None:
    assert found(PromptLookup(), token_ids, 4) is None
