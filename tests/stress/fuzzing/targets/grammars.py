"""Regular expressions and JSON schemas for structured answers: refused, or compiled and followed for a while."""

import functools
import json
from collections.abc import Sequence

from adapters import strict_json
from adapters.errors import InvalidInput
from server.engine.grammar import MAX_SCHEMA_BYTES
from server.engine.guidance import Guidance
from server.engine.request import Grammar
from tests.kits.grammars import BOUNDED, CODES, HOSTILE_REGEX, HOSTILE_SCHEMA, growing
from tests.server.conftest import new_guidance
from tests.stress.fuzzing.choices import Choices
from tests.stress.fuzzing.target import OPEN, Target, check_refusal

PIECES = (
    *(
        "a",
        "[a-z]",
        ".",
        "\\d",
        "(",
        ")",
        "|",
        "*",
        "+",
        "?",
        "{2,9}",
        "{0,200}",
        "{300}",
        "[^\\x00]",
        "(?i)",
        "^",
        "$",
        "é",
    ),
    *("\\p{L}", "(?:", "[[:alpha:]]", "\\b", "(?=", "\\1", "{", "[", "]", "&", "~", "(?P<a>"),
)
WORDS = (
    *("type", "properties", "items", "anyOf", "oneOf", "allOf", "enum", "const", "pattern", "format", "minLength"),
    *("maxLength", "minimum", "maximum", "multipleOf", "required", "additionalProperties", "$ref", "$defs", "not"),
    *("prefixItems", "minItems", "maxItems", "minProperties", "patternProperties", "if", "contains", "x-guidance"),
)
LEAVES: Sequence[object] = (
    *(
        "string",
        "integer",
        "number",
        "object",
        "array",
        "null",
        "boolean",
        "date",
        "uuid",
        "email",
        "#",
        "#/$defs/a",
    ),
    *(
        "^[a-z]{1,9}$",
        "(a{0,50}b){0,50}",
        "((ab){300}){300}",
        0,
        1,
        2,
        3000,
        0.1,
        -1,
        1e300,
        10**20,
        True,
        False,
        None,
        ["a"],
        [],
        {},
    ),
)
_STEPS = 24
_RAW_REGEX, _REGEX, _RAW_SCHEMA, _SCHEMA = range(4)


@functools.cache
def guidance() -> Guidance:
    made = new_guidance()
    OPEN.callback(made.close)
    return made


def run(data: bytes) -> str:
    choices = Choices(data)
    kind = choices.below(4)
    grammar: Grammar
    if kind == _RAW_REGEX:
        grammar = Grammar("regex", choices.rest.decode("utf-8", "replace"))
    elif kind == _REGEX:
        grammar = Grammar("regex", "".join(choices.pick(PIECES) for _ in range(choices.below(40))))
    else:
        try:
            schema = strict_json.parse_object(choices.rest) if kind == _RAW_SCHEMA else _schema(choices, 4)
        except strict_json.BadJsonError:
            return "no JSON"
        source = json.dumps(schema)
        if len(source) > MAX_SCHEMA_BYTES:
            return "too long"
        grammar = Grammar("json_schema", source)
    try:
        guidance().check(grammar)
    except InvalidInput as error:
        check_refusal(error)
        return "refused"
    return _follow(grammar, choices)


def _follow(grammar: Grammar, choices: Choices) -> str:
    place = guidance().constraint(grammar)
    for _ in range(_STEPS):
        forbidden = place.forbidden()
        if forbidden is None:
            return "too complex"
        allowed = (~forbidden).nonzero()[0]
        if place.is_complete or not len(allowed):
            break
        place.forced(choices.below(16))
        place.accept(int(allowed[choices.below(len(allowed))]))
    return "followed" if place.error is None else "too complex"


def _schema(choices: Choices, depth: int) -> object:
    if depth == 0 or choices.one_in(4):
        return choices.pick(LEAVES)
    if choices.one_in(8):
        return [_schema(choices, depth - 1) for _ in range(choices.below(4))]
    made = {choices.pick(WORDS): _schema(choices, depth - 1) for _ in range(1 + choices.below(4))}
    if choices.one_in(2):
        made["type"] = choices.pick(LEAVES[:7])
    return made


def seeds() -> list[bytes]:
    regexes = [CODES.grammar.source, HOSTILE_REGEX, growing().source, "a", "(a|b)*c{2,9}", "x|y((ab){300}){300}"]
    long = {"type": "array", "items": {"const": "ab" * 300}, "minItems": 3000}
    schemas = [*BOUNDED.values(), HOSTILE_SCHEMA, {"anyOf": [{"type": "string"}, long]}]
    return [
        *(bytes([_RAW_REGEX]) + regex.encode() for regex in regexes),
        *(bytes([_RAW_SCHEMA]) + json.dumps(schema).encode() for schema in schemas),
        *(bytes([kind]) + bytes(range(first, first + 50)) for kind in (_REGEX, _SCHEMA) for first in (0, 7, 90)),
    ]


TARGET = Target(
    run,
    seeds,
    max_len=2048,
    words=tuple(f'"{word}"'.encode() for word in WORDS) + tuple(piece.encode() for piece in PIECES),
    cpu_seconds=2.0,  # 0.4 of it for the process that vets the grammar
    memory=192 << 20,  # the states of a grammar that is just accepted
)
