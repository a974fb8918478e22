"""Where texts lie in what a chat template made of them, and what in them only looks like a special token.

Text alone: rendering and tokens are `server.model.text.chat`'s part.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

MAX_TEXT_PARTS = 1024

_PRIVATE_USE = range(0x100000, 0x10FFFE)  # characters that mean nothing: Unicode's plane 16
_UNASSIGNED = range(0x40000, 0xE0000)  # planes 4 to 13: whoever has all of those too has sent megabytes


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


DEVELOPER = "developer"
"""What OpenAI calls `system` by now."""


def meant_role(role: str) -> str:
    """A role as a chat template has it."""
    return "system" if role == DEVELOPER else role


def joined_parts(content: object) -> object:
    """OpenAI's parts of text as the one text that they are. What is no list is given back.

    Raises ValueError where there are none, or more than `MAX_TEXT_PARTS`, or a part is something else than text.
    """
    if not isinstance(content, list):
        return content
    if not 1 <= len(content) <= MAX_TEXT_PARTS:
        raise ValueError(f"has 1 to {MAX_TEXT_PARTS} parts")
    texts = []
    for number, part in enumerate(content):
        given = {name for name, value in part.items() if value is not None} if isinstance(part, dict) else set()
        text = part["text"] if given == {"type", "text"} and part["type"] == "text" else None
        if not isinstance(text, str):
            raise ValueError(f'part {number}: only {{"type": "text", "text": "…"}} is supported')
        texts.append(text)
    return "".join(texts)


class Disguise:
    """Messages whose look-alikes of special tokens are hidden, so that those in a rendering are the template's."""

    def __init__(self, messages: Sequence[ChatMessage], special: re.Pattern[str]) -> None:
        """`special` matches what must be hidden."""
        self._hidden: list[str] = []
        self._guard, self._mark = _unused_characters(messages, 2)
        self._placeholder = re.compile(f"{self._guard}([0-9]+){self._guard}")
        self.messages = [ChatMessage(turn.role, special.sub(self._hide, turn.content)) for turn in messages]

    @property
    def hides_nothing(self) -> bool:
        return not self._hidden

    def restore(self, text: str) -> str:
        """Put what was hidden back."""
        return self._placeholder.sub(lambda found: self._hidden[int(found.group(1))], text)

    def restore_at(self, text: str, points: Iterable[int]) -> tuple[str, dict[int, int]]:
        """The text restored, and where each of `points`, none of which lies in a placeholder, is in it."""
        pieces: list[str] = []
        moved = {0: 0}
        length = 0
        for start, end in pairwise(sorted({0, len(text), *points})):
            pieces.append(self.restore(text[start:end]))
            length += len(pieces[-1])
            moved[end] = length
        return "".join(pieces), moved

    def outline(self) -> list[ChatMessage]:
        """The messages with a mark in place of each of the assistant's texts, for `find_turns`."""
        return [
            ChatMessage(turn.role, f"{self._mark}{index}{self._mark}") if turn.role == "assistant" else turn
            for index, turn in enumerate(self.messages)
        ]

    def find_turns(self, rendered: str, outline: str) -> list[tuple[int, int]] | None:
        """Where each of the assistant's texts lies in `rendered`, given the rendering of `outline()` too.

        Exact, whatever the texts hold: all that is between them must be as in the outline, and they as they are or
        trimmed. None where a template does anything else to them.
        """
        contents = {index: turn.content for index, turn in enumerate(self.messages) if turn.role == "assistant"}
        before, *rest = re.split(f"{self._mark}([0-9]+){self._mark}", outline)
        if [int(index) for index in rest[::2]] != list(contents) or not rendered.startswith(before):
            return None
        turns: list[tuple[int, int]] = []
        position = len(before)
        for content, after in zip(contents.values(), rest[1::2], strict=True):
            forms = (form for form in _trimmed(content) if rendered.startswith(form + after, position))
            written = next(forms, None)
            if written is None:
                return None
            turns.append((position, position + len(written)))
            position += len(written) + len(after)
        return turns if position == len(rendered) else None

    def _hide(self, match: re.Match[str]) -> str:
        self._hidden.append(match.group())
        return f"{self._guard}{len(self._hidden) - 1}{self._guard}"


def _trimmed(text: str) -> list[str]:
    """The text as templates write it: as it is, or without white space or line breaks at an end; longest first."""
    starts = {text, text.lstrip("\n"), text.lstrip()}
    return sorted({form for start in starts for form in (start, start.rstrip("\n"), start.rstrip())}, key=len)[
        ::-1
    ]


def _unused_characters(messages: Sequence[ChatMessage], count: int) -> list[str]:
    used = set().union(*(message.content for message in messages))
    unused = (character for code in chain(_PRIVATE_USE, _UNASSIGNED) if (character := chr(code)) not in used)
    return [next(unused) for _ in range(count)]
