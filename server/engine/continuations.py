"""The continuations of one prompt that are scored together, as a trie of tokens.

The engine computes each path from the root that ends before a continuation's last token, because a token's score
needs only the tokens before it. The paths are computed one after another in the same sequence. A path begins
where it leaves the path before, so a token that several continuations share is computed once.
"""

import math
from collections.abc import Sequence as Seq
from itertools import zip_longest


class TokenTrie:
    """Continuations, the path that is being computed, and the scores so far. Each continuation has a token."""

    def __init__(self, continuations: Seq[tuple[int, ...]]) -> None:
        self._children: list[dict[int, int]] = [{}]  # for each node: its next tokens and their nodes
        self._logprobs: list[float] = [0.0]  # of each node's token; node 0 is the end of the prompt
        self._continuations = [self._nodes(continuation) for continuation in continuations]
        paths = sorted({continuation[:-1] for continuation in continuations})
        # In this order, a path that is a prefix of others comes right before one of these.
        pairs = zip_longest(paths, paths[1:])
        self._paths = [path for path, after in pairs if after is None or after[: len(path)] != path]
        self.max_length = max(map(len, self._paths))
        self._number = 0

    @property
    def num_tokens(self) -> int:
        """The number of scored tokens. A token that several continuations share counts once."""
        return len(self._children) - 1

    @property
    def path(self) -> tuple[int, ...]:
        """The tokens after the prompt that are being computed."""
        return self._paths[self._number]

    def advance(self) -> int | None:
        """Go to the next path. Return how many tokens it shares with the last one, or None if there is no next."""
        if self._number + 1 == len(self._paths):
            return None
        last = self.path
        self._number += 1
        pairs = enumerate(zip(last, self.path, strict=False))
        return next(place for place, (old, new) in pairs if old != new)

    def targets(self, num_tokens: int) -> tuple[int, ...]:
        """Return the tokens to score after the first `num_tokens` tokens of the path."""
        return tuple(self._children[self._node(num_tokens)])

    def record(self, num_tokens: int, logprobs: Seq[float]) -> None:
        """Store the log-probabilities of `targets(num_tokens)`, in the same order."""
        for node, logprob in zip(self._children[self._node(num_tokens)].values(), logprobs, strict=True):
            self._logprobs[node] = logprob

    def scores(self) -> tuple[float, ...]:
        """Return the log-probability of each continuation: the sum over its tokens, in nats."""
        return tuple(math.fsum(self._logprobs[node] for node in nodes) for nodes in self._continuations)

    def _node(self, num_tokens: int) -> int:
        return self._nodes(self.path[:num_tokens])[-1]

    def _nodes(self, token_ids: Seq[int]) -> list[int]:
        """Return the nodes from the root to the end of these tokens. Missing nodes are added."""
        nodes = [0]
        for token_id in token_ids:
            children = self._children[nodes[-1]]
            if token_id not in children:
                children[token_id] = len(self._children)
                self._children.append({})
                self._logprobs.append(math.nan)
            nodes.append(children[token_id])
        return nodes
