"""JSON Schemas as they are walked and put in other words before llguidance reads them.

Leaves to `grammar` what is refused. Formats of days and times are spelt out here: llguidance's own also take days
that the calendar hasn't (2023-02-29, 0000-01-01) and leap seconds at any time, which readers of answers don't.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import unquote

_MAPS = frozenset({"properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions"})
"""Keywords whose keys are names, and whose values are schemas."""
_VALUES = frozenset({"const", "enum", "default", "example", "examples"})
"""Keywords that hold values, in which nothing is a keyword."""

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
    **{f"uuid{version}": f"^{_UUID.format(version)}$" for version in range(1, 9)},  # Pydantic's
}
_ANY_STRING = frozenset({"password", "binary", "path"})  # OpenAPI's and Pydantic's, which restrict nothing


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node is in the document; written out only when told, for a key may be as long as the document."""

    parent: "Place | None"
    key: str | int

    def __str__(self) -> str:
        """A JSON pointer (RFC 6901) after `#`."""
        keys: list[str] = []
        place = self
        while place.parent is not None:
            keys.append(str(place.key).replace("~", "~0").replace("/", "~1"))
            place = place.parent
        return "/".join(["#", *reversed(keys)])


def nodes(schema: object) -> Iterator[tuple[Place, dict[str, object]]]:
    """Each schema inside the document, itself first, and its place. Objects under unknown keywords count as
    schemas, for a `$ref` may name them."""
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
    """Whether what this `$ref` names, if anything, counts as a schema to `nodes`: not as a value, nor as a map of
    schemas. The keys of its pointer tell, whichever schema they begin in; anchors are found in schemas alone."""
    is_map = False
    for key in unquote(ref.partition("#")[2]).split("/")[1:]:
        if not is_map and key in _VALUES:
            return False
        is_map = not is_map and key in _MAPS
    return not is_map


def spell_out(schema: object) -> None:
    """Change the schema in place: formats become patterns, and what restricts nothing is left out."""
    for _, node in nodes(schema):
        if node.get("uniqueItems") is False:
            del node["uniqueItems"]
        form = node.get("format")
        if not isinstance(form, str):
            continue
        if form in _PATTERNS:
            both = node.setdefault("allOf", [])  # it may have a pattern of its own
            if isinstance(both, list):
                both.append({"pattern": _PATTERNS[form]})
        if form in _PATTERNS or form in _ANY_STRING:
            del node["format"]
