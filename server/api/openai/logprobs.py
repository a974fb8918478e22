"""Log-probabilities in OpenAI's two forms, for exactly the tokens that make up the text; in vLLM's for prompts.

The engine also returns the log-probabilities of the end token or of the stop string's tokens. This module leaves
these out, so that joining the tokens gives the text. With `echo` it keeps them: evaluation harnesses find a
continuation's log-probabilities by counting back from the last generated token.
"""

import codecs
import math
from collections import deque
from collections.abc import Sequence
from functools import partial

from server.api.generate import MIN_LOGPROB, in_turns
from server.engine.detokenizer import TokenBytes
from server.engine.request import Logprobs, SampledLogprob, SequenceOutput, TokenLogprob
from server.model.text.tokenizer import BaseTokenizer


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

    def __init__(self, keeps_all: bool = False) -> None:
        """If `keeps_all`, return those of tokens after the text's end, too."""
        self._keeps_all = keeps_all
        self._pending: deque[tuple[int, SampledLogprob]] = deque()  # (offset, token)
        self._places = _Places()
        self._num_characters = 0

    def push(self, output: SequenceOutput) -> list[SampledLogprob]:
        """Return the log-probabilities to send with this output's text."""
        for entry in output.logprobs[len(output.scores) :]:
            self._pending.append((self._places.next(bytes(entry.chosen.bytes)), entry))
        self._num_characters += len(output.text)
        ready = []
        takes_all = output.finish_reason == "length" or (self._keeps_all and output.finish_reason is not None)
        while self._pending and (self._pending[0][0] < self._num_characters or takes_all):
            ready.append(self._pending.popleft()[1])
        return ready


def of_chat(entries: Sequence[SampledLogprob], num_top: int) -> dict[str, object]:
    """Return log-probabilities in the form of chat answers: a list of tokens with their likeliest alternatives."""
    return {"content": [_sampled(num_top, entry) for entry in entries], "refusal": None}


async def of_whole_chat(entries: Sequence[SampledLogprob], num_top: int) -> dict[str, object]:
    """Return the same as `of_chat` for a whole answer, but let other requests run in between."""
    return {"content": await in_turns(partial(_sampled, num_top), entries), "refusal": None}


async def of_prompt(entries: Sequence[SampledLogprob], num_top: int) -> list[dict[int, object] | None]:
    """Return the log-probabilities of a prompt's tokens in vLLM's form: null for the first token, which isn't in
    `entries`, and then a map from token ids to log-probabilities for each token.

    A map has the `num_top` likeliest tokens and the prompt's own. Its rank is null if it isn't among the likeliest
    tokens that the engine returned.
    """
    return [None, *await in_turns(partial(_ranked, num_top), entries)]


def _ranked(num_top: int, entry: SampledLogprob) -> dict[int, object]:
    ranks = {token.token_id: rank for rank, token in enumerate(entry.top, 1)}
    return {
        token.token_id: {
            "logprob": _logprob(token),
            "rank": ranks.get(token.token_id),
            "decoded_token": token.text,
        }
        for token in (entry.chosen, *entry.top[:num_top])
    }


def first_token(tokenizer: BaseTokenizer, token_id: int) -> TokenLogprob:
    """Return a prompt's first token, which has no log-probability (NaN)."""
    added = tokenizer.added_tokens.get(token_id)
    name = tokenizer.backend.id_to_token(token_id)
    described = TokenBytes(
        {} if name is None else {name: token_id},
        {} if added is None else {token_id: added.content},
        [token_id] if added is not None and added.special else [],
    ).describe(token_id, Logprobs(math.nan, ()))
    return described.chosen


class LegacyLogprobs:
    """A choice's log-probabilities in the form of completions: parallel lists of the tokens' properties.

    One of the lists has the offset of each token in the choice's text.
    """

    def __init__(self, num_top: int, first: TokenLogprob | None = None) -> None:
        """`first` is the first token of the prompt that the text repeats, if it does. Its entries are null."""
        self._num_top = num_top
        self._first = first
        self._places = _Places()

    def of(self, entries: Sequence[SampledLogprob]) -> dict[str, object]:
        """Return the choice's next entries as parallel lists, with offsets from the start of the choice's text."""
        first = [] if self._first is None else [self._first]
        self._first = None
        tokens = [*first, *(entry.chosen for entry in entries)]
        return {
            "tokens": [_name(token) for token in tokens],
            "token_logprobs": [*(None for _ in first), *(_logprob(entry.chosen) for entry in entries)],
            "top_logprobs": [*(None for _ in first), *map(self._top, entries)] if self._num_top else None,
            "text_offset": [self._places.next(bytes(token.bytes)) for token in tokens],
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
