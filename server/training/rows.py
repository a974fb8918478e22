"""Rows of training data: their four kinds, canonical JSON, rows in memory, and the split for validation.

    {"prompt": "…", "completion": "…"}      trained on the completion
    {"messages": [{"role", "content"}, …]}  trained on the assistant's turns, except for turns with "weight" 0
    {"text": "…"}                           trained on all of it
    {"input", "question", "answer"}         a decision, trained on the answer

The first two kinds may have `schema`, a JSON Schema that answers are to satisfy; evaluations measure whether they
do, and it isn't trained on. A decision's `question` is a question's JSON, or the name of one of the job's
questions. It may be left out if the job has only one. A turn's content may be a list of OpenAI's text parts, which
are joined; the role `developer` is read as `system`. `formats.py` reads other trainers' rows as messages,
`encoding.py` turns rows into tokens, and `row_files.py` reads uploaded files.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Literal, Self, overload

from adapters.errors import FieldError, InvalidInput
from adapters.names import near
from server.decisions.parts import input_text
from server.decisions.questions import Question, parse_question
from server.model.text.chat import DEVELOPER, ChatMessage, joined_parts, meant_role
from server.system.messages import plural
from server.training import json_schema
from server.training.formats import MEANINGS, Conversation, RowFormat, read_conversation

ROLES = ("system", "user", "assistant")
MAX_TURNS = 1024
MAX_FAULTS = 8
"""The most errors of one row that are reported."""
SHAPES = "a row has prompt and completion, or messages, or text"
DECISION = ("input", "answer")
"""The required fields of a decision, which must have no field of another kind of row."""
FIELDS = (("prompt", "completion"), ("messages",), ("text",))
"""The fields of each kind of row. A row has the fields of exactly one kind."""
SCHEMA = "schema"
"""The field of a row's JSON Schema. If its value is no object, it is ignored as unknown fields are."""
_KNOWN = tuple(name for shape in FIELDS for name in shape)
_COMPARED = 64  # the most unknown names that are compared with known ones
MAX_NAMED = 8
"""The most names of unknown fields that a message lists."""
MAX_NAME = 64
"""The most characters of a client's field name that a message quotes."""
_ANSWERS = frozenset({"answer", "category", "class", "label", "labels", "output", "response", "target"})
"""Names of fields that may be meant as completions."""
DEFAULT_SHARE = 0.1
MIN_ROWS = 20
"""Of at least this many rows, `DEFAULT_SHARE` is held out for validation unless the request says otherwise."""


@dataclass(frozen=True)
class CompletionRow:
    """A prompt and its completion. Neither is empty. `schema` is as `json_schema.canonical` returns it."""

    prompt: str
    completion: str
    schema: str | None = None


@dataclass(frozen=True)
class MessagesRow:
    """A conversation that ends with a turn of the assistant. The assistant's turns aren't empty.

    `untrained` are the indices of the assistant's turns that aren't trained on: those with weight 0, as in
    OpenAI's fine-tuning. At least one turn is trained on. `schema` is as `json_schema.canonical` returns it.
    """

    messages: tuple[ChatMessage, ...]
    untrained: frozenset[int] = frozenset()
    schema: str | None = None

    @property
    def assistant(self) -> list[int]:
        """The indices of the assistant's turns."""
        return [place for place, turn in enumerate(self.messages) if turn.role == "assistant"]


@dataclass(frozen=True)
class TextRow:
    """A text, which isn't empty."""

    text: str


@dataclass(frozen=True)
class DecisionRow:
    """An input, a question or the name of one of the job's questions, and the right answer.

    The answer isn't checked here unless the row has the question itself.
    """

    input: str
    answer: str | bool
    question: Question | str | None = None


Row = CompletionRow | MessagesRow | TextRow | DecisionRow
Kind = Literal["completion", "messages", "text", "decision"]


class EmptyAnswer(InvalidInput):
    """Raised for a row in another trainer's format if its only fault is that the last answer is empty.

    Alpaca's own file has such rows. Readers of many rows drop them; `RowNotes` counts them.
    """


_FEW = 2  # up to this many rows may be intentional


class RowNotes:
    """Notes on rows as they are read: ignored fields, rows in another trainer's format, and dropped ones.

    Names of ignored fields beyond the first `MAX_NAMED` are counted together.
    """

    def __init__(self) -> None:
        self.mapping: RowFormat | None = None
        """The format of the first row in another trainer's format, or None if there is no such row."""
        self._formats: dict[RowFormat, None] = {}
        self._ignored: Counter[str] = Counter()
        self._num_others = 0
        self._num_dropped = 0
        self._num_completions = self._num_joined = 0
        self._answer: str | None = None

    def ignore(self, name: str, beside_text: bool = False) -> None:
        """Count an ignored field of one row. `beside_text` says whether the row has a field `text`."""
        if name in self._ignored or len(self._ignored) < MAX_NAMED:
            self._ignored[name] += 1
        else:
            self._num_others += 1
        if beside_text and name.lower() in _ANSWERS:
            self._answer = name

    def converted(self, row_format: RowFormat) -> None:
        """Note that a row in another trainer's format was read."""
        self.mapping = self.mapping or row_format
        self._formats[row_format] = None

    def dropped(self) -> None:
        """Count a row that is dropped since its last answer is empty."""
        self._num_dropped += 1

    def joined(self, row: CompletionRow) -> None:
        """Note a row of prompt and completion. Count it if the two meet within a word or a number."""
        self._num_completions += 1
        ends = row.prompt[-1], row.completion[0]
        # letters without case, such as CJK, don't count
        self._num_joined += all(end.isdecimal() or end.lower() != end.upper() for end in ends)

    def warnings(self) -> list[str]:
        """Return the warnings for the user, one line each."""
        found = [f"rows were read as {MEANINGS[row_format]}" for row_format in self._formats]
        if self._num_dropped:
            found.append(f"{plural(self._num_dropped, 'row')} dropped, since the last answer is empty")
        fields = [f"{shown(name)} in {plural(number, 'row')}" for name, number in self._ignored.items()]
        if self._num_others:
            fields.append(f"{self._num_others} times others")
        if fields:
            found.append(f"fields that are not trained on were ignored: {', '.join(fields)}")
        if self._num_joined > max(_FEW, self._num_completions // 2):
            rows = plural(self._num_joined, "row")
            found.append(f"prompt and completion meet within a word in {rows}: begin completions with a space")
        if self._answer:
            found.append(f"to learn {shown(self._answer)} from text, name these fields completion and prompt")
        return found


def kind_of(row: Row) -> Kind:
    """Return the row's kind."""
    if isinstance(row, CompletionRow):
        return "completion"
    if isinstance(row, DecisionRow):
        return "decision"
    return "messages" if isinstance(row, MessagesRow) else "text"


def question_of(row: Row) -> tuple[str | tuple[ChatMessage, ...], str] | None:
    """Return (prompt or earlier turns, last answer that is trained on), or None for a text or a decision."""
    if isinstance(row, CompletionRow):
        return row.prompt, row.completion
    if isinstance(row, MessagesRow) and (last := max(set(row.assistant) - row.untrained)):
        return row.messages[:last], row.messages[last].content
    return None


def parse_row(value: object, notes: RowNotes | None = None) -> Row:
    """Make a row from parsed JSON. Raise InvalidInput, with up to `MAX_FAULTS` errors, if the row is invalid.

    If the row can simply be dropped, the error is an EmptyAnswer, and the row is counted in `notes`. No message
    quotes a row's text. Unknown fields, such as ids and labels, are skipped and counted in `notes`. Rows from a
    table have null in fields that they don't use. So null is ignored in the fields of other kinds of rows, and in
    optional fields of turns.
    """
    if not isinstance(value, Mapping):
        what = "an object, not a list" if isinstance(value, list) else "an object"
        raise InvalidInput.of("row", f"must be {what}: {SHAPES}")
    given = {name for name in value if value[name] is not None}
    strange = [name for name in value if isinstance(name, str) and name not in _KNOWN]
    used = {SCHEMA} if isinstance(value.get(SCHEMA), Mapping) else set()
    if (conversation := read_conversation(value)) is not None:
        if notes is not None:
            notes.converted(conversation.format)
            for name in value:
                if name in given and name not in (*conversation.fields, *used):
                    notes.ignore(name)
        return replace(_converted(conversation, notes), schema=_schema(value))
    if given.issuperset(DECISION) and given.isdisjoint(_KNOWN):
        if notes is not None:
            for name in strange:
                if name in given and name not in (*DECISION, "question"):
                    notes.ignore(name)
        return _decision(value)
    shapes = (shape for named in (given, value.keys()) for shape in FIELDS if not named.isdisjoint(shape))
    names = next(shapes, None)
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
    if notes is not None:
        for name in strange:
            if name in given and ("text" in names or name not in used):
                notes.ignore(name, beside_text="text" in names)
    if "messages" in names:
        return replace(_messages(value["messages"]), schema=_schema(value))
    faults = [FieldError((name,), fault) for name in names if (fault := _field_fault(value[name]))]
    if faults:
        raise InvalidInput(faults)
    if "text" in names:
        return TextRow(value["text"])
    row = CompletionRow(value["prompt"], value["completion"], _schema(value))
    if notes is not None:
        notes.joined(row)
    return row


def canonical_json(row: Row) -> bytes:
    """Return the row's canonical JSON (RFC 8785): sorted keys, no spaces, UTF-8, nothing escaped needlessly.

    Unlike in RFC 8785, a schema's numbers are written as Python writes them.
    """
    if isinstance(row, CompletionRow):
        document: dict[str, object] = {"prompt": row.prompt, "completion": row.completion}
    elif isinstance(row, MessagesRow):
        document = {"messages": [_turn(turn, place in row.untrained) for place, turn in enumerate(row.messages)]}
    elif isinstance(row, DecisionRow):
        document = {"input": row.input, "answer": row.answer}
        if row.question is not None:
            document["question"] = row.question if isinstance(row.question, str) else row.question.document()
    else:
        document = {"text": row.text}
    line = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    if isinstance(row, CompletionRow | MessagesRow) and row.schema is not None:  # the last key
        return line[:-1] + f',"{SCHEMA}":{row.schema}}}'.encode()
    return line


def misspelt(strange: Sequence[str], name: str) -> str | None:
    """Return the unknown field in `strange` that probably is a misspelling of `name`, or None if none is."""
    return near(name, [other for other in strange[:_COMPARED] if len(other) <= MAX_NAME])


def shown(name: str) -> str:
    """Return a field's name so that messages can quote it: cut if long, encodable as UTF-8, and not empty."""
    return name[:MAX_NAME].encode("utf-8", "backslashreplace").decode() or "(no name)"


class CanonicalRows(Sequence[Row]):
    """Immutable rows, stored as canonical JSON and parsed on access.

    This saves memory: Python needs four bytes per character for a text with any character beyond U+FFFF. It also
    saves time: splitting and hashing need no parsing, so they hold the GIL a tenth as long.
    """

    def __init__(self, lines: Iterable[bytes] = ()) -> None:
        """Make rows of lines that `canonical_json` returned."""
        self._lines: Sequence[bytes] = list(lines)

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Self:
        """Convert rows to `CanonicalRows`."""
        return cls(map(canonical_json, rows))

    def chosen(self, is_chosen: Iterable[bool]) -> Self:
        """Return the rows whose flag in `is_chosen` is true, in order. The rows' bytes aren't copied."""
        return type(self)(compress(self._lines, is_chosen))

    def kinds(self) -> dict[str, int]:
        """Count the rows by kind, without parsing them."""
        # keys are sorted, so the first key of a line tells its kind
        firsts = Counter(line[2 : line.index(b'"', 2)].decode() for line in self._lines)
        return dict(sorted(("decision" if name == "answer" else name, num) for name, num in firsts.items()))

    def digests(self) -> list[bytes]:
        """Return each row's SHA-256."""
        return [hashlib.sha256(line).digest() for line in self._lines]

    def digest(self) -> str:
        """Return the SHA-256, in hexadecimal, of all rows' lines in order, each followed by a line feed."""
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


def default_share(num_rows: int) -> float:
    """Return the share of rows that is held out for validation by default."""
    return DEFAULT_SHARE if num_rows >= MIN_ROWS else 0.0


def hold_out(rows: CanonicalRows, share: float) -> tuple[CanonicalRows, CanonicalRows]:
    """Split rows into (train, validation), without changing their order. No row is in both parts.

    A row is held out if the SHA-256 of its canonical JSON, read as a number, is below share · 2²⁵⁶. So the same
    row is always on the same side, whatever other rows there are. There are two exceptions, so that no side is
    empty: the row with the smallest hash is held out, and the row with the largest hash is trained on. A share of
    0 holds out no rows. Raise InvalidInput, which names the field `validation`, if all rows are equal or the share
    is invalid.
    """
    if not 0 <= share < 1 or not math.isfinite(share):
        raise InvalidInput.of("validation", "a share is at least 0 and below 1")
    if share == 0:
        return rows, CanonicalRows()
    is_held_out = held_out_flags(rows.digests(), share)
    train = rows.chosen(not flag for flag in is_held_out)
    if not train:
        raise InvalidInput.of("validation", "leaves no row to train on: all rows are equal; give a share of 0")
    return train, rows.chosen(is_held_out)


def set_aside(rows: CanonicalRows, share: float, validation: float) -> tuple[CanonicalRows, CanonicalRows]:
    """Split rows into (the others, test rows), without changing their order. No row is in both parts.

    A row is a test row if its hash, as in `hold_out`, is at least (1 - share) · 2²⁵⁶. The row with the largest
    hash is always a test row. `validation` is the share that `hold_out` will hold out of the others: test rows
    have high hashes, so they aren't among those. A share of 0 sets no rows aside. Raise InvalidInput, which names
    the field `test`, if all rows are equal or the shares leave nothing to train on.
    """
    if share == 0:
        return rows, CanonicalRows()
    if share + validation >= 1:
        raise InvalidInput.of("test", "leaves no row to train on: test and validation must be below 1 together")
    digests = rows.digests()
    largest, start = max(digests), int((1 - share) * 2.0**256)  # 2²⁵⁶ for a share that rounds to nothing
    is_test = [digest == largest or int.from_bytes(digest, "big") >= start for digest in digests]
    others = rows.chosen(not flag for flag in is_test)
    if not others:
        raise InvalidInput.of("test", "leaves no row to train on: all rows are equal; give a share of 0")
    if validation and len(set(others.digests())) < 2:
        raise InvalidInput.of("test", "leaves no row to train on besides the held-out ones: give a share of 0")
    return others, rows.chosen(is_test)


def held_out_flags(digests: Sequence[bytes], share: float) -> list[bool]:
    """Return for each row's digest whether `hold_out` holds the row out. `share` is above 0 and below 1."""
    end = int(share * 2.0**256).to_bytes(32, "big")  # exact: a double times a power of two
    smallest, largest = min(digests, default=b""), max(digests, default=b"")
    return [digest == smallest or (digest < end and digest != largest) for digest in digests]


def overlap(rows: CanonicalRows, *others: CanonicalRows) -> int:
    """Return how many of the rows are also in one of the others."""
    known = {digest for one in others for digest in one.digests()}
    return sum(digest in known for digest in rows.digests())


def _nothing_known(strange: Sequence[str]) -> FieldError:
    """Return the error for a row that has no known field. `strange` are the row's fields."""
    name = next((name for name in _KNOWN if misspelt(strange, name)), None)
    said = _hint(name, strange) if name else f": {SHAPES}{_instead(strange)}"
    return FieldError((name or _KNOWN[0],), f"is missing{said}")


def _hint(name: str, strange: Sequence[str]) -> str:
    meant = misspelt(strange, name)
    return "" if meant is None else f", and {shown(meant)} is no field: did you mean {name}?"


def _instead(strange: Sequence[str]) -> str:
    """Return a hint that lists the row's unknown fields, or "" if there are none."""
    return f"; this one has {', '.join(map(shown, strange[:MAX_NAMED]))}" if strange else ""


def _converted(conversation: Conversation, notes: RowNotes | None) -> MessagesRow:
    turns = list(conversation.turns)
    try:
        return _messages(turns)
    except InvalidInput as error:
        faults = [conversation.located(fault) for fault in error.errors]
        if [fault.loc for fault in error.errors] == [("messages", len(turns) - 1, "content")]:
            last = turns[-1]
            if isinstance(last, Mapping) and last.get("role") == "assistant" and last.get("content") == "":
                if notes is not None:
                    notes.dropped()
                raise EmptyAnswer(faults) from None
        raise InvalidInput(faults) from None


def _decision(value: Mapping[str, object]) -> DecisionRow:
    question = value.get("question")
    if question is not None and not isinstance(question, str):
        question = parse_question(question)
    elif isinstance(question, str) and (fault := _text_fault(question)):
        raise InvalidInput.of("question", fault)
    answer = value["answer"]
    if not isinstance(answer, bool) and (fault := _text_fault(answer)):
        raise InvalidInput.of("answer", fault if isinstance(answer, str) else "must be a text, or true or false")
    assert isinstance(answer, str | bool)
    row = DecisionRow(input_text(value["input"]), answer, question)
    if isinstance(question, Question):
        question.index_of(answer)
    return row


def _schema(value: Mapping[str, object]) -> str | None:
    schema = value.get(SCHEMA)
    if not isinstance(schema, Mapping):
        return None
    try:
        return json_schema.canonical(schema)
    except json_schema.BadSchema as error:
        raise InvalidInput.of(SCHEMA, str(error)) from None


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
            faults.append(FieldError(("weight",), "must be 1, or 0 if the turn is not trained on"))
    return faults


def _unknown(value: Mapping[object, object], known: tuple[str, ...], message: str) -> list[FieldError]:
    names = [str(name) for name in value if name not in known][:MAX_FAULTS]
    return [FieldError((shown(name),), message) for name in names]


def _field_fault(value: object) -> str | None:
    """Return what is wrong with a text field, or None if nothing is.

    A list has its own message, since other trainers' rows may have a list of turns in the field.
    """
    if isinstance(value, list):
        return "must be a text: turns go into messages, or into both prompt and completion"
    return _text_fault(value)


def _content_fault(content: object, *, may_be_empty: bool) -> str | None:
    """Return what is wrong with a turn's text or text parts, or None if nothing is."""
    try:
        return _text_fault(joined_parts(content), may_be_empty)
    except ValueError as error:
        return str(error)


def _text_fault(value: object, may_be_empty: bool = False) -> str | None:
    """Return what is wrong with a text, or None if nothing is."""
    if not isinstance(value, str):
        return "must be a text"
    if not value and not may_be_empty:
        return "must not be empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "has half of a surrogate pair, which is no character"
    return None


def _turn(turn: ChatMessage, is_untrained: bool) -> dict[str, object]:
    """Return a turn as canonical JSON has it: without the default weight, so that equivalent rows are equal."""
    return {"role": turn.role, "content": turn.content} | ({"weight": 0} if is_untrained else {})
