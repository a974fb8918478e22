"""Guesses of a sequence's next tokens from what it has already: prompt lookup (Saxena 2023).

The sequence's last tokens are looked for in what comes before them; what followed there is the guess. The latest
place wins among those that agree longest, up to `MAX_MATCH` tokens. Four bytes a token is all that is kept.
"""

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass

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
