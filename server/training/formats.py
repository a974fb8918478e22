"""Rows in other trainers' formats, which are read as conversations.

    alpaca    {"instruction": "…", "input": "…", "output": "…"}
    sharegpt  {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
    trl       {"prompt": [turns], "completion": [turns]}

`rows.py` checks the turns. Alpaca and ShareGPT rows may have `system`. Alpaca rows may have `history`, a list of
(instruction, output) pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from adapters.errors import FieldError, InvalidInput

RowFormat = Literal["alpaca", "sharegpt", "trl"]
MEANINGS: Mapping[RowFormat, str] = {
    "alpaca": "Alpaca's: the user's turn is the instruction and, after an empty line, the input",
    "sharegpt": "ShareGPT's: human is the user, gpt the assistant",
    "trl": "TRL's conversations: only the completion's turns are trained on",
}
"""How rows of each format are read, in words for users."""
ALPACA = ("instruction", "output")
CONVERSATIONS = "conversations"
_PAIR = ("prompt", "completion")
_ROLES = {"human": "user", "gpt": "assistant"}
_OUR_NAMES = {"from": "role", "value": "content"}
_THEIR_NAMES = {ours: theirs for theirs, ours in _OUR_NAMES.items()}
_NEEDS_TURNS = "must be a list of turns"

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class Conversation:
    """A row in another trainer's format: its turns as `messages` would have them, and where each turn was.

    `locations` are the turns' positions in the original row. `fields` are the format's fields; an error about all
    turns names the last of these fields.
    """

    format: RowFormat
    turns: Sequence[object]
    locations: Sequence[Location]
    fields: Sequence[str]

    def located(self, fault: FieldError) -> FieldError:
        """Return the error with its location in the original row. `fault` has a location in `messages`."""
        _, *rest = fault.loc
        if not rest:
            return FieldError((self.fields[-1],), fault.message)
        place, *names = rest
        found = self.locations[int(place)]
        if self.format == "alpaca" or found == ("system",):  # the turn was a text
            return FieldError(found, fault.message)
        if self.format == "trl":
            return FieldError((*found, *names), fault.message)
        message = "must be system, human or gpt" if names == ["role"] else fault.message
        return FieldError((*found, *(_THEIR_NAMES.get(str(name), name) for name in names)), message)


def format_of_fields(given: set[str]) -> RowFormat | None:
    """Return "alpaca" or "sharegpt" if a row with these fields has that format, else None.

    Rows with `prompt`, `completion` or `messages` have smolora's format or TRL's. The field `text` is ignored,
    since tables of conversations often have the rendered conversation in it.
    """
    if given.isdisjoint((*_PAIR, "messages")):
        if given.issuperset(ALPACA):
            return "alpaca"
        if CONVERSATIONS in given:
            return "sharegpt"
    return None


def read_conversation(row: Mapping[object, object]) -> Conversation | None:
    """Return the conversation of a row in another trainer's format, or None for any other row.

    Raise InvalidInput if the format's fields have wrong types. The caller checks the turns themselves.
    """
    if all(isinstance(row.get(name), list) for name in _PAIR):
        return _trl(row)
    given = {name for name, value in row.items() if isinstance(name, str) and value is not None}
    found = format_of_fields(given)
    if found is None:
        return None
    return _alpaca(row) if found == "alpaca" else _sharegpt(row)


def _alpaca(row: Mapping[object, object]) -> Conversation:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise InvalidInput.of("history", "must be a list of pairs: an instruction and its output")
    turns: list[tuple[Location, str, object]] = []
    if row.get("system"):
        turns.append((("system",), "system", row["system"]))
    for number, (question, answer) in enumerate(history):
        turns += [(("history", number, 0), "user", question), (("history", number, 1), "assistant", answer)]
    turns += [(("instruction",), "user", _asked(row)), (("output",), "assistant", row["output"])]
    return Conversation(
        "alpaca",
        [{"role": role, "content": content} for _, role, content in turns],
        [location for location, _, _ in turns],
        ("system", "history", "instruction", "input", "output"),
    )


def _asked(row: Mapping[object, object]) -> object:
    """Return the content of an Alpaca row's last user turn: the instruction and the input."""
    if not row.get("input"):
        return row["instruction"]
    parts = {name: row[name] for name in ("instruction", "input")}
    faults = [FieldError((name,), "must be a text") for name, part in parts.items() if not isinstance(part, str)]
    if faults:
        raise InvalidInput(faults)
    return "\n\n".join(str(part) for part in parts.values() if part)


def _sharegpt(row: Mapping[object, object]) -> Conversation:
    given = row[CONVERSATIONS]
    if not isinstance(given, list):
        raise InvalidInput.of(CONVERSATIONS, _NEEDS_TURNS)
    turns: list[Mapping[object, object]] = []
    locations: list[Location] = []
    if row.get("system"):
        turns.append({"role": "system", "content": row["system"]})
        locations.append(("system",))
    for number, turn in enumerate(given):
        if not isinstance(turn, Mapping):
            location = (CONVERSATIONS, number, "from")
            raise InvalidInput([FieldError(location, "is missing: a turn is an object with from and value")])
        turns.append(_our_turn(turn))
        locations.append((CONVERSATIONS, number))
    while len(turns) > 1 and turns[-1].get("role") == "user":
        turns.pop()  # many such conversations end with a question, which teaches nothing
    return Conversation("sharegpt", turns, locations, ("system", CONVERSATIONS))


def _our_turn(turn: Mapping[object, object]) -> dict[object, object]:
    ours = {_OUR_NAMES.get(str(name), name): value for name, value in turn.items()}
    if isinstance(role := ours.get("role"), str):
        ours["role"] = _ROLES.get(role, role)
    return ours


def _trl(row: Mapping[object, object]) -> Conversation:
    turns: list[object] = []
    locations: list[Location] = []
    for name in _PAIR:
        given = row[name]
        assert isinstance(given, list), "the caller has checked it"
        if not given and name == "completion":
            raise InvalidInput.of(name, _NEEDS_TURNS)
        for number, turn in enumerate(given):
            is_read_only = name == "prompt" and isinstance(turn, Mapping) and turn.get("role") == "assistant"
            turns.append({**turn, "weight": 0} if is_read_only else turn)
            locations.append((name, number))
    return Conversation("trl", turns, locations, _PAIR)
