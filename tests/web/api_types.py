"""Write `server/web/api.d.ts`, the types of the API's answers, from the OpenAPI document:
`python -m tests.web.api_types`, after a change of an answer that the page reads."""

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI

from server.api.app import ROUTERS
from tests.web.vendor import ROOT

FILE = ROOT / "server" / "web" / "api.d.ts"
READ = (
    "DatasetAnswer",
    "DatasetRows",
    "DryRunAnswer",
    "EventAnswer",
    "JobAnswer",
    "KeyAnswer",
    "OwnKeyAnswer",
    "ProjectAnswer",
)
"""The schemas that the page reads, apart from those that they contain."""
_HEAD = "/** Answers of the API, generated from its OpenAPI document by tests/web/api_types.py. */\n"
_SIMPLE = {"string": "string", "integer": "number", "number": "number", "boolean": "boolean", "null": "null"}

Schema = Mapping[str, Any]


def written() -> str:
    """Return the declarations of the schemas that the page reads, and of those that they contain."""
    app = FastAPI()
    for router in ROUTERS:
        app.include_router(router)
    schemas = app.openapi()["components"]["schemas"]
    names = _with_contained(READ, schemas)
    return _HEAD + "".join(f"\ninterface {name} {_type_of(schemas[name], '')}\n" for name in sorted(names))


def _with_contained(names: Iterable[str], schemas: Mapping[str, Schema]) -> set[str]:
    found, ahead = set[str](), list(names)
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead += [_name_of(reference) for reference in _references(schemas[name])]
    return found


def _references(value: object) -> Iterable[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "$ref":
                yield inner
            else:
                yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def _name_of(reference: str) -> str:
    return reference.rpartition("/")[2]


def _type_of(schema: Schema, indent: str) -> str:
    """Return the TypeScript type of a JSON schema. `indent` is that of the line on which it begins."""
    if "$ref" in schema:
        return _name_of(schema["$ref"])
    if "enum" in schema:
        return " | ".join(f'"{value}"' for value in schema["enum"])
    if "const" in schema:
        value = schema["const"]
        return f'"{value}"' if isinstance(value, str) else str(value).lower()
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(_type_of(one, indent) for one in schema["anyOf"]))
    if schema.get("type") == "array":
        inner = _type_of(schema["items"], indent)
        return f"({inner})[]" if " | " in inner else f"{inner}[]"
    if schema.get("type") == "object":
        return _object_of(schema, indent)
    return _SIMPLE.get(str(schema.get("type")), "any")


def _object_of(schema: Schema, indent: str) -> str:
    if "properties" not in schema:
        more = schema.get("additionalProperties", True)
        return f"Record<string, {'any' if more is True else _type_of(more, indent)}>"
    lines = []
    for name, inner in schema["properties"].items():
        sign = "" if name in schema.get("required", ()) else "?"
        if "description" in inner:
            lines.append(f"/** {inner['description']} */")
        lines.append(f"{name}{sign}: {_type_of(inner, indent + '  ')};")
    if schema.get("additionalProperties") is True:
        lines.append("[name: string]: any;")
    return "{\n" + "".join(f"{indent}  {line}\n" for line in lines) + f"{indent}}}"


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
