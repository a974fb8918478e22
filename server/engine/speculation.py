"""Speculative decoding: draft tokens for decoding sequences, so that one step can draw several tokens.

A step also computes a draft's tokens, and draws a token after each of them. A token depends only on the tokens
before it and on noise that its position decides. So the token after a correct draft is the one that plain decoding
would have drawn: drafts change the timing of tokens, and nothing else.

A guess is a text that a grammar forces, or the tokens that followed an earlier occurrence of the sequence's last
few tokens (prompt lookup, Saxena 2023). `Speculator` drafts the guessed tokens that increase the throughput. It
estimates the throughput from the share of correct guesses (`Acceptance`; guesses from a grammar are always
correct) and from the time that an extra token adds to a step (`cost_model.RowCosts`). Drafts use only blocks that
are free, and give them back after the step. No sequence waits or is preempted for a draft.
"""

from array import array
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import takewhile

from server.engine.cost_model import RowCosts
from server.engine.kv_cache import BlockManager
from server.engine.sequence import Chunk, Sequence

MAX_DRAFT = 15  # tokens; with the token before them they fill a tile of 16 rows
MIN_MATCH, MAX_MATCH = 2, 8
_PRIOR = (0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.85)  # acceptance assumed for matches of MIN_MATCH to MAX_MATCH
_PRIOR_WEIGHT = 3.0  # weight of the assumption, in guesses
_MEMORY = 0.9  # factor by which older guesses lose weight with each new one of their match length
_SIZE = array("i").itemsize


@dataclass(frozen=True)
class Guess:
    """The tokens that followed an earlier occurrence of the sequence's last `match` tokens."""

    token_ids: Seq[int]
    match: int


class PromptLookup:
    """An index of the tokens of one growing sequence. It takes four bytes for each token."""

    def __init__(self) -> None:
        self._packed = bytearray()

    def guess(self, token_ids: Seq[int], max_tokens: int) -> Guess | None:
        """Guess the next `max_tokens` tokens (at least one) of the sequence, which so far has `token_ids`.

        Look for the longest suffix of `MIN_MATCH` to `MAX_MATCH` tokens that also occurs earlier. If it occurs
        several times, use the latest occurrence. Return None if no such suffix exists.
        """
        packed = self._packed
        packed += array("i", token_ids[len(packed) // _SIZE :]).tobytes()
        match, end = 0, len(packed) - _SIZE  # a match ends before the sequence does
        for num in range(MIN_MATCH, MAX_MATCH + 1):
            found = self._last_end(packed[-num * _SIZE :], end)
            if found < 0:
                break
            match, end = num, found
        if not match:
            return None
        followed = token_ids[end // _SIZE :]  # repeated if it reaches the sequence's end
        return Guess([followed[i % len(followed)] for i in range(max_tokens)], match)

    def _last_end(self, pattern: bytearray, stop: int) -> int:
        """Return the end, in bytes, of the last occurrence of `pattern` before `stop`, or -1 if there is none."""
        at = self._packed.rfind(pattern, 0, stop)
        while at > 0 and at % _SIZE:  # a match of bytes that isn't aligned to tokens
            at = self._packed.rfind(pattern, 0, at + len(pattern) - 1)
        return at + len(pattern) if at >= 0 else -1


class Acceptance:
    """The shares of guessed tokens that proved correct, by the length of the match before the guess."""

    def __init__(self) -> None:
        self._right = [_PRIOR_WEIGHT * share for share in _PRIOR]
        self._seen = [_PRIOR_WEIGHT] * len(_PRIOR)

    def chances(self, match: int, num_tokens: int) -> Iterator[float]:
        """For each k from 1 to `num_tokens`, yield the probability that a guess's first k tokens are correct.

        `match` is the number of tokens that matched before the guess (`Guess.match`).
        """
        chance = 1.0
        for i in range(num_tokens):
            place = _place(match + i)
            chance *= self._right[place] / self._seen[place]
            yield chance

    def observe(self, match: int, is_right: bool) -> None:
        """Record whether a guessed token after a match of `match` tokens was correct."""
        place = _place(match)
        self._right[place] = _MEMORY * self._right[place] + is_right
        self._seen[place] = _MEMORY * self._seen[place] + 1


def _place(match: int) -> int:
    return min(match, MAX_MATCH) - MIN_MATCH


@dataclass(frozen=True)
class _Weighed:
    """Guessed tokens. `chances[i]` is the probability that the first i + 1 of them are correct."""

    token_ids: Seq[int]
    chances: Seq[float]


@dataclass
class _State:
    """The speculator's state for one decoding sequence."""

    lookup: PromptLookup = field(default_factory=PromptLookup)
    acceptance: Acceptance = field(default_factory=Acceptance)
    guess: Guess | None = None  # the last lookup's guess, whether drafted or not
    position: int = 0  # position of the guess's first token


class Speculator:
    """The part of the engine that drafts tokens. It keeps each sequence's state until `forget`."""

    def __init__(
        self, blocks: BlockManager, eos: Collection[int], max_num_seqs: int, *, is_on: bool = True
    ) -> None:
        """With drafts, a step draws at most `max_num_seqs` tokens, or 1 + `MAX_DRAFT` if that is more.

        `eos` are the end tokens, which are never drafted.
        """
        self.costs = RowCosts(max_num_seqs)
        self.num_drafted_tokens = 0
        self._blocks = blocks
        self._eos = frozenset(eos)
        self._max_rows = max(max_num_seqs, 1 + MAX_DRAFT)
        self._is_on = is_on
        self._states: dict[Sequence, _State] = {}

    def extend(self, chunks: Seq[Chunk]) -> Seq[Chunk]:
        """Return the chunks, with drafts that should increase the throughput. Reserve the drafts' blocks."""
        num_free = self._max_rows - sum(chunk.samples for chunk in chunks)
        if not self._is_on or num_free <= 0:
            return chunks
        guesses = {chunk: guess for chunk in chunks if (guess := self._guess(chunk)) is not None}
        if not guesses:
            return chunks
        chances = [guess.chances for guess in guesses.values()]
        num_decoding = sum(chunk.is_decode and chunk.samples for chunk in chunks)
        sizes = draft_sizes(num_decoding, chances, self.costs.of(num_decoding), num_free)
        drafts = {
            chunk: self._draft(chunk, guess.token_ids[:size])
            for (chunk, guess), size in zip(guesses.items(), sizes, strict=True)
        }
        self.num_drafted_tokens += sum(map(len, drafts.values()))
        return [replace(chunk, draft=drafts[chunk]) if drafts.get(chunk) else chunk for chunk in chunks]

    def observe(self, chunks: Seq[Chunk], seconds: float) -> None:
        """Learn the cost of drafted tokens from a step that computed `chunks` in `seconds`."""
        if self._is_on and all(chunk.is_decode and chunk.samples for chunk in chunks):
            self.costs.observe(len(chunks), sum(len(chunk.draft) for chunk in chunks), seconds)

    def forget(self, sequence: Sequence) -> None:
        """Drop the state of a sequence that has ended."""
        self._states.pop(sequence, None)

    def _guess(self, chunk: Chunk) -> _Weighed | None:
        """Check the last guess against the tokens drawn since, and guess a decoding sequence's next tokens."""
        sequence, params = chunk.sequence, chunk.sequence.request.sampling
        max_tokens = min(params.max_tokens - sequence.num_output_tokens - 1, MAX_DRAFT)
        if sequence.constraint is not None:
            max_tokens = min(max_tokens, sequence.constraint.max_draft)
        if not (params.speculates and chunk.is_decode and chunk.samples and max_tokens > 0):
            return None
        state = self._states.setdefault(sequence, _State())
        if state.guess is not None:
            drawn = sequence.token_ids[state.position :]
            for num, (guessed, token_id) in enumerate(zip(state.guess.token_ids, drawn, strict=False)):
                state.acceptance.observe(state.guess.match + num, guessed == token_id)
                if guessed != token_id:
                    break
        if sequence.constraint is not None and (forced := sequence.constraint.forced(max_tokens)):
            state.guess = None
            if sequence.constraint.after(forced).is_complete:  # no token is drawn after the last one
                forced = forced[:-1]
            return _Weighed(forced, [1.0] * len(forced))
        state.guess = guess = state.lookup.guess(sequence.token_ids, max_tokens)
        state.position = sequence.num_tokens
        if guess is None:
            return None
        return _Weighed(guess.token_ids, list(state.acceptance.chances(guess.match, len(guess.token_ids))))

    def _draft(self, chunk: Chunk, token_ids: Seq[int]) -> tuple[int, ...]:
        """Return the draft that consists of the first of these tokens, and reserve blocks for it.

        The draft ends before an end token, before a token that the grammar forbids, or where no block is free.
        """
        sequence = chunk.sequence
        # No token follows an end token, and the end token itself needn't be drafted.
        draft = tuple(takewhile(lambda token_id: token_id not in self._eos, token_ids))
        if draft and sequence.constraint is not None:
            draft = draft[: sequence.constraint.num_allowed(draft)]
        if draft and not self._blocks.reserve(sequence, chunk.stop + len(draft)):
            draft = draft[: len(sequence.block_table) * self._blocks.block_size - chunk.stop]
        return draft


def draft_sizes(num_decoding: int, chances: Seq[Seq[float]], cost: float, max_tokens: int) -> list[int]:
    """Return how many tokens of each guess to draft for the highest total throughput.

    `chances[i][j]` is the probability that the first j + 1 tokens of guess i are correct. `cost` is the time that
    a drafted token adds to a step, as a share of the time of a step without drafts. `max_tokens` limits the sum of
    the numbers returned.
    """
    sizes = [0] * len(chances)
    num_tokens, time = float(num_decoding), 1.0  # expected tokens of a step, and its relative time
    best_first = sorted(((chance, i) for i, of_guess in enumerate(chances) for chance in of_guess), reverse=True)
    for chance, i in best_first[:max_tokens]:
        if chance * time <= cost * num_tokens:
            break
        sizes[i] += 1
        num_tokens, time = num_tokens + chance, time + cost
    return sizes
