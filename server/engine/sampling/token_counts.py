"""Which tokens a sequence has, and how often each is in its answer: what penalties are computed from."""

from array import array
from collections import Counter
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class TokenCounts:
    """Counts of one sequence's tokens. A call counts only what was added since the last one."""

    def __init__(self, token_ids: Seq[int], num_prompt_tokens: int) -> None:
        """`token_ids` are a prompt and the answer so far; tokens may be appended at any time."""
        self._token_ids = token_ids
        self._num_prompt_tokens = num_prompt_tokens
        self._num_counted = 0
        self._places: dict[int, int] = {}  # of a token, in the two arrays
        self._distinct = array("q")
        self._used = array("q")

    def of(self, draft: Seq[int] = ()) -> tuple[Ints, Ints]:
        """Return the distinct tokens (n,), and how often each is in the answer (n,), which ends in `draft`."""
        for position in range(self._num_counted, len(self._token_ids)):
            place = self._places.setdefault(self._token_ids[position], len(self._distinct))
            if place == len(self._distinct):
                self._distinct.append(self._token_ids[position])
                self._used.append(0)
            self._used[place] += position >= self._num_prompt_tokens
        self._num_counted = len(self._token_ids)
        distinct, used = np.array(self._distinct, np.int64), np.array(self._used, np.int64)
        new: Counter[int] = Counter()
        for token_id in draft:
            if (known := self._places.get(token_id)) is not None:
                used[known] += 1
            else:
                new[token_id] += 1
        if new:
            distinct = np.append(distinct, list(new))
            used = np.append(used, list(new.values()))
        return distinct, used
