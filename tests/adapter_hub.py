"""A Hugging Face hub of one adapter, owner/tweets, on this machine."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "owner/tweets"


@contextmanager
def hub_of(files: Mapping[str, bytes], asked: list[str], revision: str = "main") -> Iterator[str]:
    """Serve `files` as owner/tweets of one commit, which is `revision`, too; yields the endpoint.

    What is asked for is added to `asked`, with the token that came with it.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path + (self.headers.get("Authorization") or ""))
            known = (
                f"/api/models/{REPO}",
                *(f"/api/models/{REPO}/revision/{name}" for name in (revision, COMMIT)),
            )
            if path in known:
                siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
                self.answer(json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode())
            elif (name := path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")) in files:
                self.answer(files[name])
            else:
                known_repo = path.startswith(f"/api/models/{REPO}/")
                self.send_response(404)
                self.send_header("X-Error-Code", "RevisionNotFound" if known_repo else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_HEAD = do_GET  # noqa: N815 (the base class's spelling)

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{self.path.rsplit("/", 1)[1]}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
