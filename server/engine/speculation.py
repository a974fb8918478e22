"""How often a sequence's guesses come true, as far as has been seen.

Guesses of a sequence's next tokens from what it has already: prompt lookup (Saxena 2023).

The sequence's last tokens are looked for in what comes before them; what followed there is the guess. The latest
place wins among those that agree longest, up to `MAX_MATCH` tokens. Four bytes a token is all that is kept.

Drafts for a step's decoding sequences: guessed tokens that the step computes too, and draws behind.

A token is drawn from what stands before it and from noise that its position decides, so behind a draft that came
true it is the one that plain decoding would have drawn: drafts change when tokens come, and nothing else. A guess
is what a grammar leaves no choice of, or what followed the last tokens before (`lookup`). Here is decided which
guesses are worth their time: as many as bring more tokens a second, by how often the sequence's guesses came true
(`acceptance`; a grammar's always do) and what a token more costs a step (`row_costs`). A draft takes blocks that
are free for the length of a step, and rows that the batch leaves; nobody waits or gives way for it.
"""

from array import array
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import takewhile

from server.engine.cost_model import RowCosts
from server.engine.kv_cache import BlockManager
from server.engine.sequence import Chunk, Sequence

_PRIOR = (0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.85)  # of matches from MIN_MATCH to MAX_MATCH tokens
_PRIOR_WEIGHT = 3.0  # in guesses
_MEMORY = 0.9  # what a guess still weighs when the next one of its length has been seen


class Acceptance:
    """Shares of guessed tokens that were then drawn, by the length of the match behind each."""

    def __init__(self) -> None:
        self._right = [_PRIOR_WEIGHT * share for share in _PRIOR]
        self._seen = [_PRIOR_WEIGHT] * len(_PRIOR)

    def chances(self, match: int, num_tokens: int) -> Iterator[float]:
        """That the first guessed token is drawn, that the first two are, and so on."""
        chance = 1.0
        for i in range(num_tokens):
            place = _place(match + i)
            chance *= self._right[place] / self._seen[place]
            yield chance

    def observe(self, match: int, is_right: bool) -> None:
        """A token that was guessed behind so many that agreed was drawn, or another one."""
        place = _place(match)
        self._right[place] = _MEMORY * self._right[place] + is_right
        self._seen[place] = _MEMORY * self._seen[place] + 1


def _place(match: int) -> int:
    return min(match, MAX_MATCH) - MIN_MATCH


MIN_MATCH, MAX_MATCH = 2, 8

_SIZE = array("i").itemsize


@dataclass(frozen=True)
class Guess:
    """The tokens that may follow, because the last `match` tokens stood before them once."""

    token_ids: Seq[int]
    match: int


class PromptLookup:
    """The tokens of one sequence, which only grows."""

    def __init__(self) -> None:
        self._packed = bytearray()

    def guess(self, token_ids: Seq[int], max_tokens: int) -> Guess | None:
        """What may follow `token_ids`, all of the sequence's: `max_tokens` tokens, at least one. None where the
        last ones stand nowhere else."""
        packed = self._packed
        packed += array("i", token_ids[len(packed) // _SIZE :]).tobytes()
        match, end = 0, len(packed) - _SIZE  # the match's, which isn't that of the sequence
        for num in range(MIN_MATCH, MAX_MATCH + 1):
            found = self._last_end(packed[-num * _SIZE :], end)
            if found < 0:
                break
            match, end = num, found
        if not match:
            return None
        followed = token_ids[end // _SIZE :]  # and goes round, where it reaches the sequence's end
        return Guess([followed[i % len(followed)] for i in range(max_tokens)], match)

    def _last_end(self, pattern: bytearray, stop: int) -> int:
        """Where the last occurrence before `stop` ends; -1 where there is none."""
        at = self._packed.rfind(pattern, 0, stop)
        while at > 0 and at % _SIZE:  # bytes of neighbours that look like the tokens
            at = self._packed.rfind(pattern, 0, at + len(pattern) - 1)
        return at + len(pattern) if at >= 0 else -1


MAX_DRAFT = 15  # tokens: with the one before them they fill a tile of 16 rows


@dataclass(frozen=True)
class _Weighed:
    """Tokens that may follow, and the chance that the first comes, the first two do, and so on."""

    token_ids: Seq[int]
    chances: Seq[float]


@dataclass
class _State:
    """What is known of a decoding sequence."""

    lookup: PromptLookup = field(default_factory=PromptLookup)
    acceptance: Acceptance = field(default_factory=Acceptance)
    guess: Guess | None = None  # the last look-up's, drafted or not
    position: int = 0  # of its first token


class Speculator:
    """Extends steps. It knows a sequence from its first decode until `forget`."""

    def __init__(
        self, blocks: BlockManager, eos: Collection[int], max_num_seqs: int, *, is_on: bool = True
    ) -> None:
        """A step draws at most `max_num_seqs` tokens, or those of one sequence with the longest draft."""
        self.costs = RowCosts(max_num_seqs)
        self.num_drafted_tokens = 0
        self._blocks = blocks
        self._eos = frozenset(eos)
        self._max_rows = max(max_num_seqs, 1 + MAX_DRAFT)
        self._is_on = is_on
        self._states: dict[Sequence, _State] = {}

    def extend(self, chunks: Seq[Chunk]) -> Seq[Chunk]:
        """The chunks, those of decoding sequences with a draft where that pays. Blocks for it are reserved."""
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
        """A step of these chunks took so long."""
        if self._is_on and all(chunk.is_decode and chunk.samples for chunk in chunks):
            self.costs.observe(len(chunks), sum(len(chunk.draft) for chunk in chunks), seconds)

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        self._states.pop(sequence, None)

    def _guess(self, chunk: Chunk) -> _Weighed | None:
        """What may follow a decoding sequence, after a look at what became of the last guess."""
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
            if sequence.constraint.after(forced).is_complete:  # behind the last one nothing is drawn
                forced = forced[:-1]
            return _Weighed(forced, [1.0] * len(forced))
        state.guess = guess = state.lookup.guess(sequence.token_ids, max_tokens)
        state.position = sequence.num_tokens
        if guess is None:
            return None
        return _Weighed(guess.token_ids, list(state.acceptance.chances(guess.match, len(guess.token_ids))))

    def _draft(self, chunk: Chunk, token_ids: Seq[int]) -> tuple[int, ...]:
        """As many of these tokens as may follow and find blocks, which are reserved."""
        sequence = chunk.sequence
        # Behind what ends an answer nothing is drawn, and the end itself need not be drafted.
        draft = tuple(takewhile(lambda token_id: token_id not in self._eos, token_ids))
        if draft and sequence.constraint is not None:
            draft = draft[: sequence.constraint.num_allowed(draft)]
        if draft and not self._blocks.reserve(sequence, chunk.stop + len(draft)):
            draft = draft[: len(sequence.block_table) * self._blocks.block_size - chunk.stop]
        return draft


def draft_sizes(num_decoding: int, chances: Seq[Seq[float]], cost: float, max_tokens: int) -> list[int]:
    """How many tokens of each guess to draft, so that all sequences together get the most tokens a second.

    `chances` of each guess: that its first token comes true, its first two, and so on. `cost` is what a drafted
    token adds to a step's time, as a share of it; `max_tokens` bounds all drafts together.
    """
    sizes = [0] * len(chances)
    num_tokens, time = float(num_decoding), 1.0  # that a step brings, on the average, and takes
    best_first = sorted(((chance, i) for i, of_guess in enumerate(chances) for chance in of_guess), reverse=True)
    for chance, i in best_first[:max_tokens]:
        if chance * time <= cost * num_tokens:
            break
        sizes[i] += 1
        num_tokens, time = num_tokens + chance, time + cost
    return sizes
