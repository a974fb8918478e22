"""Text and chat messages → token ids, the way the base's own tokenizer reads them.

Promises: ordinary texts and messages give exactly the ids of the tokenizer and its chat template. The
template's special tokens are real ones, while what looks like one inside a user's text is encoded as plain
text, so that no text can end its own turn. Long texts don't hold the GIL, so they can be encoded in another
thread while the engine's goes on. Leaves to others: how long a prompt may be, and HTTP.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adapters.errors import InvalidInput

_PRIVATE_USE = range(0x100000, 0x10FFFE)  # characters that mean nothing: Unicode's plane 16


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


class PromptEncoder:
    """Encodes prompts for one base. Safe to call from several threads at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise InvalidInput.of("model", "its tokenizer has no fast version (tokenizer.json)")
        self._tokenizer = tokenizer
        self._specials = {
            token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        # transformers switches a flag of its one Tokenizer for every call, which threads can't share: each
        # of ours keeps its flag.
        source = tokenizer.backend_tokenizer.to_str()
        self._marked = _fixed_copy(source, specials_are_text=False)
        self._plain = _fixed_copy(source, specials_are_text=True)

    def prompt(self, text: str) -> Sequence[int]:
        """`text` as it is, with whatever the tokenizer puts before every text."""
        return _encode(self._plain, text, add_special_tokens=True)

    def continuation(self, text: str) -> Sequence[int]:
        """`text` as it is, to be joined to what was encoded before it."""
        return _encode(self._plain, text, add_special_tokens=False)

    def messages(self, messages: Sequence[ChatMessage]) -> Sequence[int]:
        """The conversation through the base's chat template, up to where the assistant's next turn begins.

        Raises InvalidInput on `messages` where the base has no template, or the template refuses them.
        """
        if not any(self._special.search(message.content) for message in messages):
            return _encode(self._marked, self._render(messages), add_special_tokens=False)
        return self._messages_with_lookalikes(messages)

    def _messages_with_lookalikes(self, messages: Sequence[ChatMessage]) -> Sequence[int]:
        """Hide the look-alikes from the template, cut its output at the real ones, then put the text back.

        A tokenizer also cuts a text at its special tokens first and encodes what is between them apart, so
        this differs from encoding it whole only in what counts as special.
        """
        guard = _unused_character(messages)
        hidden: list[str] = []

        def hide(match: re.Match[str]) -> str:
            hidden.append(match.group())
            return f"{guard}{len(hidden) - 1}{guard}"

        rendered = self._render([ChatMessage(m.role, self._special.sub(hide, m.content)) for m in messages])
        placeholder = re.compile(f"{guard}([0-9]+){guard}")

        ids: list[int] = []
        start = 0
        for match in self._special.finditer(rendered):
            between = placeholder.sub(lambda found: hidden[int(found.group(1))], rendered[start : match.start()])
            ids += _encode(self._plain, between, add_special_tokens=False)
            ids.append(self._specials[match.group()])
            start = match.end()
        rest = placeholder.sub(lambda found: hidden[int(found.group(1))], rendered[start:])
        ids += _encode(self._plain, rest, add_special_tokens=False)
        return ids

    def _render(self, messages: Sequence[ChatMessage]) -> str:
        if not self._tokenizer.chat_template:
            raise InvalidInput.of("messages", "this base has no chat template; send a prompt")
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            rendered = self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
        except TemplateError:  # its text may quote the messages
            raise InvalidInput.of("messages", "the base's chat template can't take these turns") from None
        return str(rendered)


def _fixed_copy(source: str, specials_are_text: bool) -> Tokenizer:
    copy = Tokenizer.from_str(source)
    copy.encode_special_tokens = specials_are_text
    copy.no_truncation()
    copy.no_padding()
    return copy


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> Sequence[int]:
    # encode() holds the GIL for as long as it runs (seconds for a megabyte); the batched form lets it go
    encoding = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
    ids: list[int] = encoding.ids
    return ids


def _unused_character(messages: Sequence[ChatMessage]) -> str:
    used = set().union(*(message.content for message in messages))
    return next(character for code in _PRIVATE_USE if (character := chr(code)) not in used)
