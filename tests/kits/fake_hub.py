"""A fake Hugging Face hub on this machine. Handlers define its content."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubHandler(BaseHTTPRequestHandler, ABC):
    """Answers GET and HEAD by `find`."""

    @abstractmethod
    def find(self) -> tuple[bytes | None, str]:
        """Return the body of `path`, or None and the hub's error code."""

    def do_GET(self) -> None:
        body, error = self.find()
        self.send_response(404 if body is None else 200)
        if body is None:
            self.send_header("X-Error-Code", error)
        else:
            self.send_header("ETag", f'"{self.path.rsplit("/", 1)[1]}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command == "GET" and body:
            self.send(body)

    def send(self, body: bytes) -> None:
        """Write the body of a GET."""
        self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 (the base class's spelling)

    def log_message(self, *args: object) -> None:
        """Log nothing."""


@contextmanager
def serving(handler: type[HubHandler]) -> Iterator[str]:
    """Run a hub, and yield its endpoint."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
