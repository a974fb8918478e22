"""JSON Schemas of rows: which are refused, what validates, and that hostile ones take bounded time."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.training.json_schema import MAX_BYTES, MAX_DEPTH, BadSchema, canonical, is_valid

INVOICE = {
    "type": "object",
    "properties": {
        "number": {"type": "integer", "minimum": 1},
        "due": {"type": "string", "format": "date"},
        "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}, "minItems": 1},
    },
    "required": ["number", "lines"],
    "additionalProperties": False,
    "$defs": {"line": {"type": "object", "properties": {"sku": {"pattern": "^[A-Z]{2}-\\d+$"}}}},
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a", "ab", "b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
)
SCHEMAS: st.SearchStrategy[Mapping[str, object]] = st.recursive(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"]),
            "enum": st.lists(VALUES, min_size=1, max_size=3),
            "const": VALUES,
            "minLength": st.integers(0, 2),
            "maximum": st.integers(-3, 3),
            "minItems": st.integers(0, 2),
            "uniqueItems": st.booleans(),
            "required": st.lists(st.sampled_from("ab"), unique=True),
            "pattern": st.sampled_from(["^a", "b$", "^(a|b)+$"]),
        },
    ),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "allOf": st.lists(inner, min_size=1, max_size=2),
            "anyOf": st.lists(inner, min_size=1, max_size=2),
            "oneOf": st.lists(inner, min_size=1, max_size=2),
            "not": inner,
            "if": inner,
            "then": inner,
            "items": inner,
            "properties": st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
            "additionalProperties": inner | st.booleans(),
        },
    ),
    max_leaves=5,
)


@given(SCHEMAS, VALUES)
def test_answers_validate_as_in_another_library(schema: Mapping[str, object], value: object) -> None:
    expected = jsonschema.Draft202012Validator(schema).is_valid(value)
    assert is_valid(json.dumps(value), canonical(schema)) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"number": 7, "due": "2024-02-29", "lines": [{"sku": "AB-12"}]}', True),
        ('\n {"number": 7, "lines": [{}]}\n', True),
        ('{"number": 7, "due": "2023-02-29", "lines": [{}]}', False),
        ('{"number": 7, "lines": [{"sku": "ab-12"}]}', False),
        ('{"number": 0, "lines": [{}]}', False),
        ('{"number": 7, "lines": []}', False),
        ('{"number": 7, "lines": [{}], "more": 1}', False),
        ('{"number": 7, "number": 8, "lines": [{}]}', False),
        ('{"number": NaN, "lines": [{}]}', False),
        ('```json\n{"number": 7, "lines": [{}]}\n```', False),
        ('{"number": 7, "lines": [{}]', False),
        ("[" * 5000 + "]" * 5000, False),
        ("", False),
    ],
)
def test_answers(answer: str, expected: bool) -> None:
    assert is_valid(answer, canonical(INVOICE)) is expected


@pytest.mark.parametrize("answer", ["1" * 400, "1e308", "-0.0", "1.0", "[" * 200 + "1" + "]" * 200, '"\\ud800"'])
def test_odd_values_are_valid_or_not(answer: str) -> None:
    assert is_valid(answer, canonical({})) in (True, False)
    assert is_valid(answer, canonical({"type": "object"})) is False


def nested(levels: int) -> dict[str, object]:
    schema: dict[str, object] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def chain(names: Sequence[str]) -> dict[str, object]:
    """Return a schema with a reference from each definition to the next."""
    return {
        "$ref": f"#/$defs/{names[0]}",
        "$defs": {one: {"not": {"$ref": f"#/$defs/{other}"}} for one, other in pairwise(names)} | {names[-1]: {}},
    }


def doubling(levels: int) -> dict[str, object]:
    """Return a schema whose size doubles with each level if references are followed."""
    twice = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n - 1}"}] * 2} for n in range(1, levels)}
    return {"$ref": f"#/$defs/d{levels - 1}", "$defs": {"d0": {}, **twice}}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "text"}, "isn't a valid JSON Schema: "),
        (
            {"properties": {"a": {"minLength": -1}}},
            "isn't a valid JSON Schema: at properties.a.minLength: -1 is less",
        ),
        ({"pattern": "("}, "isn't a valid JSON Schema: "),
        ({"pattern": "(?=a)b"}, "isn't a valid JSON Schema: "),
        ({"pattern": "(a)\\1"}, "isn't a valid JSON Schema: "),
        ({"pattern": "((((a{1000}){1000}){1000}){1000})"}, "isn't a valid JSON Schema: "),
        ({"$schema": "https://example.com/own"}, "isn't a valid JSON Schema: "),
        ({"$ref": "https://example.com/a.json"}, "has the $ref https://example.com/a.json: it must be a path"),
        ({"items": {"$ref": "file:///etc/passwd"}}, "has the $ref file:///etc/passwd: it must be a path"),
        ({"$ref": "#name", "$defs": {"a": {"$anchor": "name"}}}, "has the $ref #name: it must be a path"),
        ({"$ref": "#/$defs/b", "$defs": {"a": {}}}, "has the $ref #/$defs/b, which names nothing in the schema"),
        ({"items": {"$ref": "#"}}, "has a recursive $ref"),
        ({"$ref": "#"}, "has a recursive $ref"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"not": {"$ref": "#/$defs/a"}}}}, "has a recursive $ref"),
        ({"items": {"$dynamicRef": "#"}}, "has $dynamicRef, which isn't supported"),
        ({"items": {"$recursiveRef": "#"}}, "has $recursiveRef, which isn't supported"),
        ({"items": {"unevaluatedProperties": False}}, "has unevaluatedProperties, which isn't supported"),
        ({"unevaluatedItems": {"type": "null"}}, "has unevaluatedItems, which isn't supported"),
        ({"items": {"$id": "https://example.com/a", "$ref": "#/items"}}, "has $id in one of its parts"),
        (
            {
                "$schema": "http://json-schema.org/draft-04/schema#",
                "definitions": {"a": {}, "b": {"id": "https://example.com/b", "$ref": "#/definitions/a"}},
            },
            "has id in one of its parts",
        ),
        ({"$ref": "#/$defs/a%2Fb", "$defs": {"a/b": {}}}, "has the $ref #/$defs/a%2Fb: it must be a path"),
        ({"enum": ["a" * MAX_BYTES]}, f"is longer than {MAX_BYTES:,} bytes"),
        ({"const": "\ud800"}, "has half of a surrogate pair"),
        (nested(MAX_DEPTH), f"is nested more than {MAX_DEPTH} levels deep"),
        (chain([f"d{n}" for n in range(1000)]), f"is nested more than {MAX_DEPTH} levels deep"),
        (chain([f"d{n}" for n in range(1000)][::-1]), f"is nested more than {MAX_DEPTH} levels deep"),
        (doubling(24), "has more than 10,000 parts"),
        ({"anyOf": [{"pattern": f"a{n}"} for n in range(101)]}, "has more than 10,000 parts"),
        ({"patternProperties": {f"a{n}": {} for n in range(101)}}, "has more than 10,000 parts"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_schemas_that_are_refused(schema: Mapping[str, object], message: str) -> None:
    with pytest.raises(BadSchema) as caught:
        canonical(schema)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 500


def test_definitions_may_be_shared() -> None:
    schema = {
        "properties": {name: {"$ref": "#/$defs/a~1b%25"} for name in "xyz"},
        "$defs": {"a/b%": {"type": "integer"}},
        "$id": "https://example.com/whole",
        "$schema": "https://json-schema.org/draft/2020-12/schema",
    }
    text = canonical(schema)
    assert is_valid('{"x": 1, "y": 2, "z": 3}', text)
    assert not is_valid('{"x": 1, "y": "2"}', text)
    assert canonical(dict(reversed(schema.items()))) == text


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        (doubling(10), "1"),
        ({"anyOf": [{"pattern": f"^(\\w+\\s?)*{n}$"} for n in range(90)]}, json.dumps("a " * 4000 + "!")),
        ({"patternProperties": {f"(a+)+{n}$": False for n in range(90)}}, json.dumps({"a" * 8000: 1})),
        ({"anyOf": [{"pattern": f"^(\\w{{30}}|{n})$"} for n in range(90)]}, '"a"'),
        ({"uniqueItems": True}, json.dumps([[n] for n in range(4000)])),
        ({"enum": [[n] for n in range(9000)]}, "[9000]"),
        (nested(MAX_DEPTH - 3), "[" * 90 + "]" * 90),
    ],
    ids=["references", "patterns", "large patterns", "names", "unique items", "values", "depth"],
)
def test_hostile_schemas_take_bounded_time(schema: Mapping[str, object], answer: str) -> None:
    start = time.thread_time()
    is_valid(answer, canonical(schema))
    assert time.thread_time() - start < 2


@pytest.mark.parametrize("keyword", ["if", "not", "oneOf", "contains", "propertyNames", "dependentSchemas"])
def test_nested_keywords_take_bounded_time(keyword: str) -> None:
    schema: dict[str, object] = {"type": ["object", "array"]}
    values: list[bool] = []
    start = time.thread_time()
    while (text := json.dumps(schema)) and len(text) < MAX_BYTES:
        inner: Mapping[str, object] = {"oneOf": [schema, {"type": "null"}], "dependentSchemas": {"a": schema}}
        with suppress(BadSchema):
            values += [is_valid(answer, canonical(schema)) for answer in ("{}", '{"a": 1}', "[1]")]
        schema = {"allOf": [schema], keyword: inner.get(keyword, schema)}
    assert len(values) > 15
    assert time.thread_time() - start < 2
