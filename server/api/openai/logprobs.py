"""Log-probabilities in OpenAI's two forms, for exactly the tokens that make up the text.

The engine also returns the log-probabilities of the end token or of the stop string's tokens. This module leaves
these out, so that joining the tokens gives the text.
"""

import codecs
from collections import deque
from collections.abc import Sequence
from functools import partial

from server.api.generate import MIN_LOGPROB, in_turns
from server.engine.request import SampledLogprob, SequenceOutput, TokenLogprob


class _Places:
    """Computes the offsets of a text's tokens, in characters. Invalid bytes count as U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_characters = 0

    def next(self, content: bytes) -> int:
        """Return the offset, in characters, at which the next token begins. `content` is the token's bytes."""
        self._num_characters += len(self._decoder.decode(content[:1]))
        unfinished = self._decoder.getstate()[0]  # may be half of a surrogate, whose bytes become a character each
        start = self._num_characters + len(unfinished.decode(errors="replace")) - bool(content)
        self._num_characters += len(self._decoder.decode(content[1:]))
        return start


class TextLogprobs:
    """The log-probabilities of a choice, each returned with the piece of text in which its token begins."""

    def __init__(self) -> None:
        self._pending: deque[tuple[int, SampledLogprob]] = deque()  # (offset, token)
        self._places = _Places()
        self._num_characters = 0

    def push(self, output: SequenceOutput) -> list[SampledLogprob]:
        """Return the log-probabilities to send with this output's text."""
        for entry in output.logprobs:
            self._pending.append((self._places.next(bytes(entry.chosen.bytes)), entry))
        self._num_characters += len(output.text)
        ready = []
        while self._pending and (self._pending[0][0] < self._num_characters or output.finish_reason == "length"):
            ready.append(self._pending.popleft()[1])
        return ready


def of_chat(entries: Sequence[SampledLogprob], num_top: int) -> dict[str, object]:
    """Return log-probabilities in the form of chat answers: a list of tokens with their likeliest alternatives."""
    return {"content": [_sampled(num_top, entry) for entry in entries], "refusal": None}


async def of_whole_chat(entries: Sequence[SampledLogprob], num_top: int) -> dict[str, object]:
    """Return the same as `of_chat` for a whole answer, but let other requests run in between."""
    return {"content": await in_turns(partial(_sampled, num_top), entries), "refusal": None}


class LegacyLogprobs:
    """A choice's log-probabilities in the form of completions: parallel lists of the tokens' properties.

    One of the lists has the offset of each token in the choice's text.
    """

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._places = _Places()

    def of(self, entries: Sequence[SampledLogprob]) -> dict[str, object]:
        """Return the choice's next entries as parallel lists, with offsets from the start of the choice's text."""
        return {
            "tokens": [_name(entry.chosen) for entry in entries],
            "token_logprobs": [_logprob(entry.chosen) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries] if self._num_top else None,
            "text_offset": [self._places.next(bytes(entry.chosen.bytes)) for entry in entries],
        }

    def _top(self, entry: SampledLogprob) -> dict[str, float]:
        """Return the likeliest tokens, and the chosen token even if it isn't among them."""
        return {_name(token): _logprob(token) for token in (*entry.top[: self._num_top], entry.chosen)}


def _sampled(num_top: int, entry: SampledLogprob) -> dict[str, object]:
    return {**_token(entry.chosen), "top_logprobs": [_token(token) for token in entry.top[:num_top]]}


def _token(token: TokenLogprob) -> dict[str, object]:
    return {"token": token.text, "bytes": list(token.bytes), "logprob": _logprob(token)}


def _logprob(token: TokenLogprob) -> float:
    return max(token.logprob, MIN_LOGPROB)


def _name(token: TokenLogprob) -> str:
    """Return the token as a key of a JSON object: its text, or its bytes if they aren't whole characters."""
    content = bytes(token.bytes)
    try:
        return content.decode() or token.text
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
