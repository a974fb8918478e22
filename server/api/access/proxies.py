"""Paths as clients and proxies write them: in a proxy's part of its own, or after the server's whole URL."""

import re

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ABSOLUTE = re.compile(r"https?://(?P<host>[^/]+)(?P<path>/.*)?", re.IGNORECASE | re.DOTALL)
_LINK = re.compile(r"<(/[^>]*)>")


class RootPath:
    """Takes `root_path` off the paths of requests, if the proxy hasn't, and puts it before those of answers.

    Of a whole URL the host counts, whatever `Host` says.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (absolute := _ABSOLUTE.fullmatch(scope["path"])):  # RFC 9112, 3.2.2
            host = absolute["host"].encode("latin-1", "replace")
            headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
            scope = {**scope, "path": absolute["path"] or "/", "headers": [*headers, (b"host", host)]}
        if scope["type"] != "http" or not self._root_path:
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        if path == self._root_path or path.startswith(f"{self._root_path}/"):
            scope = {**scope, "path": path[len(self._root_path) :] or "/"}

        async def send_with_root(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if headers.get("location", "").startswith("/"):
                    headers["location"] = self._root_path + headers["location"]
                if "link" in headers:
                    headers["link"] = _LINK.sub(lambda found: f"<{self._root_path}{found[1]}>", headers["link"])
            await send(message)

        await self.app(scope, receive, send_with_root)
