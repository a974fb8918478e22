"""Tokens to text, a piece at a time: whole characters only, and nothing of a stop string.

`TokenBytes` maps token ids to the bytes that they stand for; it holds for byte-level tokenizers, which all SmolLM
are. `TextStream` is one sequence's text: bytes of an unfinished character, and text that may turn out to begin
a stop string, are held back until they are decided.
"""

import codecs
from collections.abc import Mapping, Sequence

from server.engine.request import Logprobs, SampledLogprob, TokenLogprob


class TokenBytes:
    """The bytes of each token of a byte-level vocabulary; special tokens stand for none."""

    def __init__(self, vocabulary: Mapping[str, int], added: Mapping[int, str], special: Sequence[int]) -> None:
        """`vocabulary`: tokens as the tokenizer writes them, and their ids; `added`: ids of plain-text tokens."""
        decode = {character: byte for byte, character in _byte_characters().items()}
        self._bytes: dict[int, bytes] = {}
        for token, token_id in vocabulary.items():
            if token_id not in added:
                self._bytes[token_id] = bytes(decode[character] for character in token if character in decode)
        self._bytes |= {token_id: content.encode() for token_id, content in added.items()}
        self._text = dict(added)
        self._special = frozenset(special)
        self._told_before: dict[int, tuple[str, tuple[int, ...]]] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to the text: nothing for a special or unknown token."""
        return b"" if token_id in self._special else self._bytes.get(token_id, b"")

    def name_of(self, token_id: int) -> str:
        """The token for a person: its text, with U+FFFD for partial characters; special tokens by name."""
        if token_id in self._special:
            return self._text.get(token_id, "")
        return self.bytes_of(token_id).decode(errors="replace")

    def told(self, token_id: int, logprobs: Logprobs) -> SampledLogprob:
        """A token's log-probabilities, with what the tokens stand for."""
        likeliest = (self._told(other, logprob) for other, logprob in logprobs.top)
        return SampledLogprob(self._told(token_id, logprobs.chosen), tuple(likeliest))

    def _told(self, token_id: int, logprob: float) -> TokenLogprob:
        told = self._told_before.get(token_id)
        if told is None:
            told = self._told_before[token_id] = self.name_of(token_id), tuple(self.bytes_of(token_id))
        return TokenLogprob(token_id, *told, logprob)


class TextStream:
    """The text of one sequence. `push` and `finish` return the piece that is decided by then."""

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str]) -> None:
        self.stopped = False  # a stop string was met; the text ends before it
        self._token_bytes = token_bytes
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token_id: int) -> str:
        """Add a token. After a stop string was met nothing follows."""
        if self.stopped:
            return ""
        return self._decide(self._held + self._decoder.decode(self._token_bytes.bytes_of(token_id)))

    def finish(self) -> str:
        """The end: what was held back, unless a stop string was met. An unfinished character becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._decide(self._held + self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _decide(self, text: str) -> str:
        if not self._stop:
            return text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        hold = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level vocabularies (Radford et al. 2019, GPT-2).

    Printable Latin-1 bytes stand for themselves; the others take the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return {byte: shifted.get(byte, chr(byte)) for byte in range(256)}
