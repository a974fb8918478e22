"""A connection to a server: requests, retries, error messages and server-sent events."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO, Self, TypedDict, Unpack, cast
from urllib.parse import quote
from urllib.request import getproxies, proxy_bypass

import httpx

from adapters.errors import Hint, sentence
from server.config import is_loopback
from server.system.messages import program

_URL_VARIABLE = "SMOLORA_URL"
CONNECT_SECONDS = 10.0
_ANSWER_SECONDS = 600.0
_RETRIES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # together longer than a server's restart takes

_NO_KEY = (
    "the API key (SMOLORA_API_KEY, --api-key) has characters that no key has, such as blanks or line ends: "
    "give it as it was shown when it was created"
)
_PROXY_VARIABLES = "the proxy variables (ALL_PROXY, HTTP_PROXY, HTTPS_PROXY, NO_PROXY)"

Document = dict[str, object]


class Options(TypedDict, total=False):
    """Arguments of a request, as httpx takes them."""

    json: Mapping[str, object]
    params: Mapping[str, str]
    headers: Mapping[str, str]
    files: Mapping[str, tuple[str, BinaryIO]]
    timeout: httpx.Timeout


class ClientError(Exception):
    """The server refused a request or didn't answer. `status` is its HTTP status, or None without an answer."""

    def __init__(self, message: str, status: int | None = None, hint: Hint | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.hint = hint

    @property
    def may_pass(self) -> bool:
        """Return whether a retry may succeed."""
        return self.status in (None, 502, 503, 504)


class Connection:
    """A connection to the server at `url`. Close it, or use it in a `with` statement."""

    def __init__(self, url: str, api_key: str | None = None, retries: tuple[float, ...] = _RETRIES) -> None:
        """`retries`: seconds to wait before each retry. Raise ClientError if the URL or the key is invalid."""
        self.url = url.rstrip("/")
        self.retries = retries
        try:
            parts = httpx.URL(url)
            if parts.scheme not in ("http", "https") or not parts.host:
                raise httpx.InvalidURL("no scheme or host")
        except (httpx.InvalidURL, UnicodeError):
            raise ClientError(f"{url} is not a server's address, such as http://127.0.0.1:8000") from None
        if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise ClientError(_NO_KEY)  # the message may be logged, so it omits the key
        uses_proxies = not is_loopback(parts.host)  # a proxy can't reach this machine's loopback
        self._uses_proxy = uses_proxies and _has_proxy(parts)
        try:
            self._http = httpx.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
                timeout=httpx.Timeout(_ANSWER_SECONDS, connect=CONNECT_SECONDS),
                trust_env=uses_proxies,
            )
        except (httpx.InvalidURL, ValueError, ImportError) as error:  # ImportError: a SOCKS proxy needs a package
            raise ClientError(f"{_PROXY_VARIABLES} of the environment can't be used: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def again(self, work: Callable[[], Document]) -> Document:
        """Retry `work`, waiting as long as `retries` says, until it succeeds, and return its result.

        Raise ClientError if the last retry fails, or if a retry fails with an error that no retry can solve.
        """
        for wait in self.retries:
            time.sleep(wait)
            try:
                return work()
            except ClientError as error:
                if not error.may_pass:
                    raise
        return work()

    def json(self, method: str, path: str, **options: Unpack[Options]) -> Document:
        with self.open(method, path, **options) as response:
            response.read()
            try:
                return cast("Document", response.json())
            except ValueError:
                raise self.another_server() from None

    def parsed(self, data: str) -> Document:
        """Return the document of a server-sent event. Raise ClientError if it isn't JSON."""
        try:
            return cast("Document", json.loads(data))
        except ValueError:
            raise self.another_server() from None

    def another_server(self) -> ClientError:
        """Return the error for an answer that isn't smolora's."""
        return ClientError(f"{self.url} doesn't speak smolora's API")

    def nothing(self, method: str, path: str, **options: Unpack[Options]) -> None:
        with self.open(method, path, **options) as response:
            response.read()

    @contextmanager
    def open(self, method: str, path: str, **options: Unpack[Options]) -> Iterator[httpx.Response]:
        """Send a request and yield the response before its body is read.

        Raise ClientError if the request is refused, or if sending it or reading the response fails.
        """
        try:
            with self._http.stream(method, path, **options) as response:
                if response.is_error:
                    response.read()
                    raise _refused(response, self.url)
                if response.has_redirect_location:  # not followed: another server mustn't get the key
                    place = response.headers["Location"]
                    raise ClientError(
                        f"{self.url} redirects to {place}: set {_URL_VARIABLE}, or --url, to that address"
                    )
                yield response
        except httpx.TimeoutException as error:
            raise ClientError(f"{self.url} doesn't answer") from error
        except httpx.TransportError as error:
            cause = str(error).rpartition("] ")[2] or type(error).__name__
            reason = f"can't reach {self.url}: {cause}"
            if isinstance(error, httpx.ConnectError):
                reason += f"; is it running? `{program()} serve` starts it"
                reason += f"; if it listens elsewhere, set {_URL_VARIABLE} or SMOLORA_PORT, or give --url"
                if self._uses_proxy:
                    reason += f"; the request went through a proxy, because {_PROXY_VARIABLES} are set"
            raise ClientError(reason) from error
        except ValueError as error:  # the body has NaN or a lone surrogate
            raise ClientError(f"the request can't be written as JSON: {error}") from error


def _has_proxy(url: httpx.URL) -> bool:
    """Return whether the environment has a proxy for this URL."""
    proxies = getproxies()
    return bool(proxies.get(url.scheme) or proxies.get("all")) and not proxy_bypass(url.host)


def path_of(*parts: str) -> str:
    """Escape the parts, and join them to a URL path. Raise ClientError if a part is empty, `.` or `..`."""
    for part in parts:
        if part in ("", ".", ".."):
            raise ClientError(f'"{part}" names nothing')
    return "".join(f"/{quote(part, safe='')}" for part in parts)


def server_sent(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and data of each server-sent event. Comments are skipped."""
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


def _refused(response: httpx.Response, base_url: str) -> ClientError:
    """Return the error for a refusal.

    Its message has a line for each invalid field or, if there are none, is the field `detail` of the answer. If
    the answer isn't smolora's, the message has only the host and the status.
    """
    status = response.status_code
    try:
        problem = response.json()
        lines = [sentence(error["loc"], error["message"]) for error in problem["errors"]]
        hint = problem.get("hint") and Hint(problem["hint"]["code"], problem["hint"]["text"])
        message = "\n".join(lines) or str(problem["detail"])
    except (ValueError, LookupError, TypeError):
        hint = None
        message = f"{response.url.host} answered {status} {response.reason_phrase}"
        if base_url.endswith("/v1"):
            message += f"; leave /v1 out of {_URL_VARIABLE} or --url: it is for OpenAI's clients"
    wait = response.headers.get("Retry-After", "")
    if status == httpx.codes.TOO_MANY_REQUESTS and wait.isdecimal():
        message += f"; try again in {wait} s"
    return ClientError(message, status, hint)
