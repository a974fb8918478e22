"""Chooses how many threads compute a step (the team size), from how long earlier steps took.

The choice doesn't change the bits of an answer. On a quiet machine more threads are faster. If another process
keeps a processor busy, threads wait for each other in each phase, and fewer threads are faster. So now and then a
step is a trial: it uses the next smaller or larger team size. If recently too few processors were free even for
the next smaller size, the trial uses the largest size for which enough were free. A budget bounds the cost of
trials. It grows by SHARE of a step with each step. A trial costs the time by which it is longer than a step of the
best size so far. Part of the budget is saved for the moment when steps become slow.

Steps are compared only with steps of similar size, which form a band.
"""

from bisect import bisect_right
from collections import deque

SHARE = 0.01
"""Share of all steps' time that trials may cost in the long run."""

_RESERVE = 8.0  # in steps: what trials may cost at once when steps become slow
_FIRST_RESERVE = 2.0  # in a new band
_LONG_BAND, _FIRST_RESERVE_OF_LONG = 4, 1.0  # steps of 128 tokens or more: prompts that somebody waits for
_FEE = 0.05  # in steps: the least that a trial is charged, so that equal sizes aren't tried all the time
_SLOW = 1.25  # a band is slow if its recent steps took this many times as long as its usual ones
_RECENT_MEMORY, _USUAL_MEMORY = 0.8, 0.99  # weight of the earlier mean in the new mean
_OUTLIER = 1.5  # a step counts as at most this many times as long as those that it is compared with

_NUM_TRIALS, _FEW_TRIALS = 12, 4  # how many of the latest trials of two sizes are compared
# A larger team is chosen if `_Pair.gain` is below the first number, or after few trials below the second.
_LEAST_GAIN, _GREAT_GAIN = 0.95, 0.8
# A smaller team is chosen if `_Pair.gain` is at least the first number, or after few trials the second.
_NO_GAIN, _GREAT_LOSS = 1.0, 1.25

_FIRST_TOKENS = 9  # reading the weights takes as long as computing this number of tokens
_POSITIONS_OF_A_TOKEN = 600  # positions that attention reads in the time that a token takes


class TeamSize:
    """Chooses the number of threads for each step, up to `num_threads`, and learns from steps' times."""

    def __init__(self, num_threads: int) -> None:
        self._sizes = team_sizes(num_threads)
        self._bands: dict[int, _Band] = {}

    def choose(self, num_tokens: int) -> int:
        """Return the number of threads for the next step, which has `num_tokens` tokens."""
        return self._sizes[self._band(num_tokens).choose()]

    def observe(
        self, num_threads: int, num_tokens: int, num_positions: int, seconds: float, processor_seconds: float
    ) -> None:
        """Learn from how long a step took with the chosen number of threads.

        `processor_seconds` is the processor time of all these threads. `num_positions` is the total number of
        positions that the step's tokens attended to.
        """
        work = _FIRST_TOKENS + num_tokens + num_positions / _POSITIONS_OF_A_TOKEN
        size = self._sizes.index(num_threads)
        self._band(num_tokens).observe(size, seconds / work, processor_seconds / max(seconds, 1e-9))

    def _band(self, num_tokens: int) -> "_Band":
        band = num_tokens.bit_length() // 2  # 1, 2 to 7, 8 to 31 and so on
        if band not in self._bands:
            reserve = _FIRST_RESERVE if band < _LONG_BAND else _FIRST_RESERVE_OF_LONG
            self._bands[band] = _Band(self._sizes, reserve)
        return self._bands[band]


def team_sizes(num_threads: int) -> list[int]:
    """Return the sizes that are tried: 1, 2, 3, 4, 6, 8, 12 and so on, and `num_threads`."""
    powers = [1 << bit for bit in range(num_threads.bit_length())]
    sizes = {num_threads, *powers, *(power * 3 // 2 for power in powers)}
    return sorted(size for size in sizes if size <= num_threads)


class _Pair:
    """The latest trials of two team sizes. In a trial both sizes do the same work, one soon after the other."""

    def __init__(self, assumed_gain: float) -> None:
        self.expected_gain = assumed_gain  # the gain of the latest trial, which is the first to show a change
        self._trials: deque[tuple[float, float]] = deque(maxlen=_NUM_TRIALS)

    def add(self, smaller: float, larger: float) -> None:
        self.expected_gain = larger / smaller
        self._trials.append((min(smaller, _OUTLIER * larger), min(larger, _OUTLIER * smaller)))

    @property
    def is_known(self) -> bool:
        return len(self._trials) == _NUM_TRIALS

    @property
    def gain(self) -> float:
        """The larger team size's time divided by the smaller one's, over the latest trials."""
        return sum(larger for _, larger in self._trials) / sum(smaller for smaller, _ in self._trials)

    @property
    def wants_larger(self) -> bool:
        return len(self._trials) >= _FEW_TRIALS and self.gain < (_LEAST_GAIN if self.is_known else _GREAT_GAIN)

    @property
    def wants_smaller(self) -> bool:
        return len(self._trials) >= _FEW_TRIALS and self.gain >= (_NO_GAIN if self.is_known else _GREAT_LOSS)


class _Band:
    """The trials and times of steps of similar size.

    In this class, team sizes are indices into `sizes`, and times are seconds per token. A step's other work counts
    as a number of tokens.
    """

    def __init__(self, sizes: list[int], reserve: float) -> None:
        self._sizes = sizes
        self._pairs: dict[tuple[int, int], _Pair] = {}  # of a smaller and a larger size
        self._best = self._last_trial = len(sizes) - 1
        self._processors = float(sizes[-1])  # recent mean of how many processors the best size's threads used
        self._trial: tuple[int, float] | None = None  # size and time, kept until the next step of the best size
        self._recent = self._usual = 0.0  # mean times of steps of the best size
        self._reserve, self._savings = reserve, 0.0

    def choose(self) -> int:
        if self._trial is not None or not self._recent or len(self._sizes) == 1:
            return self._best
        for index, size in enumerate(self._neighbours()):
            if self._can_afford(size, self._savings if index == 0 else 0.0):
                return size
        return self._best

    def observe(self, size: int, seconds: float, processors: float) -> None:
        self._reserve = min(self._reserve + SHARE / 2, _RESERVE)
        self._savings += SHARE / 2
        if size != self._best:
            self._trial = size, seconds
            return
        if self._trial is not None:  # compare with this step: the step before the trial may have caused it
            trial, self._trial = self._trial, None
            if self._compare(*trial, seconds):
                return
        if self._recent:
            seconds = min(seconds, _OUTLIER * self._recent)
        self._processors = _mean(self._processors, processors, _RECENT_MEMORY)
        self._recent = _mean(self._recent, seconds, _RECENT_MEMORY)
        self._usual = _mean(self._usual, seconds, _USUAL_MEMORY)

    def _neighbours(self) -> list[int]:
        """Return the next smaller and the next larger team size, in the order in which to try them.

        No larger size is tried if the threads of the best size didn't have a processor each.
        """
        found = [] if self._best == 0 else [min(self._best - 1, self._size_of_processors)]
        if self._best < min(len(self._sizes) - 1, self._size_of_processors + 1):
            found.append(self._best + 1)
        if not self._is_slow and self._last_trial < self._best:
            found.reverse()
        return found

    def _can_afford(self, size: int, savings: float) -> bool:
        gain = self._pair(size).expected_gain
        cost = max((gain if size > self._best else 1 / gain) - 1, _FEE)
        if self._size_of_processors <= size < self._best and not self._pair(size).is_known:
            cost = _FEE  # no more threads than this size has ran at a time anyway
        may_use_reserve = self._is_slow or cost == _FEE or not self._pair(size).is_known
        return savings >= cost or (may_use_reserve and self._reserve >= cost)

    def _compare(self, size: int, seconds: float, best_seconds: float) -> bool:
        """Charge the budget for a trial of the team size `size`. Return whether it becomes the best size."""
        self._last_trial = size
        cost = max(seconds / max(best_seconds, self._recent) - 1, _FEE)
        from_savings = min(cost, max(self._savings, 0.0))
        self._savings -= from_savings
        self._reserve = max(self._reserve - (cost - from_savings), -_RESERVE)
        pair, is_larger = self._pair(size), size > self._best
        pair.add(*((best_seconds, seconds) if is_larger else (seconds, best_seconds)))
        if not (pair.wants_larger if is_larger else pair.wants_smaller):
            return False
        # The load has changed, so older trials of further sizes may be wrong, too.
        for other in [pair for pair in self._pairs if (pair[0] >= size if is_larger else pair[1] <= size)]:
            del self._pairs[other]
        self._best, self._recent, self._usual = size, seconds, seconds
        return True

    @property
    def _is_slow(self) -> bool:
        return self._recent > _SLOW * self._usual

    @property
    def _size_of_processors(self) -> int:
        """The largest team size whose threads would have had a processor each in recent steps."""
        return max(bisect_right(self._sizes, round(self._processors)) - 1, 0)

    def _pair(self, size: int) -> _Pair:
        """Return the trials that compare this team size with the best size."""
        smaller, larger = sorted((size, self._best))
        assumed = _Pair(self._sizes[smaller] / self._sizes[larger])
        return self._pairs.setdefault((smaller, larger), assumed)


def _mean(before: float, now: float, memory: float) -> float:
    return memory * before + (1 - memory) * now if before else now
