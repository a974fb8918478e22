"""Behind a proxy that gives the server a part of its own paths."""

import re

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LINK = re.compile(r"<(/[^>]*)>")


class RootPath:
    """Takes `root_path` off the paths of requests, where the proxy hasn't, and puts it before those of answers."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
