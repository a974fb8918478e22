"""How much of prompts a step reads beside sequences that decode, whose next tokens wait for all of it.

Prompts take a fixed share of the step's time, by the steps measured lately. A fixed number of tokens would be a
short moment on one machine and a long one on another, or with other adapters. At a share of 0.6 long prompts took
a fifth longer than at 0.71, and the longest pauses a quarter less (docs/performance.md).
"""

from collections.abc import Sequence as Seq

from server.engine.sequence import Chunk
from server.engine.watching.row_costs import RowCosts

_LEAST = 16  # tokens: fewer take hardly less
_ASSUMED_TOKEN = 0.001  # seconds, before a step of prompts alone was seen
_MEMORY = 0.8  # of the time of a prompt's token, which grows with what comes before it
_OUTLIER = 2.0  # times what a token should take: something else held the step up
_ASSUMED_STEP = 16  # a step of one sequence, in tokens of prompts


class PromptRoom:
    """Learns from every step."""

    def __init__(self, max_num_seqs: int, share: float) -> None:
        self._costs = RowCosts(max_num_seqs, _ASSUMED_STEP)
        self._slower = share / (1 - share)  # by how many steps without prompts a step with them may be longer
        self._token_seconds = _ASSUMED_TOKEN

    def beside(self, num_decoding: int) -> int:
        """Tokens of prompts in a step of so many decoding sequences, one or more."""
        return max(_LEAST, int(self._slower / self._costs.of(num_decoding)))

    def within(self, seconds: float, num_decoding: int = 0) -> int:
        """Return how many tokens of prompts make a step of about this time, with `num_decoding` others."""
        return max(_LEAST, int(seconds / self._token_seconds) - num_decoding)

    def observe(self, chunks: Seq[Chunk], seconds: float) -> None:
        """Note that a step of these chunks took so long. Drafts belong to the decodes."""
        num_decoding = sum(chunk.is_decode for chunk in chunks)
        num_tokens = sum(chunk.num_tokens for chunk in chunks if not chunk.is_decode)
        if num_decoding:
            self._costs.observe(num_decoding, num_tokens, seconds)
        elif num_tokens >= _LEAST:
            token_seconds = min(seconds / num_tokens, _OUTLIER * self._token_seconds)
            self._token_seconds += (1 - _MEMORY) * (token_seconds - self._token_seconds)
