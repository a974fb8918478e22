"""Texts of a decision: a string, OpenAI's content parts, or items such as messages and function calls."""

import json
from collections.abc import Mapping
from typing import Final

from adapters.errors import FieldError, InvalidInput

MAX_ITEMS = 1024
"""The most items of an input, and the most parts of a text."""

Loc = tuple[str | int, ...]
_ROLES: Final = ("user", "developer", "system", "assistant")
_FIELDS: Mapping[str, tuple[str, str]] = {
    "function_call": ("name", "arguments"),
    "function_call_output": ("call_id", "output"),
}
"""For each type of item that is no message: its fields that are shown to the model."""
_IGNORED = frozenset({"type", "id", "status", "namespace", "call_id", "phase"})


def text_of(value: object, loc: Loc) -> str:
    """Return a text that is a string or a list of parts, which are joined by line feeds.

    A JSON part is written as compact JSON. Raise InvalidInput, located below `loc`, if the value is anything else.
    """
    if isinstance(value, str):
        if fault := text_fault(value):
            raise InvalidInput([FieldError(loc, fault)])
        return value
    if not isinstance(value, list) or len(value) > MAX_ITEMS:
        raise InvalidInput([FieldError(loc, f"must be a text, or a list of up to {MAX_ITEMS} parts")])
    return "\n".join(_part(part, (*loc, number)) for number, part in enumerate(value))


def input_text(value: object, loc: Loc = ("input",)) -> str:
    """Return the text of an input: a string, or a list of items.

    A single message is written as its text. Several items are written as a transcript: each begins with its role,
    or with its kind and name. Raise InvalidInput, located below `loc`, if the value is invalid or empty.
    """
    if isinstance(value, str):
        text = text_of(value, loc)
    elif not isinstance(value, list) or not 1 <= len(value) <= MAX_ITEMS:
        raise InvalidInput([FieldError(loc, f"must be a text, or a list of 1 to {MAX_ITEMS} items")])
    else:
        items = [_item(item, (*loc, number)) for number, item in enumerate(value)]
        text = items[0][1] if len(items) == 1 else "\n\n".join(f"{head}: {body}" for head, body in items)
    if not text.strip():
        raise InvalidInput([FieldError(loc, "must not be empty")])
    return text


def text_fault(value: object) -> str | None:
    """Return what is wrong with a text, or None if nothing is."""
    if not isinstance(value, str):
        return "must be a text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "has half of a surrogate pair, which is no character"
    return None


def _item(item: object, loc: Loc) -> tuple[str, str]:
    """Return (how a transcript introduces the item, its text)."""
    if not isinstance(item, Mapping):
        raise InvalidInput([FieldError(loc, "must be an object: a message, a function_call or its output")])
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if role not in _ROLES:
            raise InvalidInput([FieldError((*loc, "role"), f"must be {', '.join(_ROLES[:-1])} or {_ROLES[-1]}")])
        _refuse_unknown(item, {"role", "content"}, loc)
        return role, text_of(item.get("content"), (*loc, "content"))
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise InvalidInput([FieldError((*loc, "type"), "must be message, function_call or function_call_output")])
    _refuse_unknown(item, set(_FIELDS[kind]), loc)
    name, field = _FIELDS[kind]
    head = item.get(name)
    if not isinstance(head, str) or text_fault(head):
        raise InvalidInput([FieldError((*loc, name), "must be a text")])
    return f"{kind} {head}", text_of(item.get(field), (*loc, field))


def _part(part: object, loc: Loc) -> str:
    if not isinstance(part, Mapping):
        raise InvalidInput([FieldError(loc, "must be an object with a type")])
    kind = part.get("type")
    if kind in ("input_text", "output_text"):
        _refuse_unknown(part, {"text", "prompt_cache_breakpoint"}, loc)
        if fault := text_fault(part.get("text")):
            raise InvalidInput([FieldError((*loc, "text"), fault)])
        return str(part["text"])
    if kind == "input_json":
        _refuse_unknown(part, {"data"}, loc)
        data = part.get("data")
        if not isinstance(data, dict | list):
            raise InvalidInput([FieldError((*loc, "data"), "must be an object, or a list of objects")])
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        if fault := text_fault(text):
            raise InvalidInput([FieldError((*loc, "data"), fault)])
        return text
    raise InvalidInput(
        [FieldError((*loc, "type"), "must be input_text, input_json or output_text: images can't be read")]
    )


def _refuse_unknown(value: Mapping[object, object], known: set[str], loc: Loc) -> None:
    strange = [str(name)[:64] for name in value if name not in known and name not in _IGNORED]
    if strange:
        raise InvalidInput([FieldError((*loc, strange[0]), "is no field here: leave it out")])
