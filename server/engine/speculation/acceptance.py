"""How often a sequence's guesses come true, as far as has been seen."""

from collections.abc import Iterator

from server.engine.speculation.lookup import MAX_MATCH, MIN_MATCH

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
