"""One row of training data, in its three shapes, and the canonical JSON that it is hashed by.

    {"prompt": "…", "completion": "…"}      trained on the completion
    {"messages": [{"role", "content"}, …]}  trained on what the assistant says, but for turns of "weight" 0
    {"text": "…"}                           trained on all of it

A turn's content may be a list of OpenAI's parts of text, which are joined, and its role `developer`: `system`.
`parse_row` takes what a JSON parser made and leaves nothing of it unchecked: every fault names its field, and no
message quotes a row's text. Tokens are `encoding.py`'s part, files `row_files.py`'s.

Many rows in memory, each as its canonical JSON.

As texts they would take up to four times as much: Python keeps a text with one character beyond Unicode's first
65,536 in four bytes a character. Splitting and hashing rows needs no parsing, so it keeps the interpreter from
other threads for a tenth of the time.

Fields of rows that are not trained on: passed over, and counted, so that a warning can tell of them.

Which rows are held out for validation: by content alone, so that the same rows always give the same split.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import compress, islice
from typing import Literal, Self, overload

from adapters.errors import FieldError, InvalidInput
from adapters.names import near
from server.model.text.chat import DEVELOPER, ChatMessage, joined_parts, meant_role
from server.system.messages import plural

ROLES = ("system", "user", "assistant")
MAX_TURNS = 1024
MAX_FAULTS = 8
"""Faults that are named of one row."""
SHAPES = "a row has prompt and completion, or messages, or text"
FIELDS = (("prompt", "completion"), ("messages",), ("text",))
"""Of each shape. A row has those of one."""
_KNOWN = tuple(name for shape in FIELDS for name in shape)
_COMPARED = 64


@dataclass(frozen=True)
class CompletionRow:
    """A prompt and what should follow it. Neither is empty."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class MessagesRow:
    """A conversation that the assistant ends; none of the assistant's turns is empty.

    `untrained` are the places of those of the assistant's turns that are only read, as OpenAI's fine-tuning has it
    by `weight`; never all of them.
    """

    messages: tuple[ChatMessage, ...]
    untrained: frozenset[int] = frozenset()

    @property
    def assistant(self) -> list[int]:
        """The places of the assistant's turns."""
        return [place for place, turn in enumerate(self.messages) if turn.role == "assistant"]


@dataclass(frozen=True)
class TextRow:
    """A text that isn't empty."""

    text: str


Row = CompletionRow | MessagesRow | TextRow
Kind = Literal["completion", "messages", "text"]


class IgnoredFields:
    """How many rows had each field. Names beyond the first few are counted together."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._num_others = 0

    def add(self, name: str) -> None:
        """Count one row's field."""
        if name in self._rows or len(self._rows) < MAX_NAMED:
            self._rows[name] += 1
        else:
            self._num_others += 1

    def warnings(self) -> list[str]:
        """One line, or none."""
        told = [f"{shown(name)} in {plural(number, 'row')}" for name, number in self._rows.items()]
        if self._num_others:
            told.append(f"{self._num_others} times others")
        return [f"fields that are not trained on were ignored: {', '.join(told)}"] if told else []


def kind_of(row: Row) -> Kind:
    """Which of the three shapes it has."""
    if isinstance(row, CompletionRow):
        return "completion"
    return "messages" if isinstance(row, MessagesRow) else "text"


def parse_row(value: object, ignored: IgnoredFields | None = None) -> Row:
    """A row out of parsed JSON. Raises InvalidInput with up to `MAX_FAULTS` faults; each `loc` ends in a field.

    Fields of no shape are passed over, and counted in `ignored`: data sets have ids and labels beside what is
    trained on. Null in fields of another shape, and of turns, counts for nothing: tables have it there.
    """
    if not isinstance(value, Mapping):
        what = "an object, not a list" if isinstance(value, list) else "an object"
        raise InvalidInput.of("row", f"must be {what}: {SHAPES}")
    given = {name for name in value if value[name] is not None}
    shapes = (shape for named in (given, value.keys()) for shape in FIELDS if not named.isdisjoint(shape))
    names = next(shapes, None)
    strange = [name for name in value if isinstance(name, str) and name not in _KNOWN]
    if names is None:
        raise InvalidInput([_nothing_known(strange)])
    faults = [
        FieldError((name,), f"doesn't go with {' and '.join(names)}: {SHAPES}")
        for name in value
        if name in given and name in _KNOWN and name not in names
    ]
    faults += [
        FieldError((name,), f"is missing{_hint(name, strange) or _instead(strange)}")
        for name in names
        if name not in value
    ]
    if faults:
        raise InvalidInput(faults[:MAX_FAULTS])
    if ignored is not None:
        for name in strange:
            if name in given:
                ignored.add(name)
    if "messages" in names:
        return _messages(value["messages"])
    faults = [FieldError((name,), fault) for name in names if (fault := _field_fault(value[name]))]
    if faults:
        raise InvalidInput(faults)
    return TextRow(value["text"]) if "text" in names else CompletionRow(value["prompt"], value["completion"])


def misspelt(strange: Sequence[str], name: str) -> str | None:
    """Which of the strange names was meant to be `name`, if any was."""
    return near(name, [other for other in strange[:_COMPARED] if len(other) <= MAX_NAME])


def canonical_json(row: Row) -> bytes:
    """The row as JSON in one way only (RFC 8785): keys sorted, no spaces, UTF-8, nothing escaped needlessly."""
    if isinstance(row, CompletionRow):
        document: dict[str, object] = {"prompt": row.prompt, "completion": row.completion}
    elif isinstance(row, MessagesRow):
        document = {"messages": [_turn(turn, place in row.untrained) for place, turn in enumerate(row.messages)]}
    else:
        document = {"text": row.text}
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _nothing_known(strange: Sequence[str]) -> FieldError:
    """What is wrong with a row that has no field of any shape."""
    name = next((name for name in _KNOWN if misspelt(strange, name)), None)
    said = _hint(name, strange) if name else f": {SHAPES}{_instead(strange)}"
    return FieldError((name or _KNOWN[0],), f"is missing{said}")


def _hint(name: str, strange: Sequence[str]) -> str:
    meant = misspelt(strange, name)
    return "" if meant is None else f", and {shown(meant)} is no field: did you mean {name}?"


def _instead(strange: Sequence[str]) -> str:
    """The first fields of no shape that a row has, as other trainers' rows do."""
    return f"; this one has {', '.join(map(shown, strange[:MAX_NAMED]))}" if strange else ""


def _turn(turn: ChatMessage, is_untrained: bool) -> dict[str, object]:
    """A weight of 1 is what a turn has without: rows that mean the same are the same."""
    return {"role": turn.role, "content": turn.content} | ({"weight": 0} if is_untrained else {})


def _messages(value: object) -> MessagesRow:
    if not isinstance(value, list) or not value:
        raise InvalidInput.of("messages", "must be a list of turns")
    if len(value) > MAX_TURNS:
        raise InvalidInput.of("messages", f"has {len(value)} turns, more than {MAX_TURNS}")
    faults: list[FieldError] = []
    turns: list[ChatMessage] = []
    for index, turn in enumerate(value):
        found = _turn_faults(turn)
        faults += [FieldError(("messages", index, *fault.loc), fault.message) for fault in found]
        if len(faults) >= MAX_FAULTS:
            break
        if not found:
            turns.append(ChatMessage(meant_role(turn["role"]), str(joined_parts(turn["content"]))))
    if not faults and turns[-1].role != "assistant":
        faults.append(FieldError(("messages",), "must end with a turn of the assistant, to be trained on"))
    if faults:
        raise InvalidInput(faults[:MAX_FAULTS])
    row = MessagesRow(
        tuple(turns), frozenset(place for place, turn in enumerate(value) if turn.get("weight") == 0)
    )
    if len(row.untrained) == len(row.assistant):
        raise InvalidInput.of("messages", "leaves nothing to train on: each turn of the assistant has weight 0")
    return row


def _turn_faults(turn: object) -> list[FieldError]:
    if not isinstance(turn, Mapping):
        return [FieldError(("role",), "is missing: a turn is an object with role and content")]
    turn = {name: said for name, said in turn.items() if said is not None or name in ("role", "content")}
    known = "is no field of a turn: a turn has role and content, and the assistant's may have weight"
    faults = _unknown(turn, ("role", "content", "weight"), known)
    role = turn.get("role")
    if role not in (*ROLES, DEVELOPER):
        faults.append(FieldError(("role",), f"must be {', '.join(ROLES[:-1])} or {ROLES[-1]}"))
    fault = _content_fault(turn.get("content"), may_be_empty=role != "assistant")
    if fault:
        faults.append(FieldError(("content",), fault))
    if "weight" in turn:
        weight = turn["weight"]
        if role != "assistant":
            faults.append(FieldError(("weight",), "goes with turns of the assistant: no other is trained on"))
        elif isinstance(weight, bool) or weight not in (0, 1):
            faults.append(FieldError(("weight",), "must be 1, or 0 where the turn is not trained on"))
    return faults


def _unknown(value: Mapping[object, object], known: tuple[str, ...], message: str) -> list[FieldError]:
    names = [str(name) for name in value if name not in known][:MAX_FAULTS]
    return [FieldError((shown(name),), message) for name in names]


def _field_fault(value: object) -> str | None:
    """What is wrong with a field that is a text, if anything is. Other trainers have conversations in it, too."""
    return "must be a text: turns go into messages" if isinstance(value, list) else _text_fault(value)


def _content_fault(content: object, *, may_be_empty: bool) -> str | None:
    """What is wrong with a turn's text or parts of text, if anything is."""
    try:
        return _text_fault(joined_parts(content), may_be_empty)
    except ValueError as error:
        return str(error)


def _text_fault(value: object, may_be_empty: bool = False) -> str | None:
    """What is wrong with a text, if anything is."""
    if not isinstance(value, str):
        return "must be a text"
    if not value and not may_be_empty:
        return "must not be empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "has half of a surrogate pair, which is no character"
    return None


class CanonicalRows(Sequence[Row]):
    """Rows that don't change; each is parsed when it is asked for."""

    def __init__(self, lines: Iterable[bytes] = ()) -> None:
        """`lines` are what `canonical_json` made."""
        self._lines: Sequence[bytes] = list(lines)

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Self:
        """Keep these rows."""
        return cls(map(canonical_json, rows))

    def chosen(self, is_chosen: Iterable[bool]) -> Self:
        """Return those with a true flag, in their order; they share their bytes with these."""
        return type(self)(compress(self._lines, is_chosen))

    def digests(self) -> list[bytes]:
        """Return each row's SHA-256, which is equal for equal rows alone."""
        return [hashlib.sha256(line).digest() for line in self._lines]

    def digest(self) -> str:
        """Return the SHA-256, in hexadecimal, of all lines in their order, each with a line feed."""
        digest = hashlib.sha256()
        for line in self._lines:
            digest.update(line + b"\n")
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "CanonicalRows": ...
    def __getitem__(self, index: int | slice) -> "Row | CanonicalRows":
        if isinstance(index, slice):
            return CanonicalRows(self._lines[index])
        return _parsed(self._lines[index])

    def __iter__(self) -> Iterator[Row]:
        return map(_parsed, self._lines)


def _parsed(line: bytes) -> Row:
    return parse_row(json.loads(line))


MAX_NAMED = 8
MAX_NAME = 64
"""Characters of a name that are given back: it is the client's own."""


def shown(name: str) -> str:
    """A field's name as it can be put into an answer; half a surrogate pair can't, and a column may have none."""
    return name[:MAX_NAME].encode("utf-8", "backslashreplace").decode() or "(no name)"


DEFAULT_SHARE = 0.1
MIN_ROWS = 20
"""Rows from which on `DEFAULT_SHARE` is held out where the request doesn't say."""
_RUN = 4096


def default_share(num_rows: int) -> float:
    """What is held out where the request doesn't say."""
    return DEFAULT_SHARE if num_rows >= MIN_ROWS else 0.0


def hold_out(rows: CanonicalRows, share: float) -> tuple[CanonicalRows, CanonicalRows]:
    """(train, validation), both in the order given, with no row in both.

    Held out are the max(1, round(share · n)) rows with the smallest SHA-256 of their canonical JSON, and all
    duplicates of these, so that it may be a few more; a share of 0 holds out none. Raises InvalidInput on
    `validation` where that leaves no row to train on.
    """
    if not 0 <= share < 1 or not math.isfinite(share):
        raise InvalidInput.of("validation", "a share is at least 0 and below 1")
    if share == 0:
        return rows, CanonicalRows()
    digests = rows.digests()
    num_held_out = max(1, round(share * len(rows)))
    # of equal rows, all or none: whatever is as small as the last one counted
    last = nth_smallest(digests, num_held_out)
    train = rows.chosen(digest > last for digest in digests)
    if not train:
        raise InvalidInput.of("validation", "leaves no row to train on; send more rows, or a share of 0")
    return train, rows.chosen(digest <= last for digest in digests)


def nth_smallest(digests: Sequence[bytes], n: int) -> bytes:
    """The last of the `n` smallest, n at least 1; nothing where there are none."""
    # one call that sorted all of them would hold every other thread up for as long as it takes
    runs = [sorted(digests[start : start + _RUN]) for start in range(0, len(digests), _RUN)]
    return next(islice(merge(*runs), n - 1, None), b"")


def overlap(train: CanonicalRows, validation: CanonicalRows) -> int:
    """How many rows of `validation` are in `train` too."""
    known = set(train.digests())
    return sum(digest in known for digest in validation.digests())
