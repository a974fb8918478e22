"""Log-probabilities in OpenAI's two forms, for exactly the tokens that make up the text.

The engine also tells those of what ended an answer, an end token or a stop string: they are left out here, so that
the tokens joined are the text.
"""

import codecs
from collections import deque
from collections.abc import Sequence
from functools import partial

from server.api.generate import LEAST_LOGPROB, in_turns
from server.engine.request import SampledLogprob, SequenceOutput, TokenLogprob


class _Places:
    """Where the tokens of a text begin in it, in characters: U+FFFD stands there for bytes that are none."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_characters = 0

    def next(self, content: bytes) -> int:
        """Of the token with these bytes, which follows on those before: the character of its first byte."""
        self._num_characters += len(self._decoder.decode(content[:1]))
        unfinished = self._decoder.getstate()[0]  # half a surrogate, too, which ends as a character for each byte
        start = self._num_characters + len(unfinished.decode(errors="replace")) - bool(content)
        self._num_characters += len(self._decoder.decode(content[1:]))
        return start


class TextLogprobs:
    """The log-probabilities of one choice, each told with the piece of text that its token begins in."""

    def __init__(self) -> None:
        self._pending: deque[tuple[int, SampledLogprob]] = deque()  # (where the token starts, it)
        self._places = _Places()
        self._num_characters = 0

    def push(self, output: SequenceOutput) -> list[SampledLogprob]:
        """What to tell with this output's text."""
        for entry in output.logprobs:
            self._pending.append((self._places.next(bytes(entry.chosen.bytes)), entry))
        self._num_characters += len(output.text)
        told = []
        while self._pending and (self._pending[0][0] < self._num_characters or output.finish_reason == "length"):
            told.append(self._pending.popleft()[1])
        return told


def of_chat(entries: Sequence[SampledLogprob], num_top: int) -> dict[str, object]:
    """Chat's form: a list of tokens, each with its likeliest rivals."""
    return {"content": [_sampled(num_top, entry) for entry in entries], "refusal": None}


async def of_whole_chat(entries: Sequence[SampledLogprob], num_top: int) -> dict[str, object]:
    """The same of a whole answer's, which may be many."""
    return {"content": await in_turns(partial(_sampled, num_top), entries), "refusal": None}


class LegacyLogprobs:
    """The form of completions: four lists side by side, with each token's place in the choice's text."""

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._places = _Places()

    def of(self, entries: Sequence[SampledLogprob]) -> dict[str, object]:
        """Of the entries that follow on those of the last call. `text_offset` counts characters."""
        return {
            "tokens": [_name(entry.chosen) for entry in entries],
            "token_logprobs": [_logprob(entry.chosen) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries] if self._num_top else None,
            "text_offset": [self._places.next(bytes(entry.chosen.bytes)) for entry in entries],
        }

    def _top(self, entry: SampledLogprob) -> dict[str, float]:
        """The likeliest, and the chosen one in any case."""
        return {_name(token): _logprob(token) for token in (*entry.top[: self._num_top], entry.chosen)}


def _sampled(num_top: int, entry: SampledLogprob) -> dict[str, object]:
    return {**_token(entry.chosen), "top_logprobs": [_token(token) for token in entry.top[:num_top]]}


def _token(token: TokenLogprob) -> dict[str, object]:
    return {"token": token.text, "bytes": list(token.bytes), "logprob": _logprob(token)}


def _logprob(token: TokenLogprob) -> float:
    return max(token.logprob, LEAST_LOGPROB)


def _name(token: TokenLogprob) -> str:
    """The token as a key: its text; one that is no whole character is told by its bytes."""
    content = bytes(token.bytes)
    try:
        return content.decode() or token.text
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
