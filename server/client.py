"""A client of a running server, over HTTP: what the command line is made of, and scripts may use.

Blocking and small: one method for each thing to do, plain JSON in and out. What the server refuses, and a server
that can't be reached, raise ClientError with a line for people.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Self, TypedDict, Unpack, cast
from urllib.parse import quote

import httpx

from adapters.errors import sentence
from server.config import is_loopback

ENDED = frozenset({"succeeded", "failed", "cancelled"})

_CONNECT_SECONDS = 10.0
_ANSWER_SECONDS = 600.0
_SILENCE_SECONDS = 60.0  # of a stream of events, which sends keep-alives
_RETRIES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # a server that is started again is back by then

_PEFT_FILES = {"adapter_config": "adapter_config.json", "adapter_model": "adapter_model.safetensors"}

Document = dict[str, object]


class _Options(TypedDict, total=False):
    """What a request may have, as httpx takes it."""

    json: Mapping[str, object]
    params: Mapping[str, str]
    headers: Mapping[str, str]
    files: Mapping[str, tuple[str, BinaryIO]]
    timeout: httpx.Timeout


class ClientError(Exception):
    """The server said no, or nothing. `status` is HTTP's, None where there was no answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status

    @property
    def may_pass(self) -> bool:
        """Whether the server may be back in a moment."""
        return self.status in (None, 502, 503, 504)


class Client:
    """A connection to the server at `url`; close it, or use it in a `with`."""

    def __init__(self, url: str, api_key: str | None = None, retries: tuple[float, ...] = _RETRIES) -> None:
        """`retries` are the seconds to wait before each new attempt, where one helps. Raises ClientError."""
        self.url = url.rstrip("/")
        self._retries = retries
        try:
            parts = httpx.URL(url)
            if parts.scheme not in ("http", "https") or not parts.host:
                raise httpx.InvalidURL("no scheme or host")
            self._http = httpx.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
                timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
                trust_env=not is_loopback(parts.host),  # no proxy leads back here
            )
        except (httpx.InvalidURL, UnicodeError):
            raise ClientError(f"{url} is no address of a server, such as http://127.0.0.1:8000") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def upload(self, path: Path) -> Document:
        """Store the rows of a JSONL or CSV file; the data set. Raises OSError where it can't be read."""
        with path.open("rb") as file:
            return self._json("POST", "/datasets", files={"file": (path.name, file)})

    def train(self, body: Mapping[str, object], dry_run: bool = False) -> Document:
        """Submit a job; how it stands. Where the answer gets lost it is asked for again: there is one job only."""
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        params = {"dry_run": "true"} if dry_run else {}

        def post() -> Document:
            return self._json("POST", "/train", json=dict(body), headers=headers, params=params)

        try:
            return post()
        except ClientError as error:
            if error.status is not None or isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout):
                raise
        return self._again(post)

    def job(self, job_id: str) -> Document:
        """How the job stands."""
        return self._json("GET", _path("train", job_id))

    def report(self, job_id: str) -> Document:
        """The card of a job that has succeeded."""
        return self._json("GET", _path("train", job_id, "report"))

    def jobs(self, status: str | None = None, limit: int = 100) -> list[Document]:
        """The newest jobs first."""
        params = {"limit": str(limit)} | ({"status": status} if status else {})
        return _documents(self._json("GET", "/train", params=params), "jobs")

    def steer(self, job_id: str, move: str) -> Document:
        """`cancel`, `pause` or `resume` the job; how it stands then."""
        return self._json("POST", _path("train", job_id, move))

    def remove_files(self, job_id: str) -> None:
        """Remove an ended job's rows, checkpoints, model and log."""
        with self._open("DELETE", _path("train", job_id)) as response:
            response.read()

    def events(self, job_id: str, after: int = 0) -> Iterator[Document]:
        """The job's events as they happen, until it has ended. A connection that breaks is made again."""
        last, num_failures = after, 0
        while True:
            try:
                for event in self._stream_events(job_id, last):
                    last, num_failures = cast("int", event["seq"]), 0
                    yield event
                if self.job(job_id)["status"] in ENDED:
                    return
            except ClientError as error:
                if not error.may_pass or num_failures == len(self._retries):
                    raise
                num_failures += 1
            time.sleep(self._retries[max(0, num_failures - 1)])

    def adapters(self) -> Iterator[Document]:
        """All adapters by name, with their versions."""
        after: str | None = ""
        while after is not None:
            page = self._json("GET", "/adapters", params={"limit": "500", "after": after})
            yield from _documents(page, "adapters")
            after = cast("str | None", page["next"])

    def publish(self, name: str, path: Path) -> Document:
        """Publish the adapter in a folder that PEFT saved, or in a zip of it; the version. OSError likewise."""
        with ExitStack() as opened:
            if path.is_dir():
                parts = {field: path / name for field, name in _PEFT_FILES.items()}
            else:
                parts = {"archive": path}
            files = {field: (file.name, opened.enter_context(file.open("rb"))) for field, file in parts.items()}
            return self._json("POST", _path("adapters", name), files=files)

    def import_adapter(self, name: str, repo_id: str, revision: str | None = None) -> Document:
        """Have the server publish an adapter of the hub; the version."""
        body = {"repo_id": repo_id, "revision": revision}
        return self._json("POST", _path("adapters", name, "import"), json=body)

    def generate(self, body: Mapping[str, object]) -> Document:
        """The whole answer."""
        return self._json("POST", "/generate", json=dict(body))

    def compare(self, body: Mapping[str, object]) -> Document:
        """The answers under each of several adapter expressions."""
        return self._json("POST", "/compare", json=dict(body))

    def stream(self, body: Mapping[str, object]) -> Iterator[Document]:
        """The answer's events as they come; a failure midway raises ClientError."""
        with self._open("POST", "/generate", json={**body, "stream": True}) as response:
            for name, data in _server_sent(response.iter_lines()):
                if data == "[DONE]":
                    return
                document = cast("Document", json.loads(data))
                if name == "error":
                    raise ClientError(str(document.get("detail")), cast("int", document.get("status")))
                yield document
        raise ClientError("the answer broke off")

    def _stream_events(self, job_id: str, after: int) -> Iterator[Document]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        timeout = httpx.Timeout(_SILENCE_SECONDS, connect=_CONNECT_SECONDS)
        with self._open("GET", _path("train", job_id, "events"), headers=headers, timeout=timeout) as response:
            for name, data in _server_sent(response.iter_lines()):
                if name != "error":  # then the stream ends, and is opened again
                    yield json.loads(data)

    def _again(self, work: Callable[[], Document]) -> Document:
        """The work's result, as soon as the server is back."""
        for wait in self._retries:
            time.sleep(wait)
            try:
                return work()
            except ClientError as error:
                if not error.may_pass:
                    raise
        return work()

    def _json(self, method: str, path: str, **options: Unpack[_Options]) -> Document:
        with self._open(method, path, **options) as response:
            response.read()
            try:
                return cast("Document", response.json())
            except ValueError:
                raise ClientError(f"{self.url} doesn't speak smolora's API") from None

    @contextmanager
    def _open(self, method: str, path: str, **options: Unpack[_Options]) -> Iterator[httpx.Response]:
        """The response once its headers are there. Raises ClientError, also for what fails while it is read."""
        try:
            with self._http.stream(method, path, **options) as response:
                if response.is_error:
                    response.read()
                    raise ClientError(_reason(response), response.status_code)
                yield response
        except httpx.TimeoutException as error:
            raise ClientError(f"{self.url} doesn't answer") from error
        except httpx.TransportError as error:
            raise ClientError(f"can't reach {self.url}: {error or type(error).__name__}") from error
        except ValueError as error:  # NaN, or half a character, among them
            raise ClientError(f"it can't be said in JSON: {error}") from error


def _path(*parts: str) -> str:
    return "".join(f"/{quote(part, safe='')}" for part in parts)


def _documents(page: Document, name: str) -> list[Document]:
    return cast("list[Document]", page[name])


def _server_sent(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """(name, data) of each server-sent event; comments are left out."""
    name, data = "message", ""
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data += value
        elif not line and data:
            yield name, data
            name, data = "message", ""


def _reason(response: httpx.Response) -> str:
    """A problem in a line or several: each error with its place."""
    try:
        problem = response.json()
        lines = [sentence(error["loc"], error["message"]) for error in problem["errors"]]
        return "\n".join(lines) or str(problem["detail"])
    except (ValueError, LookupError, TypeError):
        return f"{response.url.host} answered {response.status_code} {response.reason_phrase}"
