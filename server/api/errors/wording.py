"""What is wrong with a field, in our words: pydantic's are for programmers ("Input should be a valid boolean")."""

from collections.abc import Mapping
from string import Formatter

_WORDS = {
    "missing": "is missing",
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a number, neither NaN nor infinite",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must not be empty",
    "too_long": "must have at most {max_length} items",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
}
"""By pydantic's kinds of errors, of which each has these values. What isn't here keeps its words."""


def told(fault: Mapping[str, object]) -> str:
    """The message of one of pydantic's errors."""
    kind, context = str(fault["type"]), fault.get("ctx")
    given = context if isinstance(context, Mapping) else {}
    if kind in ("string_too_short", "too_short") and (least := given.get("min_length")) != 1:
        return f"must have at least {least} {'characters' if kind == 'string_too_short' else 'items'}"
    words = _WORDS.get(kind)
    if words is None or not {name for _, name, _, _ in Formatter().parse(words) if name} <= given.keys():
        return str(fault["msg"]).removeprefix("Value error, ")
    return words.format_map({name: _plain(value) for name, value in given.items()})


def _plain(value: object) -> object:
    """A bound as a person writes it: 2, not 2.0."""
    return f"{value:g}" if isinstance(value, float) else value
