"""Long JSON answers: compressed, and answered with 304 if the client already has the same one.

Streams and short answers aren't touched. By its length, a compressed answer tells what it repeats; but no answer
has both a secret and another client's text.
"""

import gzip
import hashlib
import re

from anyio import to_thread
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message

MIN_BYTES = 1024
_LARGE_BYTES = 64 << 10  # compressed in a thread: a megabyte takes about 10 ms
_LEVEL = 1  # level 6 takes three times as long, and saves a seventh of the bytes
_GZIP = re.compile(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))")
_JSON = ("application/json", "application/problem+json")


def is_long_json(headers: Headers) -> bool:
    """Return whether a response with these headers is JSON of at least `MIN_BYTES`, whose length is known."""
    length = headers.get("content-length", "")
    is_long = length.isdecimal() and int(length) >= MIN_BYTES and "content-encoding" not in headers
    return is_long and headers.get("content-type") in _JSON


async def compact(asked: Headers, method: str, start: Message, body: Message) -> None:
    """Compress a response in place if the request, with the headers `asked`, accepts that.

    A GET gets an ETag and, if `asked` has the same one, 304 without a body. `start` and `body` are all of the
    response's messages.
    """
    headers, content = MutableHeaders(scope=start), body["body"]
    headers.add_vary_header("Accept-Encoding")
    if start["status"] == 200 and method in ("GET", "HEAD"):
        # weak, since the same answer has other bytes when it is compressed
        headers["ETag"] = etag = f'W/"{hashlib.sha256(content).hexdigest()[:32]}"'
        known = {one.strip().removeprefix("W/") for one in asked.get("if-none-match", "").split(",")}
        if not known.isdisjoint((etag.removeprefix("W/"), "*")):
            start["status"], body["body"] = 304, b""
            del headers["content-length"], headers["content-type"]
            return
    if _GZIP.search(asked.get("accept-encoding", "")):
        packed = await to_thread.run_sync(_packed, content) if len(content) > _LARGE_BYTES else _packed(content)
        body["body"] = packed
        headers["Content-Encoding"] = "gzip"
        headers["Content-Length"] = str(len(packed))


def _packed(content: bytes) -> bytes:
    return gzip.compress(content, _LEVEL, mtime=0)
