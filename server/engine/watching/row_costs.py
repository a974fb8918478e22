"""What a token more costs: how much longer a step takes for it, by the steps measured lately.

For each number of decoding sequences, up to a power of two, a line is fitted to the steps' seconds over their
numbers of other tokens, drafted ones or those of prompts. Old steps fade; where recent ones tell little, the cost
goes back to what is assumed at first, so that one that was found too high is tried again.
"""

from dataclasses import dataclass

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
