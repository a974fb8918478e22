"""JSON Schemas: accepted answers of formats, and refusals with their places."""

import json
import tracemalloc
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time
from pathlib import Path
from typing import Literal

import pytest
from pydantic import UUID4, BaseModel, Field, SecretStr

from adapters.errors import InvalidInput
from server.engine.grammar import MAX_SCHEMA_BYTES, nodes
from server.engine.guidance import Guidance
from server.engine.request import Grammar
from tests.kits.grammars import guidance_of
from tests.kits.tiny import own, tiny_tokenizer

VOCAB = 520
EOS = (0, 2)


@pytest.fixture(scope="module")
def guidance() -> Iterator[Guidance]:
    guidance = guidance_of(own(tiny_tokenizer()), VOCAB, EOS)
    yield guidance
    guidance.close()


def takes(guidance: Guidance, schema: Mapping[str, object], answer: object) -> bool:
    """Return whether this text can be the whole answer."""
    grammar = Grammar("json_schema", json.dumps(schema))
    guidance.check(grammar)
    constraint = guidance.constraint(grammar)
    token_ids = tiny_tokenizer().encode(json.dumps(answer, separators=(",", ":")))
    if constraint.num_allowed(token_ids) < len(token_ids):
        return False
    end = constraint.after(token_ids)
    forbidden = end.forbidden()
    return end.is_complete or (forbidden is not None and not forbidden[EOS[0]])


def refused(guidance: Guidance, schema: Mapping[str, object]) -> str:
    with pytest.raises(InvalidInput) as caught:
        guidance.check(Grammar("json_schema", json.dumps(schema)))
    return caught.value.errors[0].message


DAYS = {
    "2024-02-29": True,
    "2000-02-29": True,
    "2023-02-28": True,
    "9999-12-31": True,
    "2023-02-29": False,
    "2100-02-29": False,
    "0000-01-01": False,
    "2024-04-31": False,
    "2024-13-01": False,
}
TIMES = {
    "23:59:59Z": True,
    "00:00:00.123456+05:30": True,
    "12:30:00-23:59": True,
    "12:30:60Z": False,
    "24:00:00Z": False,
    "12:30:00": False,
    "12:30:00+24:00": False,
}


@pytest.mark.parametrize(
    ("form", "text", "is_valid"),
    [
        *(("date", text, is_valid) for text, is_valid in DAYS.items()),
        *(("time", text, is_valid) for text, is_valid in TIMES.items()),
        *(("date-time", f"{text}T12:00:00Z", is_valid) for text, is_valid in DAYS.items()),
        *(("date-time", f"2024-02-29T{text}", is_valid) for text, is_valid in TIMES.items()),
    ],
)
def test_days_and_times_exist(guidance: Guidance, form: str, text: str, is_valid: bool) -> None:
    assert takes(guidance, {"type": "string", "format": form}, text) is is_valid


def test_a_format_goes_with_a_pattern(guidance: Guidance) -> None:
    schema = {"type": "string", "format": "date", "pattern": "^2024"}
    assert takes(guidance, schema, "2024-02-29")
    assert not takes(guidance, schema, "2020-02-29")
    assert not takes(guidance, schema, "2024-02-30")


def test_formats_that_pydantic_writes(guidance: Guidance) -> None:
    class Visit(BaseModel):
        id: UUID4
        day: date
        begin: time
        seen: datetime
        secret: SecretStr
        data: bytes
        file: Path

    answer = {
        "id": "0b9e1b6e-5d5c-4b7e-9a6f-0123456789ab",
        "day": "2024-02-29",
        "begin": "12:30:00Z",
        "seen": "2024-02-29T12:30:00.5+01:00",
        "secret": "a b",
        "data": "",
        "file": "/a",
    }
    Visit.model_validate_json(json.dumps(answer))
    schema = Visit.model_json_schema()
    assert takes(guidance, schema, answer)
    assert not takes(guidance, schema, {**answer, "id": answer["id"].replace("-4", "-1", 1)})


def test_only_formats_of_schemas_are_read(guidance: Guidance) -> None:
    """A value or a property may have a keyword's name."""
    value = {"format": "date", "minProperties": 9}
    assert takes(guidance, {"const": value}, value)
    assert takes(guidance, {"type": "object", "default": value}, {})
    properties = {"format": {"type": "string"}, "const": {"type": "string", "format": "date"}}
    schema = {"type": "object", "properties": properties, "required": ["format", "const"]}
    assert takes(guidance, schema, {"format": "date", "const": "2024-02-29"})
    assert not takes(guidance, schema, {"format": "date", "const": "2023-02-29"})


def test_unique_items_false_is_accepted(guidance: Guidance) -> None:
    assert takes(guidance, {"type": "array", "items": {"const": 1}, "uniqueItems": False}, [1, 1])


SET = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (SET, "uniqueItems is not supported"),
        ({"if": {"const": 1}, "then": {"const": 2}}, "if, then are not supported"),
        ({"not": {"type": "string"}}, "not is not supported"),
        ({"type": "string", "format": "iri"}, "the format iri is not supported"),
        (
            {"type": "string", "pattern": "(?=a)b"},
            "look-around, including look-ahead and look-behind, is not supported",
        ),
        (
            {"oneOf": [{"type": "integer"}, {"type": "number"}]},
            "oneOf is only supported if its schemas show that no value matches two of them, "
            "which a plain $ref doesn't: use anyOf",
        ),
        (
            {"type": "object", "minProperties": 2},
            "minProperties is supported up to the number of required properties, or 1",
        ),
    ],
)
def test_a_refusal_names_the_keyword_and_its_place(
    guidance: Guidance, part: Mapping[str, object], message: str
) -> None:
    item = {"type": "object", "properties": {"name": {"type": "string"}, "a/b": part}}
    inline = {"type": "object", "properties": {"items": {"type": "array", "items": item}}}
    assert refused(guidance, inline) == f"{message} (at #/properties/items/items/properties/a~1b)"
    named = {"$defs": {"Item": item}, "type": "array", "items": {"$ref": "#/$defs/Item"}}
    assert refused(guidance, named) == f"{message} (at #/$defs/Item/properties/a~1b)"


def test_a_refusal_of_the_whole_has_no_place(guidance: Guidance) -> None:
    assert refused(guidance, {"$ref": "#/$defs/Missing"}) == "Pointer '/$defs/Missing' does not exist"
    either = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
    assert "(at" not in refused(
        guidance, {"properties": {"a": either, "b": either}}
    )  # which is at fault is unknown


@pytest.mark.parametrize("item", ["0", "{}", "[]"])
def test_walking_takes_room_by_the_schemas_length(item: str) -> None:
    """However long the key above many nodes is."""
    key, half = "K" * (MAX_SCHEMA_BYTES // 2), MAX_SCHEMA_BYTES // 2 - 100
    items = ",".join([item] * (half // (len(item) + 1)))
    schema = json.loads(f'{{"type":"object","{key}":[{items}],"last":{{}}}}')
    tracemalloc.start()
    try:
        places = [place for place, _ in nodes(schema)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(places[-1]) == "#/last"
    assert len(places) == (2 if item != "{}" else 2 + items.count("{"))
    assert peak < 100 * MAX_SCHEMA_BYTES


FIVE: Mapping[str, object] = {"type": "object", "minProperties": 5}
HIDDEN: Mapping[str, Mapping[str, object]] = {
    "#/components/schemas/example": {"components": {"schemas": {"example": FIVE}}},
    "#/components/schemas/ex%61mple": {"components": {"schemas": {"example": FIVE}}},
    "#/examples/0": {"examples": [FIVE]},
    "#/$defs/A/const/x": {"$defs": {"A": {"const": {"x": FIVE}}}},
    "#/$defs": {"$defs": FIVE},
    "#/x/properties": {"x": {"properties": {"properties": {"const": FIVE}}}},
    "http://a.b/c#/example": {"$id": "http://a.b/c", "example": FIVE},
}


@pytest.mark.parametrize("ref", HIDDEN)
def test_a_ref_to_a_value_is_refused(guidance: Guidance, ref: str) -> None:
    message = "$ref must name a schema that isn't inside const, default, enum, example or examples"
    schema = {"type": "array", "items": {"$ref": ref}, **HIDDEN[ref]}
    assert refused(guidance, schema) == f"{message} (at #/items)"


def test_a_schema_under_dependencies_is_read(guidance: Guidance) -> None:
    """An `$id` makes it addressable, whatever name it depends on."""
    hidden = {"dependencies": {"const": {"$id": "http://a.b/c", **FIVE}}}
    draft = "http://json-schema.org/draft-07/schema#"
    schema = {"$schema": draft, "definitions": {"A": hidden}, "$ref": "http://a.b/c"}
    assert refused(guidance, schema).endswith("(at #/definitions/A/dependencies/const)")


@pytest.mark.parametrize(
    "ref",
    [
        "#/$defs/a~1b",
        "#/%24defs/a~1b",
        "#/$defs/c%20d",
        "#/$defs/example",
        "#/$defs/list/prefixItems/0",
        "#/properties/const",
        "#/x-parts/day",
        "#day",
        "http://a.b/day",
    ],
)
def test_a_ref_names_a_schema_in_many_ways(guidance: Guidance, ref: str) -> None:
    day = {"type": "string", "format": "date"}
    named = {"a/b": day, "c d": day, "example": day, "list": {"prefixItems": [day]}}
    marked = {"anchor": {"$anchor": "day", **day}, "id": {"$id": "http://a.b/day", **day}}
    rest = {"$defs": {**named, **marked}, "properties": {"const": day}, "x-parts": {"day": day}}
    schema = {"type": "array", "items": {"$ref": ref}, **rest}
    assert takes(guidance, schema, ["2024-02-29"])
    assert not takes(guidance, schema, ["2023-02-29"])


def test_a_schema_names_itself(guidance: Guidance) -> None:
    schema = {"type": "array", "items": {"$ref": "#"}}
    assert takes(guidance, schema, [[], [[]]])
    assert not takes(guidance, schema, [1])


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str


def test_a_discriminated_union_that_pydantic_writes(guidance: Guidance) -> None:
    class Owner(BaseModel):
        pet: Cat | Dog = Field(discriminator="kind")

    schema = Owner.model_json_schema()
    assert "oneOf" in schema["properties"]["pet"]
    assert takes(guidance, schema, {"pet": {"kind": "cat", "lives": 9}})
    assert takes(guidance, schema, {"pet": {"kind": "dog", "name": "a"}})
    assert not takes(guidance, schema, {"pet": {"kind": "dog", "lives": 9}})


def test_one_of_behind_refs_alone(guidance: Guidance) -> None:
    """It is refused, although no value matches both. The help named by the refusal works, as does a type next to
    it."""
    schemas = {"Cat": Cat.model_json_schema(), "Dog": Dog.model_json_schema()}
    refs = [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]
    assert "which a plain $ref doesn't: use anyOf" in refused(guidance, {"$defs": schemas, "oneOf": refs})
    for way in ({"anyOf": refs}, {"type": "object", "oneOf": refs}):
        assert takes(guidance, {"$defs": schemas, **way}, {"kind": "cat", "lives": 9})
        assert not takes(guidance, {"$defs": schemas, **way}, {"kind": "dog", "lives": 9})
