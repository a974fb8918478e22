"""A Hugging Face hub of one adapter, owner/tweets, on this machine."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from tests.kits.fake_hub import COMMIT, HubHandler, serving

REPO = "owner/tweets"


@contextmanager
def hub_of(
    files: Mapping[str, bytes], asked: list[str], revision: str = "main", pause: float = 0
) -> Iterator[str]:
    """Serve `files` as owner/tweets with one commit, which is also `revision`; yield the endpoint.

    Each request's path and token are added to `asked`. With a `pause` in seconds, weights are sent byte by byte.
    """

    class Handler(HubHandler):
        def find(self) -> tuple[bytes | None, str]:
            path = self.path.partition("?")[0]
            asked.append(path + (self.headers.get("Authorization") or ""))
            known = (
                f"/api/models/{REPO}",
                *(f"/api/models/{REPO}/revision/{name}" for name in (revision, COMMIT)),
            )
            if path in known:
                siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
                return json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode(), ""
            known_repo = path.startswith(f"/api/models/{REPO}/")
            body = files.get(path.removeprefix(f"/{REPO}/resolve/{COMMIT}/"))
            return body, "RevisionNotFound" if known_repo else "RepoNotFound"

        def send(self, body: bytes) -> None:
            if not (pause and self.path.endswith(".safetensors")):
                super().send(body)
                return
            with suppress(ConnectionError):
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    time.sleep(pause)

    with serving(Handler) as endpoint:
        yield endpoint
