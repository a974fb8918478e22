"""JSON as it goes over the wire: compact, UTF-8, and only what JSON has."""

import json
from collections.abc import Mapping

from pydantic_core import to_json
from starlette.responses import Response

_strict = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


_LINE_ENDS = tuple((end.encode(), f"\\u{ord(end):04x}".encode()) for end in "\x85\u2028\u2029")
"""Of Unicode, which JSON doesn't escape, and its escapes of them."""


def encode(document: object) -> bytes:
    """The document's bytes. Raises ValueError on NaN and infinities, which JSON does not have."""
    encoded = to_json(document, inf_nan_mode="constants")
    if b"NaN" in encoded or b"Infinity" in encoded:  # as a number, or only in a text
        return _strict.encode(document).encode()
    return encoded


def event(document: object, name: str | None = None) -> bytes:
    """One server-sent event, whose data is one line, also to readers that know Unicode's line ends (httpx's)."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    data = encode(document)
    for end, escape in _LINE_ENDS:
        data = data.replace(end, escape)
    return head + b"data: " + data + b"\n\n"


def answer(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """The document as a response."""
    return Response(encode(document), status, headers=dict(headers or {}), media_type="application/json")
