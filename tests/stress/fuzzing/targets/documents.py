"""Bodies and queries of every operation in the OpenAPI document: generated from its schemas, with faults, or any
bytes."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from server.api.openapi import App
from tests.stress.fuzzing.app import ADAPTER, KEY, MAX_REQUESTS, World, check_answer
from tests.stress.fuzzing.choices import Choices, encoded
from tests.stress.fuzzing.target import Target

VALUES: Mapping[str, Sequence[object]] = {
    "model": (ADAPTER, "tiny-llama", "base", f"{ADAPTER}@prod*0.5", f"{ADAPTER}@9", "no/one", 7),
    "adapter": (ADAPTER, "base", None, f"{ADAPTER}@1*0.5+{ADAPTER}", f"{ADAPTER}@nope", "a+", ""),
    "expression": (f"{ADAPTER}*0.5", f"{ADAPTER}@1+{ADAPTER}@2*-1", "base", "a*"),
    "name": ("new", ADAPTER, "base", "x" * 65, "a/b"),
    "role": ("user", "system", "assistant", "tool"),
    "max_tokens": (1, 8, 0, 97, 1 << 40),
    "min_tokens": (0, 1, 8, 97),
    "stop_token_ids": ([2], [5, 1 << 30], [], [-1]),
    "choice": (["a", "ab"], ["("], [], ["a" * 9000]),
    "tokens": ([1, 2], [511], [1 << 30], [True]),
    "n": (1, 2, 16, 17),
    "regex": ("[ab]+", "a{3}", "(", "", "a" * 9000),
    "schema": ({"type": "object"}, {"type": "string"}, {}, {"$ref": "#"}, {"not": {}}, {"enum": [1]}),
    "stop": ("a", ["a", "b"], [], "", ["x"] * 17),
    "training_file": ("file-abc", "", 1),
    "data": (
        [{"prompt": "a", "completion": "b"}],
        [{"text": "a b c"}],
        [{"instruction": "a", "output": "b"}],
        [{"conversations": [{"from": "gpt", "value": "a"}]}],
        [{"prompt": [], "completion": [{"role": "assistant", "content": "a"}]}],
        [],
        [{"text": 1}],
        [{}],
        None,
    ),
    "dataset": ("ds-" + "0" * 32, "ds-", ""),
    "scopes": (["generate"], ["train", "generate"], [], ["root"]),
    "visibility": ("public", "private", ""),
}
"""Values by field name that schemas can't express."""
PARTS = (
    ADAPTER,
    "new",
    "1",
    "2",
    "prod",
    "latest",
    "default",
    "job-1",
    "ds-" + "0" * 32,
    "é",
    "a%2Fb",
    "x" * 300,
    "0",
)
KINDS = (
    b"application/json",
    b"text/plain",
    b"application/json; charset=utf-16",
    b"",
    b"multipart/form-data; boundary=x",
)
_DEPTH = 5


@dataclass(frozen=True)
class Operation:
    """An operation of the document."""

    method: str
    path: str  # with {names} in it
    queries: Sequence[str]
    schema: Mapping[str, Any] | None  # of its JSON body


@functools.cache
def world() -> World:
    return World(api_keys=(KEY,))


@functools.cache
def operations() -> tuple[Operation, ...]:
    """Return the operations, those with a JSON body first and twice."""
    app: App = world().app
    found: list[Operation] = []
    for path, methods in sorted(app.openapi()["paths"].items()):
        for method, operation in sorted(methods.items()):
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            queries = [
                parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "query"
            ]
            found.append(Operation(method.upper(), path, queries, None if content is None else content["schema"]))
    with_body = [operation for operation in found if operation.schema is not None]
    return (*with_body, *with_body, *found)


def run(data: bytes) -> str:
    choices = Choices(data)
    operation = choices.pick(operations())
    path = "/".join(
        choices.text().encode("utf-8", "replace").decode()
        if choices.one_in(24)
        else choices.pick(PARTS)
        if part.startswith("{")
        else part
        for part in operation.path.split("/")
    )
    kind = choices.pick(KINDS) if choices.one_in(32) else KINDS[0]
    if operation.schema is None:
        body = choices.some() if choices.one_in(16) else b""
    elif choices.one_in(8):
        body = choices.rest
    else:
        body = encoded(_value(choices, operation.schema, "", _DEPTH), choices)
    query = b""
    for name in operation.queries:
        if choices.one_in(2):
            text = choices.text() if choices.one_in(2) else choices.pick(("1", "true", "a", "0", "-1", ADAPTER))
            query += b"&%s=%s" % (name.encode(), quote(text, errors="surrogatepass").encode())
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), (b"host", b"localhost")]
    headers.append((b"authorization", b"Bearer " + KEY.encode()))
    if choices.one_in(8):
        headers.append((b"idempotency-key", choices.some()))
    answer = world().call(operation.method, path, headers, body, query[1:])
    if answer.status:
        check_answer(world().app, operation.method, path, answer)
    return f"{answer.status}"


def _value(choices: Choices, schema: Mapping[str, Any], name: str, depth: int) -> object:
    """Return a value that the schema mostly allows."""
    if choices.one_in(24) or depth == 0:
        return choices.json(2)
    if name in VALUES and choices.below(4):
        return choices.pick(VALUES[name])
    if "$ref" in schema:
        return _value(choices, _resolved(schema["$ref"]), name, depth)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return _value(choices, choices.pick(schema[key]), name, depth)
    if "const" in schema or "enum" in schema:
        return choices.pick(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "object":
        return _object(choices, schema, depth)
    if kind == "array":
        items = schema.get("items", {})
        return [_value(choices, items, name, depth - 1) for _ in range(1 + choices.below(3))]
    if kind == "string":
        return choices.text() if choices.one_in(2) else choices.pick(("a", "b c", "1"))
    if kind in ("integer", "number"):
        low, high = schema.get("minimum", 0), schema.get("maximum", 9)
        return choices.pick((low, high, 1, low - 1, high + 1, 0.5))
    if kind == "boolean":
        return bool(choices.below(2))
    return None if kind == "null" else choices.json(2)


def _object(choices: Choices, schema: Mapping[str, Any], depth: int) -> object:
    properties, required = schema.get("properties", {}), schema.get("required", ())
    made: dict[str, object] = {}
    for name, inner in properties.items():
        if (name in required and not choices.one_in(32)) or choices.one_in(3):
            made[name] = _value(choices, inner, name, depth - 1)
    if not properties or choices.one_in(24):
        made[choices.name()] = choices.json(2)
    return made


def _resolved(ref: str) -> Mapping[str, Any]:
    found = world().app.openapi()["components"]["schemas"][ref.rpartition("/")[2]]
    assert isinstance(found, dict)
    return found


def seeds() -> list[bytes]:
    """Return each operation with inputs of zeros and ones, and with valid bodies."""
    found: list[bytes] = []
    for number, operation in enumerate(operations()):
        found += [bytes([number]) + bytes(40), bytes([number]) + bytes([0, 1, 2, 3] * 24)]
        if operation.path in BODIES:
            found.append(_raw(number, operation, json.dumps(BODIES[operation.path]).encode()))
    return found


def _raw(number: int, operation: Operation, body: bytes) -> bytes:
    """Return the input that sends this body."""
    parts = b"\0\0" * operation.path.count("{")
    return bytes([number]) + parts + b"\0" + b"\x07" + body


BODIES: Mapping[str, object] = {
    "/generate": {"prompt": "a", "adapter": ADAPTER, "max_tokens": 2, "n": 2, "logprobs": 2, "stop": ["b"]},
    "/compare": {"prompt": "a", "adapters": [ADAPTER, "base"], "max_tokens": 2},
    "/train": {"name": "new", "data": [{"prompt": "a", "completion": "b"}] * 4},
    "/compositions/{name}": {"expression": f"{ADAPTER}*0.5"},
    "/v1/chat/completions": {"model": ADAPTER, "messages": [{"role": "user", "content": "a"}], "stream": True},
    "/v1/completions": {"model": ADAPTER, "prompt": ["a", "b"], "max_tokens": 2},
    "/adapters/{name}/aliases/{alias}": {"version": 1},
}

TARGET = Target(
    run,
    seeds,
    num_before=MAX_REQUESTS,
    max_len=2048,
    words=(
        b'{"',
        b'": ',
        b"[]",
        b"{}",
        b"null",
        b"1e999",
        b"NaN",
        b"\\ud800",
        b"-0",
        b"[[[[",
        b'"prompt"',
        b'"messages"',
    ),
)
