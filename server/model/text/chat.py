"""Encodes texts and chat messages as token ids.

Ordinary texts and messages get exactly the ids that the base's tokenizer and chat template give. If the template
writes a special token, it is encoded as one. If a message has text that looks like a special token, it is encoded
as plain text, so no message can end its own turn. Encoding releases the GIL, so other threads, such as the
engine's, keep running.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Literal

from tokenizers import Tokenizer
from tokenizers.models import BPE

from adapters.errors import InvalidInput
from server.model.text.template import TemplateError
from server.model.text.tokenizer import BaseTokenizer

MAX_TEXT_PARTS = 1024

_PRIVATE_USE = range(0x100000, 0x10FFFE)  # Unicode's plane 16: characters without a meaning
_UNASSIGNED = range(0x40000, 0xE0000)  # planes 4 to 13; a text that uses all of these has megabytes


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


DEVELOPER = "developer"
"""OpenAI's newer name of the role `system`."""


def meant_role(role: str) -> str:
    """Return the name that chat templates use for a role."""
    return "system" if role == DEVELOPER else role


def joined_parts(content: object) -> object:
    """Join OpenAI's list of text parts into one text. Return other content unchanged.

    Raise ValueError if the list has no part or more than `MAX_TEXT_PARTS`, or if a part isn't text.
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
    """Messages in which placeholders replace text that looks like a special token.

    So every special token in a rendering of these messages was written by the template.
    """

    def __init__(self, messages: Sequence[ChatMessage], special: re.Pattern[str]) -> None:
        """Replace all matches of `special` in the messages with placeholders."""
        self._hidden: list[str] = []
        self._guard, self._mark = _unused_characters(messages, 2)
        self._placeholder = re.compile(f"{self._guard}([0-9]+){self._guard}")
        self.messages = [ChatMessage(turn.role, special.sub(self._hide, turn.content)) for turn in messages]

    @property
    def hides_nothing(self) -> bool:
        return not self._hidden

    def restore(self, text: str) -> str:
        """Return the text with each placeholder replaced by the original text."""
        return self._placeholder.sub(lambda found: self._hidden[int(found.group(1))], text)

    def restore_at(self, text: str, points: Iterable[int]) -> tuple[str, dict[int, int]]:
        """Return what `restore` returns, and a map from each position of `points` in `text` to its new position.

        No point may be inside a placeholder.
        """
        pieces: list[str] = []
        moved = {0: 0}
        length = 0
        for start, end in pairwise(sorted({0, len(text), *points})):
            pieces.append(self.restore(text[start:end]))
            length += len(pieces[-1])
            moved[end] = length
        return "".join(pieces), moved

    def outline(self) -> list[ChatMessage]:
        """Return the messages with a marker instead of each assistant text, to be rendered for `find_turns`."""
        return [
            ChatMessage(turn.role, f"{self._mark}{index}{self._mark}") if turn.role == "assistant" else turn
            for index, turn in enumerate(self.messages)
        ]

    def find_turns(self, rendered: str, outline: str) -> list[tuple[int, int]] | None:
        """Return each assistant text's span in `rendered`, given the rendering of `outline()`.

        The text between the spans must equal the outline's text between markers. Each span must be the message's
        text, possibly trimmed. Return None if the template changes a text in any other way.
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
    """Return the forms in which a template may render a text, longest first: unchanged, or with white space or
    line breaks trimmed."""
    starts = {text, text.lstrip("\n"), text.lstrip()}
    return sorted({form for start in starts for form in (start, start.rstrip("\n"), start.rstrip())}, key=len)[
        ::-1
    ]


def _unused_characters(messages: Sequence[ChatMessage], count: int) -> list[str]:
    used = set().union(*(message.content for message in messages))
    unused = (character for code in chain(_PRIVATE_USE, _UNASSIGNED) if (character := chr(code)) not in used)
    return [next(unused) for _ in range(count)]


Span = tuple[int, int]
"""Characters [start, stop) of a text."""

ConversationForm = Literal["next turn", "open", "whole"]
"""The end of a rendered conversation: the start of the assistant's next turn, the last text of an assistant's turn
that is still open, or the end of the last turn."""


class PromptEncoder:
    """Encodes prompts for one base. Thread-safe."""

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._template = tokenizer.chat_template
        self.num_tokens = len(tokenizer)
        self.max_token_bytes = _longest(tokenizer)
        self._specials = {
            token.content: number for number, token in tokenizer.added_tokens.items() if token.special
        }
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._next_special = re.compile(rf"\s*+({self._special.pattern})")
        # `encode_special_tokens` is a flag of a Tokenizer, and threads need both values. So there are two copies.
        self._marked = _fixed_copy(tokenizer.backend, specials_are_text=False)
        self._plain = _fixed_copy(tokenizer.backend, specials_are_text=True)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def prompt(self, text: str) -> Sequence[int]:
        """Return the ids of `text`, with the tokens that the tokenizer adds to every text."""
        return _encode(self._plain, text, add_special_tokens=True)

    def continuation(self, text: str) -> Sequence[int]:
        """Return the ids of `text` alone, to be appended to other ids."""
        return _encode(self._plain, text, add_special_tokens=False)

    def spelled(self, text: str, token_ids: Collection[int]) -> str | None:
        """Return the name of a special token in `token_ids` that occurs in the text, or None if none occurs.

        Such text is encoded as plain text.
        """
        found = (name for name, number in self._specials.items() if number in token_ids and name in text)
        return next(found, None)

    def rendered(self, text: str) -> Sequence[int]:
        """Return the ids of a text that a chat template has rendered: special tokens' names are special tokens."""
        return _encode(self._marked, text, add_special_tokens=False)

    def messages(self, messages: Sequence[ChatMessage], form: ConversationForm = "next turn") -> Sequence[int]:
        """Return the ids of a conversation in the base's chat template, which ends as `form` says.

        Raise InvalidInput on `messages` if the base has no template, or if the template rejects them, and on
        `continue_final_message` if the last turn can't be left open.
        """
        if form == "open" and messages[-1].role != "assistant":
            raise InvalidInput.of("continue_final_message", "needs a last message of the role assistant")
        if form != "open" and not any(self._special.search(message.content) for message in messages):
            return self.rendered(self._render(messages, is_whole=form == "whole"))
        disguise = Disguise(messages, self._special)
        rendered = self._render(disguise.messages, is_whole=form != "next turn")
        if form == "open":
            turns = self._find_turns(disguise, rendered, "continue_final_message", "send a prompt")
            rendered = rendered[: turns[-1][1]]
        ids: list[int] = []
        for text, is_special in self._cut(rendered):
            if is_special:
                ids.append(self._specials[text])
            else:
                ids += _encode(self._plain, disguise.restore(text), add_special_tokens=False)
        return ids

    def conversation(
        self, messages: Sequence[ChatMessage], end_token_ids: Collection[int]
    ) -> tuple[list[int], list[range]]:
        """Return the ids of a whole conversation, and the range of tokens of each of the assistant's turns.

        A range covers the turn's text, and the template's end token after that text if it is one of
        `end_token_ids`. The turn's header isn't covered. The ids are those of the rendered template, except that
        no token crosses a turn's border: the texts before and after a border are encoded separately, as they are
        when the assistant's turn is generated. Raise InvalidInput like `messages`, or if the template changes a
        turn in any way except trimming.
        """
        disguise = Disguise(messages, self._special)
        rendered = self._render(disguise.messages, is_whole=True)
        turns = self._find_turns(disguise, rendered, "messages", "send prompt and completion")
        turns = [(start, self._after_end_token(rendered, end, end_token_ids)) for start, end in turns]
        specials = [match.span() for match in self._special.finditer(rendered)]
        points = [point for span in (*turns, *specials) for point in span]
        text, moved = disguise.restore_at(rendered, points)
        borders = sorted({moved[point] for turn in turns for point in turn})
        if disguise.hides_nothing:
            ids, starts = _encode_apart(self._marked, text, borders)
        else:
            ids, starts = self._encode_lookalikes(
                text, [(moved[start], moved[end]) for start, end in specials], borders
            )
        ranges = [range(*(bisect_left(starts, moved[point]) for point in turn)) for turn in turns]
        return ids, ranges

    def _find_turns(self, disguise: Disguise, rendered: str, field: str, advice: str) -> list[Span]:
        """Return the spans of the assistant's texts in a rendering of the whole conversation.

        Raise InvalidInput on `field` if the template changes a text in any way except trimming.
        """
        turns = disguise.find_turns(rendered, self._render(disguise.outline(), is_whole=True))
        if turns is None:
            raise InvalidInput.of(field, f"the base's chat template rewrites the assistant's turns; {advice}")
        return turns

    def _encode_lookalikes(
        self, text: str, specials: Sequence[Span], borders: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Encode the spans `specials` as special tokens, and the texts between them as plain text.

        Return the ids and the position in the text where each token starts.
        """
        ids: list[int] = []
        starts: list[int] = []
        cuts = [0, *(point for span in specials for point in span), len(text)]
        for number, (first, last) in enumerate(pairwise(cuts)):
            if number % 2:
                found, where = [self._specials[text[first:last]]], [0]
            else:
                found, where = _encode_apart(self._plain, text[first:last], _inside(borders, first, last))
            ids += found
            starts += [first + start for start in where]
        return ids, starts

    def _after_end_token(self, rendered: str, position: int, end_token_ids: Collection[int]) -> int:
        """Return the position after the end token at `position`. White space may precede the end token.

        Return `position` if there is no such end token.
        """
        match = self._next_special.match(rendered, position)
        return match.end() if match and self._specials[match.group(1)] in end_token_ids else position

    def _cut(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """Yield a rendering's special tokens and the texts between them, as (text, whether it is a special token).

        A tokenizer also splits a text at special tokens first, and encodes the pieces separately. So encoding
        these pieces gives the ids of the whole text, except for text that only looks like a special token.
        """
        start = 0
        for match in self._special.finditer(rendered):
            yield rendered[start : match.start()], False
            yield match.group(), True
            start = match.end()
        yield rendered[start:], False

    def _render(self, messages: Sequence[ChatMessage], is_whole: bool = False) -> str:
        """Render up to the start of the assistant's next turn, or a whole conversation to the end of its last
        turn."""
        if self._template is None:
            raise InvalidInput.of("messages", "this base has no chat template; send a prompt")
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(conversation, add_generation_prompt=not is_whole)
        except TemplateError:  # not shown, since its text may quote the messages
            raise InvalidInput.of("messages", "the base's chat template can't take these turns") from None


def _longest(tokenizer: BaseTokenizer) -> int | None:
    """Return the number of bytes of the longest token, or None if the tokenizer has a normalizer, which may
    shorten texts before they are split."""
    if tokenizer.backend.normalizer is not None:
        return None
    added = {token.content for token in tokenizer.added_tokens.values()}
    # Each character of the model's own tokens represents one byte.
    return max(len(text.encode()) if text in added else len(text) for text in tokenizer.vocabulary)


def _fixed_copy(tokenizer: Tokenizer, specials_are_text: bool) -> Tokenizer:
    """Return a copy without truncation and padding. Its offsets count white space as part of a token.

    The copy shares the tokenizer's model, which is read-only and takes nearly all of the memory.
    """
    steps = Tokenizer(BPE())  # everything but the model and added tokens
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (step := getattr(tokenizer, name)) is not None:
            setattr(steps, name, step)
    document = json.loads(steps.to_str())
    last = document["post_processor"] or {}
    for step in (last, *last.get("processors", ())):
        if "trim_offsets" in step:
            step["trim_offsets"] = False
    copy = Tokenizer.from_str(json.dumps(document))
    copy.model = tokenizer.model
    copy.add_tokens([token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())])
    copy.encode_special_tokens = specials_are_text
    return copy


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> Sequence[int]:
    # encode() holds the GIL (seconds for a megabyte); the batched form releases it.
    encoding = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
    ids: list[int] = encoding.ids
    return ids


def _encode_apart(tokenizer: Tokenizer, text: str, borders: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the ids, and the position of each token's start. No token crosses one of the ascending `borders`."""
    encoding = tokenizer.encode_batch([text], add_special_tokens=False)[0]
    offsets = encoding.offsets  # computed at each access
    starts = [start for start, _ in offsets]
    crossed = [border for border in borders if _crosses(offsets, border)]
    if not crossed:
        return encoding.ids, starts
    ids: list[int] = []
    starts = []
    for first, last in pairwise([0, *crossed, len(text)]):
        found, where = _encode_apart(tokenizer, text[first:last], _inside(borders, first, last))
        ids += found
        starts += [first + start for start in where]
    return ids, starts


def _inside(borders: Sequence[int], first: int, last: int) -> list[int]:
    """Return the ascending `borders` between `first` and `last`, relative to `first`."""
    return [border - first for border in borders[bisect_right(borders, first) : bisect_left(borders, last)]]


def _crosses(offsets: Sequence[Span], border: int) -> bool:
    """Return whether a token crosses the border. `offsets` are the tokens' spans, in ascending order."""
    place = bisect_left(offsets, (border, 0)) - 1  # the last token that starts before the border
    return place >= 0 and offsets[place][1] > border
