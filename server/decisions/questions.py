"""Questions about an input: their types, options, bounds, JSON and digest.

    {"type": "predicate", "instructions"}            is the statement true?
    {"type": "choice", "instructions", "choices"}    which of 2 to 255 values?
    {"type": "score", "instructions", "levels"}      which of 2 to 10 ordered levels?

Each may have a `name`. The field names are those of OpenAI's /v1/decisions.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from adapters.errors import FieldError, InvalidInput
from server.decisions.parts import text_fault, text_of

MAX_QUESTIONS = 400
MAX_CHOICES = 255
MAX_LEVELS = 10
MAX_NAME = 128
MAX_FAULTS = 20
"""The most errors of a list of questions that are reported."""

QuestionType = Literal["predicate", "choice", "score"]
Loc = tuple[str | int, ...]
_LISTS: Mapping[str, tuple[str, str, int]] = {
    "choice": ("choices", "value", MAX_CHOICES),
    "score": ("levels", "label", MAX_LEVELS),
}
"""For each type with options: the field of its options, the field of an option's value, and the most options."""
_TYPES = "predicate, choice or score"


@dataclass(frozen=True)
class Option:
    """A possible answer. A level's value is its label; a predicate has the values `yes` and `no`."""

    value: str | bool
    description: str | None = None

    @property
    def text(self) -> str:
        """The text by which the model knows the option. Different values have different texts.

        A boolean is `true` or `false`. A string is itself, but in JSON's quotes if it would look like a boolean or
        like a quoted string.
        """
        if isinstance(self.value, bool):
            return "true" if self.value else "false"
        is_ambiguous = self.value in ("true", "false") or self.value.startswith('"')
        return json.dumps(self.value, ensure_ascii=False) if is_ambiguous else self.value


_YES_NO = (Option("yes"), Option("no"))


@dataclass(frozen=True)
class Question:
    """A typed question. A predicate's options are `yes` and `no`, in this order."""

    type: QuestionType
    instructions: str
    options: tuple[Option, ...]
    name: str | None = None

    def canonical_json(self) -> bytes:
        """Return the canonical JSON of type, instructions and options, without the name."""
        options = [_without_null(value=option.value, description=option.description) for option in self.options]
        document = {"type": self.type, "instructions": self.instructions, "options": options}
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @property
    def digest(self) -> str:
        """The SHA-256 of the canonical JSON, in hexadecimal."""
        return hashlib.sha256(self.canonical_json()).hexdigest()

    def document(self) -> dict[str, object]:
        """Return JSON that `parse_question` reads as an equal question."""
        found = _without_null(type=self.type, instructions=self.instructions, name=self.name)
        if self.type != "predicate":
            field, value, _ = _LISTS[self.type]
            found[field] = [
                _without_null(**{value: option.value, "description": option.description})
                for option in self.options
            ]
        return found

    def index_of(self, answer: object) -> int:
        """Return the index of the option that a row's `answer` names: a value, a label, or true or false for a
        predicate. Raise InvalidInput, which names the field `answer`, if there is none.
        """
        if self.type == "predicate":
            if isinstance(answer, bool):
                return 0 if answer else 1
            raise InvalidInput.of("answer", "must be true or false: the question is a predicate")
        for index, option in enumerate(self.options):
            if type(answer) is type(option.value) and answer == option.value:
                return index
        field, value, _ = _LISTS[self.type]
        known = ", ".join(option.text for option in self.options[:_SHOWN])
        more = len(self.options) - _SHOWN
        more_text = f" and {more} more" if more > 0 else ""
        raise InvalidInput.of("answer", f"is no {value} of the question's {field}: {known}{more_text}")

    def reordered(self, order: Sequence[int]) -> "Question":
        """Return the question with its options in another order: `order` has the old index of each."""
        return replace(self, options=tuple(self.options[index] for index in order))


_SHOWN = 8  # options that an error lists


def parse_questions(value: object, loc: Loc = ("questions",)) -> list[Question]:
    """Make questions from parsed JSON. Raise InvalidInput, with up to `MAX_FAULTS` errors below `loc`."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_QUESTIONS:
        raise InvalidInput([FieldError(loc, f"must be a list of 1 to {MAX_QUESTIONS} questions")])
    questions: list[Question] = []
    faults: list[FieldError] = []
    for number, one in enumerate(value):
        try:
            questions.append(parse_question(one, (*loc, number)))
        except InvalidInput as error:
            faults += error.errors
            if len(faults) >= MAX_FAULTS:
                break
    if faults:
        raise InvalidInput(faults[:MAX_FAULTS])
    return questions


def parse_question(value: object, loc: Loc = ("question",)) -> Question:
    """Make a question from parsed JSON. Raise InvalidInput, whose errors are located below `loc`."""
    if not isinstance(value, Mapping):
        raise InvalidInput([FieldError(loc, f"must be an object with a type: {_TYPES}")])
    kind = value.get("type")
    if kind not in ("predicate", "choice", "score"):
        raise InvalidInput([FieldError((*loc, "type"), f"must be {_TYPES}")])
    field, label, most = _LISTS.get(kind, (None, "", 0))
    faults = _unknown(value, {"type", "instructions", "name", field}, loc)
    instructions = ""
    if "instructions" not in value:
        faults.append(FieldError((*loc, "instructions"), 'is missing; it may be ""'))
    else:
        try:
            instructions = text_of(value["instructions"], (*loc, "instructions"))
        except InvalidInput as error:
            faults += error.errors
    name = value.get("name")
    if name is not None and (fault := name_fault(name)):
        faults.append(FieldError((*loc, "name"), fault))
    options: tuple[Option, ...] = _YES_NO
    if field is not None:
        options, found = _options(value.get(field), label, most, (*loc, field))
        faults += found
    if faults:
        raise InvalidInput(faults[:MAX_FAULTS])
    return Question(kind, instructions, options, name)


def name_fault(name: object) -> str | None:
    """Return what is wrong with a question's name, or None if nothing is."""
    is_valid = isinstance(name, str) and 1 <= len(name) <= MAX_NAME and not text_fault(name)
    return None if is_valid else f"must be a text of 1 to {MAX_NAME} characters"


def _options(value: object, label: str, most: int, loc: Loc) -> tuple[tuple[Option, ...], list[FieldError]]:
    """Return (options, faults). `label` is the field of an option's value."""
    if not isinstance(value, list) or not 2 <= len(value) <= most:
        given = f", not {len(value)}" if isinstance(value, list) else ""
        return (), [FieldError(loc, f"must be a list of 2 to {most}{given}")]
    options: list[Option] = []
    faults: list[FieldError] = []
    places: dict[tuple[type, str | bool], int] = {}
    for number, one in enumerate(value):
        at = (*loc, number)
        if not isinstance(one, Mapping):
            faults.append(FieldError(at, f"must be an object with {label}, and description if there is one"))
            continue
        faults += _unknown(one, {label, "description"}, at)
        answer, description = one.get(label), one.get("description")
        if description is not None and (fault := text_fault(description)):
            faults.append(FieldError((*at, "description"), fault))
        elif not (isinstance(answer, str) or (label == "value" and isinstance(answer, bool))):
            may_be = "a text, or true or false" if label == "value" else "a text"
            faults.append(FieldError((*at, label), f"must be {may_be}"))
        elif isinstance(answer, str) and (fault := "must not be empty" if not answer else text_fault(answer)):
            faults.append(FieldError((*at, label), fault))
        elif (first := places.setdefault((type(answer), answer), number)) != number:
            faults.append(FieldError((*at, label), f"equals that of {loc[-1]}.{first}: each must be different"))
        else:
            options.append(Option(answer, description or None))
    return tuple(options), faults


def _unknown(value: Mapping[object, object], known: set[str | None], loc: Loc) -> list[FieldError]:
    fields = ", ".join(sorted(name for name in known if name is not None))
    strange = [str(name)[:MAX_NAME] for name in value if name not in known]
    return [
        FieldError((*loc, name), f"is no field here: the fields are {fields}") for name in strange[:MAX_FAULTS]
    ]


def _without_null(**fields: object) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}
