"""The real application with its middleware, over a fake engine and a temporary home; and checks of its answers.

The home with its jobs, adapters and data sets is discarded after some hundreds of requests.
"""

import asyncio
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message

from adapters.store.store import AdapterStore
from server.api.app import create_app
from server.api.openapi import App
from server.database import FILE_NAME, connect
from server.engine.guidance import Guidance
from server.jobs.jobs import Jobs
from server.model.text.chat import PromptEncoder
from server.training.datasets import DatasetStore
from server.training.files import FileStore
from tests.kits.tiny import own, tiny_tokenizer
from tests.server.api.adapters.peft_files import peft_files
from tests.server.api.fakes import FakeEngine, http_scope, scoring
from tests.server.conftest import build_services, library_in, new_guidance
from tests.stress.fuzzing.target import OPEN

Headers = Sequence[tuple[bytes, bytes]]

KEY = "secret-of-the-operator"
ADAPTER = "tweets"
"""The adapter that exists from the start, in two versions and with the alias "prod"."""
MAX_REQUESTS = 400
"""Number of requests after which the home is replaced."""
_LEAVES_AFTER = 0.05  # seconds of silence: streams may not end
_PATIENCE = 60.0


@dataclass(frozen=True)
class Answer:
    """A response. `status` is 0 if the client disconnected first."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class BadAnswerError(Exception):
    """A response that no client should get. `where` distinguishes such findings."""

    def __init__(self, where: str, answer: Answer) -> None:
        super().__init__(where, answer)
        self.where = where


class World:
    """An event loop and its application, which is replaced from time to time."""

    def __init__(self, **settings: object) -> None:
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._root = Path(tempfile.mkdtemp(prefix="fuzzing-"))
        self._routes: list[BaseRoute] = []
        self._tokenizer = own(tiny_tokenizer())
        self._encoder = PromptEncoder(self._tokenizer)
        self._guidance: Guidance = new_guidance()
        self._num_requests = self._num_homes = 0
        (self._root / "new").mkdir()
        self._database = connect(self._root / "new")
        OPEN.callback(self.close)
        self.app = self._new()

    def close(self) -> None:
        self._database.dispose()
        self._guidance.close()
        self._loop.close()
        shutil.rmtree(self._root, ignore_errors=True)

    def call(
        self,
        method: str,
        path: str,
        headers: Headers,
        body: bytes = b"",
        query: bytes = b"",
        piece: int = 1 << 16,
        behind: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    ) -> Answer:
        """Return the response to one request whose body arrives in pieces. `behind` wraps the application in
        another one.

        Raise BadAnswerError if the server failed.
        """
        self._num_requests += 1
        if self._num_requests % MAX_REQUESTS == 0:
            self.app = self._new()
        request = _call(behind(self.app), method, path, headers, body, query, piece)
        with _errors() as errors:
            answer = self._loop.run_until_complete(asyncio.wait_for(request, _PATIENCE))
        if answer.status >= 500 or errors:
            raise BadAnswerError(f"{answer.status}, {'; '.join(errors)}", answer)
        return answer

    def _new(self) -> App:
        old, home = self._root / f"{self._num_homes}", self._root / f"{self._num_homes + 1}"
        self._num_homes += 1
        shutil.rmtree(old, ignore_errors=True)
        home.mkdir()
        shutil.copy(self._root / "new" / FILE_NAME, home)
        self._database.dispose()
        self._database = database = connect(home)
        engine = FakeEngine()
        engine.script = scoring
        jobs = Jobs(database, max_unfinished=20)
        library = library_in(home, database, AdapterStore(home / "adapters"), jobs)
        datasets, files = DatasetStore(home / "datasets"), FileStore(home / "files")
        services = build_services(
            home,
            engine,
            self._encoder,
            library,
            jobs,
            datasets,
            files,
            self._guidance,
            database,
            self._tokenizer,
            **self._settings,
        )
        app = create_app(services)
        assert isinstance(app, App)
        self._routes[:] = self._routes or app.router.routes  # computing them is slow
        app.router.routes[:] = self._routes
        for seed in range(2):
            config, tensors = peft_files(seed)
            place = home / "seed.safetensors"
            place.write_bytes(tensors)
            library.publish(ADAPTER, config, place)
        library.point(ADAPTER, "prod", 1)
        return app


def check_answer(app: App, method: str, path: str, answer: Answer) -> None:
    """Raise BadAnswerError if the OpenAPI document lacks this status, or a refusal doesn't name its cause."""
    known = statuses(app, method, path)
    if known is not None and answer.status not in known:
        raise BadAnswerError(f"{method} {path.split('/')[:3]} answers {answer.status}", answer)
    if "x-request-id" not in answer.headers:
        raise BadAnswerError("without an id", answer)
    if answer.status >= 400 and method != "HEAD" and not _is_well_formed(path, answer):
        raise BadAnswerError(f"{answer.status} in a wrong form", answer)


def _is_well_formed(path: str, answer: Answer) -> bool:
    """Return whether the refusal has its path's format, and names the bad field."""
    problem = json.loads(answer.body)
    if path == "/v1" or path.startswith("/v1/"):
        return bool(problem["error"]["message"])
    faults = problem["errors"]
    return (
        answer.headers["content-type"] == "application/problem+json"
        and problem["status"] == answer.status
        and (answer.status == 422) == bool(faults)
        and all(fault["loc"] and fault["message"] for fault in faults)
    )


def statuses(app: App, method: str, path: str) -> frozenset[int] | None:
    """Return the documented statuses of the operation, or None if there is no such operation."""
    segments = path.split("/")
    best: tuple[int, Mapping[str, Any]] | None = None
    for template, operations in app.openapi()["paths"].items():
        parts = template.split("/")
        if len(parts) != len(segments) or method.lower() not in operations:
            continue
        if all(part.startswith("{") or part == given for part, given in zip(parts, segments, strict=True)):
            literal = sum(not part.startswith("{") for part in parts)
            if best is None or literal > best[0]:
                best = literal, operations[method.lower()]["responses"]
    if best is None:
        return None
    if "4XX" in best[1]:
        return frozenset(range(200, 500))
    return frozenset(map(int, best[1]))


async def _call(
    app: ASGIApp, method: str, path: str, headers: Headers, body: bytes, query: bytes, piece: int
) -> Answer:
    sent: list[Message] = []
    at = 0
    is_whole = False

    async def receive() -> Message:
        nonlocal at, is_whole
        if is_whole:
            await asyncio.sleep(_LEAVES_AFTER)
            return {"type": "http.disconnect"}
        part = body[at : at + piece]
        at += piece
        is_whole = at >= len(body)
        return {"type": "http.request", "body": part, "more_body": not is_whole}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(http_scope(method, path, headers, query), receive, send)
    if not sent:
        assert is_whole, "no answer"
        return Answer(0, {}, b"")
    names = {name.decode("latin-1"): value.decode("latin-1") for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], names, b"".join(message.get("body", b"") for message in sent[1:]))


class _Kept(logging.Handler):
    """A log handler that keeps all records."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


@contextmanager
def _errors() -> Iterator[list[str]]:
    """Collect the errors that the API logs during the block: causes of a 500 or of an aborted stream."""
    messages: list[str] = []
    log, handler = logging.getLogger("smolora.api"), _Kept(messages)
    propagates, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield messages
    finally:
        log.removeHandler(handler)
        log.propagate = propagates
