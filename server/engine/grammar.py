"""Compile JSON schemas and regular expressions to llguidance's matchers, or say why they aren't supported.

Answers are compact JSON, without whitespace. Formats of dates and times are replaced by patterns, because
llguidance's own formats accept impossible dates (2023-02-29, 0000-01-01) and leap seconds at any time. Limits keep
the work for one token at a few milliseconds. If a grammar needs more work for a token, the answer fails.
llguidance's own search for forced text is off, because the search has no limit: a grammar of a few dozen
characters (`x|y((a{1000}){1000}){1000}`) would keep a thread busy for minutes.

Importing this module is quick, since the process of `grammar_check` imports it. That process compiles unvetted
grammars, because some small schemas keep the compiler busy for hours.
"""

import json
import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from server.engine.request import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # only exists in llguidance's type stubs

MAX_SCHEMA_BYTES = 1 << 16
MAX_REGEX_BYTES = 1 << 13
WALK = 32
"""Tokens of a trial answer. Most grammars that are too complex to follow fail within a few tokens."""
_LIMITS = LLParserLimits(
    step_lexer_fuel=20_000,  # about 3 ms
    step_max_items=10_000,
    max_lexer_states=10_000,  # 1 to 2 kB each; copies of a matcher share them
    max_grammar_size=100_000,
    verbose_errors=False,  # verbose errors quote the answer
)
_JSON: "JsonCompileOptions" = {"whitespace_flexible": False, "lenient": False, "coerce_one_of": False}
_OPTIONS = '%llguidance {"no_forcing": true}'
_MAX_MESSAGE = 300
_PLACE_SECONDS = 0.1  # processor time for finding the unsupported part of a schema
_MAPS = frozenset({"properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions"})
"""Keywords whose values map names to schemas."""
_VALUES = frozenset({"const", "enum", "default", "example", "examples"})
"""Keywords whose values contain no schemas."""
_NESTED = frozenset(
    {"$ref", "allOf", "anyOf", "oneOf", "properties", "patternProperties", "additionalProperties"}
    | {"items", "prefixItems", "additionalItems", "$defs", "definitions"}
)
"""Keywords in whose values llguidance looks for further schemas."""
_DAY = (
    r"(?:(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_UUID = "[0-9a-fA-F]{{8}}-[0-9a-fA-F]{{4}}-{}[0-9a-fA-F]{{3}}-[89abAB][0-9a-fA-F]{{3}}-[0-9a-fA-F]{{12}}"
_PATTERNS: Mapping[str, str] = {
    "date": f"^{_DAY}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DAY}T{_TIME}$",
    **{f"uuid{version}": f"^{_UUID.format(version)}$" for version in range(1, 9)},  # Pydantic's formats
}
_ANY_STRING = frozenset({"password", "binary", "path"})  # formats of OpenAPI and Pydantic that allow any string
_COMPILER = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
_ONE_OF = (
    "oneOf is only supported if its schemas show that no value matches two of them, "
    "which a plain $ref doesn't: use anyOf"
)
_REF = "$ref must name a schema that isn't inside const, default, enum, example or examples"
_ALLOWED = bytes([200])  # llguidance's masks have this byte for an allowed token, and 0 for a forbidden one


class GrammarRefused(Exception):
    """The grammar isn't supported. The message is for the grammar's author."""


def regex_of(texts: Iterable[str]) -> str:
    """Return a regular expression that matches exactly these texts."""
    return "|".join(map(re.escape, texts))


def compiled(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """Return a matcher at the beginning of an answer. Use a copy of it for each answer.

    Raise GrammarRefused if the grammar isn't supported. This releases the GIL.
    """
    if grammar.kind == "regex":
        if len(grammar.source.encode()) > MAX_REGEX_BYTES:
            raise GrammarRefused(f"is longer than {MAX_REGEX_BYTES} bytes")
        part = _part(LLMatcher.grammar_from_regex(grammar.source))
        matcher = _matcher(tokenizer, str(part["lark_grammar"]))
        if matcher.is_error():
            raise GrammarRefused(_reason(matcher.get_error()))
        return matcher
    if len(grammar.source.encode()) > MAX_SCHEMA_BYTES:
        raise GrammarRefused(f"the schema is longer than {MAX_SCHEMA_BYTES} bytes")
    schema = json.loads(grammar.source)
    _check(schema)
    spell_out(schema)
    matcher = _of_schema(tokenizer, schema)
    if matcher.is_error():
        message = _reason(matcher.get_error())
        raise GrammarRefused(f"{message}{_place(tokenizer, schema, message)}"[:_MAX_MESSAGE])
    return matcher


def _of_schema(tokenizer: LLTokenizer, schema: dict[str, object]) -> LLMatcher:
    part = _part(LLMatcher.grammar_from_json_schema(schema, overrides=_JSON))
    return _matcher(tokenizer, f"start: %json {json.dumps(part['json_schema'])}")


def _matcher(tokenizer: LLTokenizer, start: str) -> LLMatcher:
    return LLMatcher(tokenizer, f"{_OPTIONS}\n{start}", log_level=0, limits=_LIMITS)


def _part(text: str) -> dict[str, object]:
    """Parse a grammar in llguidance's JSON form, and return the only item of its list `grammars`."""
    (part,) = json.loads(text)["grammars"]
    return dict(part)


def _place(tokenizer: LLTokenizer, schema: dict[str, object], message: str) -> str:
    """Return the path, in parentheses, of the first subschema that fails with `message`.

    The subschema must fail even without the schemas inside it. Return an empty string if no such subschema is
    found in `_PLACE_SECONDS`.
    """
    if message == _ONE_OF:
        places = [place for place, node in nodes(schema) if "oneOf" in node]
        return f" (at {places[0]})" if len(places) == 1 else ""
    until = time.thread_time() + _PLACE_SECONDS
    for place, node in nodes(schema):
        if time.thread_time() > until:
            break
        alone = {key: value for key, value in node.items() if key not in _NESTED}
        if _reason(_of_schema(tokenizer, alone).get_error()) == message:
            return f" (at {place})"
    return ""


def _check(schema: object) -> None:
    """Raise GrammarRefused for keywords that llguidance accepts but doesn't implement exactly."""
    for place, node in nodes(schema):
        if "x-guidance" in node:
            raise GrammarRefused("x-guidance is not supported")
        ref = node.get("$ref")
        if isinstance(ref, str) and not names_schema(ref):
            raise GrammarRefused(f"{_REF} (at {place})"[:_MAX_MESSAGE])
        least, required = node.get("minProperties"), node.get("required")
        num_required = len(set(map(str, required))) if isinstance(required, list) else 0
        # llguidance may repeat a key that `properties` doesn't name. A JSON parser counts such a key once.
        if isinstance(least, int) and least > max(num_required, 1):
            message = "minProperties is supported up to the number of required properties, or 1"
            raise GrammarRefused(f"{message} (at {place})"[:_MAX_MESSAGE])


def _reason(message: str) -> str:
    """Return the informative line of llguidance's message, rewritten for the schema's author and truncated."""
    lines = [line.strip() for line in message.splitlines()]
    first = next((line for line in lines if line.startswith("error:")), None) or next(filter(None, lines), "")
    reason = _COMPILER.sub("", first.removeprefix("error:").strip())
    if reason.startswith("oneOf constraints are not supported"):
        return _ONE_OF
    if reason.startswith("Unimplemented keys: "):
        names = re.findall('"([^"]*)"', reason)
        reason = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not supported"
    elif reason.startswith("Unknown format: "):
        reason = f"the format {reason.removeprefix('Unknown format: ')} is not supported"
    return reason[:_MAX_MESSAGE] or "can't be compiled"


def try_out(matcher: LLMatcher, eos_token_ids: frozenset[int]) -> None:
    """Follow the grammar for some random tokens. Raise GrammarRefused if it matches nothing or is too complex."""
    rng = random.Random(0)
    copy = matcher.deep_copy()
    for _ in range(WALK):
        mask = copy.compute_logit_bias()
        if copy.is_error():
            raise GrammarRefused("matches nothing, or is too complex to follow")
        token_id = _pick(mask, rng.randrange(len(mask)), eos_token_ids)
        if token_id is None:
            return
        copy.consume_token(token_id)
        if copy.is_stopped():
            break
    if copy.is_error():
        raise GrammarRefused("is too complex to follow")


def _pick(mask: bytes, start: int, eos_token_ids: frozenset[int]) -> int | None:
    """Return the first token, at or after `start`, that the mask allows and that isn't an end token.

    If there is none, return the first such token at or after 0, or None if there is none at all.
    """
    for first in (start, 0):
        token_id = mask.find(_ALLOWED, first)
        while token_id in eos_token_ids:
            token_id = mask.find(_ALLOWED, token_id + 1)
        if token_id >= 0:
            return token_id
    return None


@dataclass(frozen=True, slots=True)
class Place:
    """The path of a node in a JSON schema. It is formatted only when needed, since keys may be very long."""

    parent: "Place | None"
    key: str | int

    def __str__(self) -> str:
        """Return `#` and a JSON pointer (RFC 6901)."""
        keys: list[str] = []
        place = self
        while place.parent is not None:
            keys.append(str(place.key).replace("~", "~0").replace("/", "~1"))
            place = place.parent
        return "/".join(["#", *reversed(keys)])


def nodes(schema: object) -> Iterator[tuple[Place, dict[str, object]]]:
    """Yield the whole schema and then each schema inside it, with its path.

    Objects under unknown keywords count as schemas, because a `$ref` may name them.
    """
    todo = [(Place(None, ""), schema, False)]
    while todo:
        place, node, is_map = todo.pop()
        if isinstance(node, list):
            parts = reversed([*enumerate(node)])
            todo += [(Place(place, number), part, False) for number, part in parts if _is_nested(part)]
        if not isinstance(node, dict):
            continue
        if not is_map:
            yield place, node
        for key, part in reversed(node.items()):
            if _is_nested(part) and (is_map or key not in _VALUES):
                todo.append((Place(place, key), part, not is_map and key in _MAPS))


def _is_nested(part: object) -> bool:
    return isinstance(part, (dict, list))


def names_schema(ref: str) -> bool:
    """Return whether the target of this `$ref`, if it exists, is a schema that `nodes` yields.

    `nodes` doesn't visit the values of the keywords `_VALUES`, and doesn't yield the values of the keywords
    `_MAPS`, which map names to schemas. The result depends only on the keys of the JSON pointer, not on the schema
    that the pointer starts from. It is true for an anchor, since only schemas have anchors.
    """
    is_map = False
    for key in unquote(ref.partition("#")[2]).split("/")[1:]:
        if not is_map and key in _VALUES:
            return False
        is_map = not is_map and key in _MAPS
    return not is_map


def spell_out(schema: object) -> None:
    """Replace `format` keywords by patterns, and remove keywords without effect. `schema` is changed in place."""
    for _, node in nodes(schema):
        if node.get("uniqueItems") is False:
            del node["uniqueItems"]
        form = node.get("format")
        if not isinstance(form, str):
            continue
        if form in _PATTERNS:
            both = node.setdefault("allOf", [])  # the node may have its own pattern
            if isinstance(both, list):
                both.append({"pattern": _PATTERNS[form]})
        if form in _PATTERNS or form in _ANY_STRING:
            del node["format"]
