"""JSON Schemas of rows: check a schema when its row is read, and validate answers.

Schemas come from clients. So their size, their depth and the number of their parts are limited, with the parts of
referenced schemas counted at each reference. A reference stays within the schema and isn't recursive, and nothing
is fetched. Patterns are matched in linear time. Compiling and validating therefore take milliseconds.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn
from urllib.parse import unquote

import jsonschema_rs

from adapters import strict_json

MAX_BYTES = 1 << 16
MAX_DEPTH = 100
MAX_PARTS = 10_000
"""The most objects and lists of a schema. A pattern counts as `_PATTERN_PARTS` of them."""
_PATTERN_PARTS = 100
_PATTERN_BYTES = 1 << 20  # of a compiled pattern
_REFUSED = ("$dynamicRef", "$recursiveRef", "unevaluatedItems", "unevaluatedProperties")
"""Keywords that may be recursive, or whose time doubles with each level of nesting."""
_MAX_MESSAGE = 300


class BadSchema(ValueError):
    """A schema that isn't supported. The message is for the row's author, and follows the field's name."""


def canonical(schema: Mapping[str, object]) -> str:
    """Return the schema's JSON with sorted keys. Raise BadSchema if answers can't be validated against it."""
    try:
        text = json.dumps(schema, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        size = len(text.encode())
    except RecursionError:
        raise BadSchema("is nested too deeply") from None
    except UnicodeEncodeError:
        raise BadSchema("has half of a surrogate pair, which is no character") from None
    if size > MAX_BYTES:
        raise BadSchema(f"is longer than {MAX_BYTES:,} bytes")
    _validator(text)
    return text


def is_valid(answer: str, schema: str) -> bool:
    """Return whether the answer is JSON that validates against a schema that `canonical` returned."""
    try:
        value = strict_json.parse(answer)
        return _validator(schema).is_valid(value)
    except ValueError:  # not JSON, or nested too deeply for the validator
        return False


@lru_cache(maxsize=32)  # a validator takes up to 2 MB
def _validator(schema: str) -> jsonschema_rs.Validator:
    document = json.loads(schema)
    if _size(document, document, {}).num_parts > MAX_PARTS:
        raise BadSchema(f"has more than {MAX_PARTS:,} parts, those of references included")
    try:
        return jsonschema_rs.validator_for(
            document,
            validate_formats=True,
            retriever=_refuse,
            pattern_options=jsonschema_rs.RegexOptions(size_limit=_PATTERN_BYTES),
        )
    except ValueError as error:
        raise BadSchema(f"isn't a valid JSON Schema: {_message(error)}") from None


def _refuse(uri: str) -> NoReturn:
    raise ValueError("nothing is fetched")


def _message(error: ValueError) -> str:
    path = error.instance_path if isinstance(error, jsonschema_rs.ValidationError) else []
    place = f"at {'.'.join(map(str, path))}: " if path else ""
    return strict_json.printable(place + str(error).partition("\n")[0], _MAX_MESSAGE)


@dataclass(frozen=True)
class _Size:
    """The objects and lists of a part of a schema, those of references included: their number, and their depth."""

    num_parts: int
    depth: int


def _size(node: object, root: object, known: dict[int, _Size | None], place: int = 0) -> _Size:
    """Return the size of `node`, which is `place` levels deep.

    `known` has sizes by the ids of objects and lists, and None for those that are being measured. Raise BadSchema
    if the node is too deep, or has references that aren't supported.
    """
    if not isinstance(node, dict | list):
        return _Size(0, 0)
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise BadSchema("has a recursive $ref, which isn't supported")
        return found
    known[id(node)] = None
    sizes = [_size(child, root, known, place + 1) for child in _children(node, root)] if place < MAX_DEPTH else []
    found = _Size(1 + sum(size.num_parts for size in sizes), 1 + max((size.depth for size in sizes), default=0))
    if max(place, found.depth) >= MAX_DEPTH:
        raise BadSchema(f"is nested more than {MAX_DEPTH} levels deep, those of references included")
    if isinstance(node, dict):
        patterns = node.get("patternProperties")
        num_patterns = isinstance(node.get("pattern"), str) + (len(patterns) if isinstance(patterns, dict) else 0)
        found = _Size(found.num_parts + _PATTERN_PARTS * num_patterns, found.depth)
    known[id(node)] = found
    return found


def _children(node: dict[str, object] | list[object], root: object) -> Iterator[object]:
    """Yield the node's values, and the schema that it references."""
    if isinstance(node, list):
        yield from node
        return
    yield from node.values()
    for name in ("$id", "id") if _is_draft_4(root) else ("$id",):
        if node is not root and isinstance(node.get(name), str):
            raise BadSchema(f"has {name} in one of its parts, which isn't supported")
    for name in _REFUSED:
        if name in node:
            raise BadSchema(f"has {name}, which isn't supported")
    if isinstance(reference := node.get("$ref"), str):
        yield _referenced(reference, root)


def _is_draft_4(root: object) -> bool:
    return isinstance(root, dict) and "draft-04" in str(root.get("$schema"))


def _referenced(reference: str, root: object) -> object:
    """Return the schema that a `$ref` names by a path, such as `#/$defs/name`."""
    named = strict_json.printable(reference)
    if (reference != "#" and not reference.startswith("#/")) or "%2f" in reference.lower():
        raise BadSchema(f"has the $ref {named}: it must be a path within the schema, such as #/$defs/name")
    found = root
    for step in unquote(reference).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            raise BadSchema(f"has the $ref {named}, which names nothing in the schema")
    return found
