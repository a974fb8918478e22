"""JSON Schemas as they are walked and put in other words before llguidance reads them.

Leaves to `grammar` what is refused. Formats of days and times are spelt out here: llguidance's own also take days
that the calendar hasn't (2023-02-29, 0000-01-01) and leap seconds at any time, which readers of answers don't.
"""

from collections.abc import Iterator, Mapping

_MAPS = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
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


def nodes(schema: object) -> Iterator[tuple[str, dict[str, object]]]:
    """Each schema inside the document, itself first, and its place as a JSON pointer (RFC 6901) after `#`. Objects
    under unknown keywords count as schemas, for a `$ref` may name them."""
    todo = [("#", schema, False)]
    while todo:
        place, node, is_map = todo.pop()
        if isinstance(node, list):
            todo += [(f"{place}/{number}", part, False) for number, part in reversed([*enumerate(node)])]
        if not isinstance(node, dict):
            continue
        if not is_map:
            yield place, node
        for key, part in reversed(node.items()):
            if is_map or key not in _VALUES:
                todo.append((f"{place}/{_escaped(key)}", part, not is_map and key in _MAPS))


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


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
