"""Convert tokens to text piece by piece, without partial characters or stop strings.

`TokenBytes` maps token ids to bytes. It works for byte-level tokenizers, which all SmolLM models have.
`TextStream` is the text of one sequence. It holds back the bytes of an unfinished character, and text that may be
the beginning of a stop string.
"""

import codecs
from collections.abc import Mapping, Sequence

from server.engine.request import Logprobs, SampledLogprob, TokenLogprob


class TokenBytes:
    """The bytes of each token of a byte-level vocabulary. Special tokens have no bytes."""

    def __init__(self, vocabulary: Mapping[str, int], added: Mapping[int, str], special: Sequence[int]) -> None:
        """`vocabulary` maps tokens to ids, and `added` maps the ids of added tokens to their texts.

        `special` has the ids of the special tokens.
        """
        decode = {character: byte for byte, character in _byte_characters().items()}
        self._bytes: dict[int, bytes] = {}
        for token, token_id in vocabulary.items():
            if token_id not in added:
                self._bytes[token_id] = bytes(decode[character] for character in token if character in decode)
        self._bytes |= {token_id: content.encode() for token_id, content in added.items()}
        self._text = dict(added)
        self._special = frozenset(special)
        self._described: dict[int, tuple[str, tuple[int, ...]]] = {}  # text and bytes by token id

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes that the token adds to the text. A special or unknown token adds none."""
        return b"" if token_id in self._special else self._bytes.get(token_id, b"")

    def name_of(self, token_id: int) -> str:
        """Return the token's text, with U+FFFD for partial characters, or a special token's name."""
        if token_id in self._special:
            return self._text.get(token_id, "")
        return self.bytes_of(token_id).decode(errors="replace")

    def describe(self, token_id: int, logprobs: Logprobs) -> SampledLogprob:
        """Return the log-probabilities, with texts and bytes, of `token_id` and of the likeliest tokens."""
        likeliest = (self._describe(other, logprob) for other, logprob in logprobs.top)
        return SampledLogprob(self._describe(token_id, logprobs.chosen), tuple(likeliest))

    def _describe(self, token_id: int, logprob: float) -> TokenLogprob:
        known = self._described.get(token_id)
        if known is None:
            known = self._described[token_id] = self.name_of(token_id), tuple(self.bytes_of(token_id))
        return TokenLogprob(token_id, *known, logprob)


class TextStream:
    """The text of one sequence. `push` and `finish` return the text that became final."""

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str], min_tokens: int = 0) -> None:
        """A stop string counts only if it ends after the text of the first `min_tokens` tokens."""
        self.stopped = False  # whether a stop string was found; the text ends before it
        self._token_bytes = token_bytes
        self._stop = tuple(stop)
        self._num_early = min_tokens  # tokens to come in whose text no stop string may end
        self._num_exempt = 0  # first characters of `_pending` in which no stop string may end
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending = ""

    def push(self, token_id: int) -> str:
        """Add a token, and return the new text. The text is empty once a stop string was found."""
        if self.stopped:
            return ""
        text = self._pending + self._decoder.decode(self._token_bytes.bytes_of(token_id))
        if self._num_early:
            self._num_early -= 1
            self._num_exempt = len(text)
        return self._decide(text)

    def finish(self) -> str:
        """End the text, and return the rest of it. An unfinished character becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._decide(self._pending + self._decoder.decode(b"", final=True))
        pending, self._pending = self._pending, ""
        return text if self.stopped else text + pending

    def _decide(self, text: str) -> str:
        """Return the beginning of `text` that is final, and keep the rest."""
        if not self._stop:
            return text
        found = [
            at for stop in self._stop if (at := text.find(stop, max(self._num_exempt - len(stop) + 1, 0))) >= 0
        ]
        if found:
            self.stopped = True
            self._pending = ""
            return text[: min(found)]
        num_pending = max((_overlap(text, stop) for stop in self._stop), default=0)
        num_final = len(text) - num_pending
        self._pending, self._num_exempt = text[num_final:], max(self._num_exempt - num_final, 0)
        return text[:num_final]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


def _byte_characters() -> dict[int, str]:
    """Return the printable character of each byte in byte-level vocabularies (Radford et al. 2019, GPT-2).

    A printable Latin-1 byte is its own character. The other bytes have the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return {byte: shifted.get(byte, chr(byte)) for byte in range(256)}
