"""Estimate from recent steps how much time an extra token adds to a step, and size prompts' chunks accordingly.

`RowCosts` fits a line to steps' times over their numbers of extra tokens, which are drafted tokens or tokens of
prompts. It fits a separate line for up to 1, 2, 4, 8, ... decoding sequences. Old steps lose weight. Without
recent steps that show the cost, the estimate returns to the initial assumption, so that a cost that was estimated
too high is measured again.

`PromptRoom` limits the prompt tokens of a step to a fixed share of its time, since decoding sequences wait for the
whole step. A fixed number of tokens would take a different time on each machine and with each set of adapters.
With a share of 0.6 instead of the default 0.71, long prompts take a fifth longer, and the longest pauses are a
quarter shorter (docs/performance.md).
"""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from server.engine.sequence import Chunk

_MEMORY = 0.99  # factor by which a step loses weight with each later step
_ASSUMED_WEIGHT = 10.0  # weight of the assumption, in steps with one token more or less than the mean
_OUTLIER = 2.0  # a step counts as at most this many times its expected time; another process may have delayed it
_LEAST = 0.01  # minimum cost of an extra token
_LEAST_TOKENS = 16  # prompt tokens in a step; fewer are hardly quicker
_ASSUMED_TOKEN = 0.001  # seconds for a prompt's token until a step of prompts alone was measured
_RATIO_MEMORY = 0.8  # weight of the last estimate of that time at a new step; the time grows with the context
_ASSUMED_STEP = 16  # prompt tokens that are assumed to take the time of a step of one sequence


class RowCosts:
    """The cost of an extra token (drafted or of a prompt), as a share of a step's time without extra tokens."""

    def __init__(self, max_num_seqs: int, assumed_step: int = 10) -> None:
        """Assume at first that `assumed_step` extra tokens cost as much as a step of one sequence.

        One more decoding sequence is assumed to cost as much as an extra token.
        """
        bands = {_band(num) for num in range(1, max_num_seqs + 1)}
        self._lines = {band: _Line(1 / (assumed_step - 1 + band)) for band in bands}

    def of(self, num_sequences: int) -> float:
        """Return the cost of an extra token in a step of `num_sequences` decoding sequences.

        An extra token is a drafted token or a token of a prompt.
        """
        return self._lines[_band(num_sequences)].fit()[1]

    def extra_within(self, seconds: float, num_sequences: int) -> float:
        """Return how many extra tokens fit into a step of `seconds`; infinitely many before the first step."""
        start, share = self._lines[_band(num_sequences)].fit()
        return (seconds / start - 1) / share if start else math.inf

    def observe(self, num_sequences: int, num_tokens: int, seconds: float) -> None:
        """Learn from a step that decoded `num_sequences` sequences and computed `num_tokens` extra tokens."""
        line = self._lines[_band(num_sequences)]
        start, share = line.fit()
        usual = start * (1 + share * num_tokens)
        line.add(num_tokens, min(seconds, _OUTLIER * usual) if usual else seconds)


def _band(num_sequences: int) -> int:
    """Return the smallest power of two that is at least `num_sequences`."""
    return 1 << (num_sequences - 1).bit_length()


@dataclass
class _Line:
    """A line that gives the seconds y of a step with x extra tokens, fitted to weighted sums over steps."""

    assumed: float  # assumed slope, as a share of the seconds at x = 0
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
        """Return the seconds at x = 0, and the slope as a share of these seconds.

        The fit is by least squares, with the assumed slope as a prior.
        """
        if not self.y:
            return 0.0, self.assumed
        mean_x, mean_y = self.x / self.n, self.y / self.n
        slope = self.assumed * mean_y / (1 + self.assumed * mean_x)
        covariance, variance = self.xy - self.x * mean_y, self.xx - self.x * mean_x
        slope = (covariance + _ASSUMED_WEIGHT * slope) / (variance + _ASSUMED_WEIGHT)
        start = max(mean_y - slope * mean_x, mean_y / (1 + mean_x))  # no token costs more than a step
        return start, max(slope / start, _LEAST)


class PromptRoom:
    """An estimate of how many prompt tokens a step should compute. It learns from every step."""

    def __init__(self, max_num_seqs: int, share: float) -> None:
        """Let prompts take up to `share` of a step's time while sequences decode."""
        self._costs = RowCosts(max_num_seqs, _ASSUMED_STEP)
        self._slower = share / (1 - share)  # time for prompts, relative to a step without prompts
        self._token_seconds = _ASSUMED_TOKEN

    def with_decodes(self, num_decoding: int) -> int:
        """Return how many prompt tokens to compute in a step that decodes `num_decoding` (at least 1)
        sequences."""
        return max(_LEAST_TOKENS, int(self._slower / self._costs.of(num_decoding)))

    def within(self, seconds: float, num_decoding: int = 0) -> int:
        """Return how many prompt tokens fit into a step of `seconds` with `num_decoding` decoding sequences."""
        room = seconds / self._token_seconds - num_decoding
        if num_decoding:  # under adapters, a sequence's token may cost more than a prompt's
            room = min(room, self._costs.extra_within(seconds, num_decoding))
        return max(_LEAST_TOKENS, int(room))

    def observe(self, chunks: Seq[Chunk], seconds: float) -> None:
        """Learn from a step that computed `chunks` in `seconds`. Drafted tokens aren't counted."""
        num_decoding = sum(chunk.is_decode for chunk in chunks)
        num_tokens = sum(chunk.num_tokens for chunk in chunks if not chunk.is_decode)
        if num_decoding:
            self._costs.observe(num_decoding, num_tokens, seconds)
        elif num_tokens >= _LEAST_TOKENS:
            token_seconds = min(seconds / num_tokens, _OUTLIER * self._token_seconds)
            self._token_seconds += (1 - _RATIO_MEMORY) * (token_seconds - self._token_seconds)
