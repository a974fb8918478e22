"""JSON schemas of questions and inputs, for the API's document. `server.decisions` checks the values."""

from server.decisions.questions import MAX_CHOICES, MAX_LEVELS, MAX_QUESTIONS

_OPTION = {"description": {"type": ["string", "null"]}}
_TEXT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}


def _question_schema(kind: str, field: str = "", label: str = "", most: int = 0) -> dict[str, object]:
    value = {"type": ["string", "boolean"]} if label == "value" else {"type": "string"}
    option = {"type": "object", "required": [label], "properties": {label: value, **_OPTION}}
    options = {field: {"type": "array", "minItems": 2, "maxItems": most, "items": option}} if field else {}
    known = {"type": {"const": kind}, "instructions": _TEXT, "name": {"type": ["string", "null"]}, **options}
    return {"type": "object", "required": ["type", "instructions", *options], "properties": known}


QUESTION_SCHEMA: dict[str, object] = {
    "oneOf": [
        _question_schema("predicate"),
        _question_schema("choice", "choices", "value", MAX_CHOICES),
        _question_schema("score", "levels", "label", MAX_LEVELS),
    ]
}
QUESTIONS_SCHEMA: dict[str, object] = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_QUESTIONS,
    "items": QUESTION_SCHEMA,
}
ITEMS_SCHEMA: dict[str, object] = {"type": "array", "minItems": 1, "items": {"type": "object"}}
INPUT_SCHEMA: dict[str, object] = {"anyOf": [{"type": "string"}, ITEMS_SCHEMA]}
