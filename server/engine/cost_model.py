"""What a token more costs: how much longer a step takes for it, by the steps measured lately.

For each number of decoding sequences, up to a power of two, a line is fitted to the steps' seconds over their
numbers of other tokens, drafted ones or those of prompts. Old steps fade; where recent ones tell little, the cost
goes back to what is assumed at first, so that one that was found too high is tried again.

How much of prompts a step reads beside sequences that decode, whose next tokens wait for all of it.

Prompts take a fixed share of the step's time, by the steps measured lately. A fixed number of tokens would be a
short moment on one machine and a long one on another, or with other adapters. At a share of 0.6 long prompts took
a fifth longer than at 0.71, and the longest pauses a quarter less (docs/performance.md).
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from server.engine.sequence import Chunk

_MEMORY = 0.99  # what a step still weighs after the next one
_ASSUMED_WEIGHT = 10.0  # as much as so many steps tell, with one token more or less than the mean
_OUTLIER = 2.0  # times what a step should take: others held it up
_LEAST = 0.01


class RowCosts:
    """Costs of tokens beside those of decoding sequences, as shares of a step without any."""

    def __init__(self, max_num_seqs: int, assumed_step: int = 10) -> None:
        """Before anything is measured, `assumed_step` such tokens are taken to cost what a step of one sequence
        does, and a further sequence what one of them does."""
        bands = {_band(num) for num in range(1, max_num_seqs + 1)}
        self._lines = {band: _Line(1 / (assumed_step - 1 + band)) for band in bands}

    def of(self, num_sequences: int) -> float:
        """Of one more token, in a step of so many decoding sequences."""
        return self._lines[_band(num_sequences)].fit()[1]

    def observe(self, num_sequences: int, num_tokens: int, seconds: float) -> None:
        """A step of so many decoding sequences with so many other tokens took so long."""
        line = self._lines[_band(num_sequences)]
        start, share = line.fit()
        usual = start * (1 + share * num_tokens)
        line.add(num_tokens, min(seconds, _OUTLIER * usual) if usual else seconds)


def _band(num_sequences: int) -> int:
    """The power of two that isn't below."""
    return 1 << (num_sequences - 1).bit_length()


@dataclass
class _Line:
    """Faded sums over steps, of x tokens and y seconds."""

    assumed: float  # slope, as a share of y where x is 0
    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.n = _MEMORY * self.n + 1
        self.x = _MEMORY * self.x + x
        self.y = _MEMORY * self.y + y
        self.xx = _MEMORY * self.xx + x * x
        self.xy = _MEMORY * self.xy + x * y

    def fit(self) -> tuple[float, float]:
        """Seconds where x is 0, and the slope as a share of them: least squares, drawn towards what is assumed."""
        if not self.y:
            return 0.0, self.assumed
        mean_x, mean_y = self.x / self.n, self.y / self.n
        slope = self.assumed * mean_y / (1 + self.assumed * mean_x)
        covariance, variance = self.xy - self.x * mean_y, self.xx - self.x * mean_x
        slope = (covariance + _ASSUMED_WEIGHT * slope) / (variance + _ASSUMED_WEIGHT)
        start = max(mean_y - slope * mean_x, mean_y / (1 + mean_x))  # no token costs more than a step
        return start, max(slope / start, _LEAST)


_LEAST_TOKENS = 16  # tokens: fewer take hardly less
_ASSUMED_TOKEN = 0.001  # seconds, before a step of prompts alone was seen
_RATIO_MEMORY = 0.8  # of the time of a prompt's token, which grows with what comes before it
_ASSUMED_STEP = 16  # a step of one sequence, in tokens of prompts


class PromptRoom:
    """Learns from every step."""

    def __init__(self, max_num_seqs: int, share: float) -> None:
        self._costs = RowCosts(max_num_seqs, _ASSUMED_STEP)
        self._slower = share / (1 - share)  # by how many steps without prompts a step with them may be longer
        self._token_seconds = _ASSUMED_TOKEN

    def beside(self, num_decoding: int) -> int:
        """Tokens of prompts in a step of so many decoding sequences, one or more."""
        return max(_LEAST_TOKENS, int(self._slower / self._costs.of(num_decoding)))

    def within(self, seconds: float, num_decoding: int = 0) -> int:
        """Return how many tokens of prompts make a step of about this time, with `num_decoding` others."""
        return max(_LEAST_TOKENS, int(seconds / self._token_seconds) - num_decoding)

    def observe(self, chunks: Seq[Chunk], seconds: float) -> None:
        """Note that a step of these chunks took so long. Drafts belong to the decodes."""
        num_decoding = sum(chunk.is_decode for chunk in chunks)
        num_tokens = sum(chunk.num_tokens for chunk in chunks if not chunk.is_decode)
        if num_decoding:
            self._costs.observe(num_decoding, num_tokens, seconds)
        elif num_tokens >= _LEAST_TOKENS:
            token_seconds = min(seconds / num_tokens, _OUTLIER * self._token_seconds)
            self._token_seconds += (1 - _RATIO_MEMORY) * (token_seconds - self._token_seconds)
