"""Encode answers as JSON: compact, in UTF-8, without NaN and infinities."""

import json
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, TypeAdapter
from starlette.responses import Response

_serializer = TypeAdapter[object](object, config=ConfigDict(ser_json_inf_nan="constants")).serializer


def _fields(answer: BaseModel) -> dict[str, object]:
    return answer.model_dump(mode="json", exclude_unset=True)


_strict = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_fields)

_LINE_ENDS = tuple((end.encode(), f"\\u{ord(end):04x}".encode()) for end in "\x85\u2028\u2029")
"""Unicode's line ends, which JSON allows unescaped, with their escapes."""


def encode(document: object) -> bytes:
    """Return the document as JSON. It may contain pydantic models, whose unset fields are left out.

    Raise ValueError if the document has NaN or infinities.
    """
    encoded = _serializer.to_json(document, exclude_unset=True)
    if b"NaN" in encoded or b"Infinity" in encoded:  # as a number, which `_strict` refuses, or in a text
        return _strict.encode(document).encode()
    return encoded


def event(document: object, name: str | None = None) -> bytes:
    """Return a server-sent event. Unicode's line ends are escaped, because httpx splits lines at them."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    data = encode(document)
    for end, escape in _LINE_ENDS:
        data = data.replace(end, escape)
    return head + b"data: " + data + b"\n\n"


def answer(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return the document as a response."""
    return Response(encode(document), status, headers=dict(headers or {}), media_type="application/json")
