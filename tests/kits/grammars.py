"""Grammars for tests: finite languages, hostile grammars, and ten schemas with bounded answers."""

from collections.abc import Collection, Mapping, Sequence

from server.engine.detokenizer import TokenBytes
from server.engine.guidance import Guidance
from server.engine.request import Grammar
from server.model.text.tokenizer import BaseTokenizer, tokenizer_json

Schema = Mapping[str, object]


def guidance_of(tokenizer: BaseTokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> Guidance:
    return Guidance(tokenizer_json(tokenizer), vocab_size, tuple(eos_token_ids))


class Language:
    """A finite language: the oracle for allowed tokens, by lookup in a list of words."""

    def __init__(self, regex: str, words: Collection[str]) -> None:
        """`words` are all words that `regex` matches."""
        self.grammar = Grammar("regex", regex)
        self.words = frozenset(word.encode() for word in words)

    def is_forced(self, before: bytes) -> bool:
        """Return whether all words continue with the same byte: then only one tokenization may be allowed."""
        nexts = {word[len(before) : len(before) + 1] for word in self.words if word.startswith(before)}
        return len(nexts) == 1 and b"" not in nexts

    def allowed(self, before: bytes, token_bytes: TokenBytes, num_tokens: int, eos: Collection[int]) -> set[int]:
        """Return the tokens below `num_tokens` that continue `before` towards some word, or end one."""
        rest = [word[len(before) :] for word in self.words if word.startswith(before)]
        found = set(eos) if b"" in rest else set()
        for token_id in range(num_tokens):
            piece = token_bytes.bytes_of(token_id)
            if piece and any(word.startswith(piece) for word in rest):
                found.add(token_id)
        return found


CODES = Language(
    r"(Not|Request|Über) (Found|Timeout|Entity)( [0-9]{2})?",
    [
        f"{first} {second}{number}"
        for first in ("Not", "Request", "Über")
        for second in ("Found", "Timeout", "Entity")
        for number in ("", *(f" {number:02}" for number in range(100)))
    ],
)


def _object(**properties: object) -> dict[str, object]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_WORD = {"type": "string", "minLength": 1, "maxLength": 12, "pattern": "^[A-Za-z ]*$"}
_DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}

BOUNDED: Mapping[str, Schema] = {
    "person": _object(
        name={"type": "string", "maxLength": 20}, age={"type": "integer", "minimum": 0, "maximum": 120}
    ),
    "label": _object(label={"enum": ["positive", "negative", "neutral"]}, sure={"type": "boolean"}),
    "point": _object(
        x={"type": "integer", "minimum": -99, "maximum": 99}, y={"type": ["integer", "null"], **_DIGIT}
    ),
    "tags": _object(tags={"type": "array", "items": _WORD, "minItems": 1, "maxItems": 4}),
    "nested": _object(user=_object(id=_DIGIT, role={"const": "admin"}), active={"type": "boolean"}),
    "date": _object(
        day={"type": "string", "format": "date"}, code={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2}$"}
    ),
    "choice": {"anyOf": [_object(yes={"type": "boolean"}), _object(no=_WORD)]},
    "pairs": {
        "type": "array",
        "items": {"type": "array", "prefixItems": [_WORD, _DIGIT], "items": False, "minItems": 2},
        "minItems": 1,
        "maxItems": 3,
    },
    "optional": {
        "type": "object",
        "properties": {
            "title": _WORD,
            "year": {"type": "integer", "minimum": 1900, "maximum": 2100},
            "seen": {"type": "boolean"},
        },
        "required": ["title"],
        "additionalProperties": False,
    },
    "tree": {
        "$defs": {
            "leaf": _object(value=_DIGIT),
            "branch": _object(left={"$ref": "#/$defs/leaf"}, right={"$ref": "#/$defs/leaf"}),
        },
        "$ref": "#/$defs/branch",
    },
}
"""Ten schemas with bounded answers, all shorter than 100 tokens."""

HOSTILE_SCHEMA: Schema = {
    "allOf": [{"type": "string", "pattern": f"[a-z]{{0,{length}}}x{length}"} for length in range(10, 30)]
}
"""Its compilation has never been seen to finish."""

HOSTILE_REGEX = "((a{0,50}b{0,50}){0,50}c?){0,50}"
"""It compiles quickly, but its states exceed any memory within a few tokens."""


def growing(beginning: int = 60) -> Grammar:
    """Return a grammar that passes every check, since it begins with many z, but then exceeds any limit."""
    return Grammar("regex", f"z{{{beginning}}}{HOSTILE_REGEX}d")
