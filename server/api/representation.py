"""Long answers in JSON, and metrics: compressed, and answered with 304 if the client already has the same one.

Streams and short answers aren't touched. The length of a compressed answer can leak a secret next to an attacker's
text. No answer has both.
"""

import gzip
import hashlib
import re
from collections.abc import Set

from anyio import to_thread
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message

from server.metrics.metrics import CONTENT_TYPE as METRICS

MIN_BYTES = 1024
_LARGE_BYTES = 64 << 10  # hashed and compressed in a thread: a megabyte takes about 10 ms
_LEVEL = 1  # level 6 takes three times as long, and saves a seventh of the bytes
_GZIP = re.compile(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))")
_TYPES = ("application/json", "application/problem+json", METRICS)


def is_compactable(headers: Headers) -> bool:
    """Return whether a response with these headers is JSON or metrics, at least `MIN_BYTES` long."""
    length = headers.get("content-length", "")
    is_long = length.isdecimal() and int(length) >= MIN_BYTES and "content-encoding" not in headers
    return is_long and headers.get("content-type") in _TYPES


async def compact(asked: Headers, method: str, start: Message, body: Message) -> None:
    """Compress a response in place if the request, with the headers `asked`, accepts that.

    A GET gets an ETag and, if `asked` has the same one, 304 without a body. `start` and `body` are all of the
    response's messages.
    """
    headers, content = MutableHeaders(scope=start), body["body"]
    headers.add_vary_header("Accept-Encoding")
    has_etag = start["status"] == 200 and method in ("GET", "HEAD")
    known = {one.strip().removeprefix("W/") for one in asked.get("if-none-match", "").split(",")}
    is_gzip = _GZIP.search(asked.get("accept-encoding", "")) is not None
    work = (content, has_etag, known, is_gzip)
    etag, sent = await to_thread.run_sync(_compacted, *work) if len(content) > _LARGE_BYTES else _compacted(*work)
    if etag is not None:
        headers["ETag"] = f"W/{etag}"  # weak, since the same answer has other bytes when it is compressed
    if sent is None:
        start["status"], body["body"] = 304, b""
        del headers["content-length"], headers["content-type"]
    elif is_gzip:
        body["body"] = sent
        headers["Content-Encoding"] = "gzip"
        headers["Content-Length"] = str(len(sent))


def _compacted(content: bytes, has_etag: bool, known: Set[str], is_gzip: bool) -> tuple[str | None, bytes | None]:
    """Return the ETag, or None if there is none; and the body to send, or None if its ETag is one of `known`."""
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"' if has_etag else None
    if etag is not None and not known.isdisjoint((etag, "*")):
        return etag, None
    return etag, gzip.compress(content, _LEVEL, mtime=0) if is_gzip else content
