"""The log of the server, its workers and their jobs: one line for each event, on stderr.

A line has the process's id and, while a request is handled, the request's id. Lines are text or JSON objects
(SMOLORA_LOG_FORMAT). They contain no prompts or generated texts, and line ends within a message are escaped.
uvicorn's lines have the same format.
"""

import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Literal

LogFormat = Literal["text", "json"]
Value = str | int | float

_URL_LOGGERS = ("httpx", "httpx2", "huggingface_hub.file_download", "huggingface_hub.utils._http")
"""Loggers that log URLs with their query strings, which may contain signatures."""
for _name in _URL_LOGGERS:  # at import, since a base is downloaded before `set_up`
    logging.getLogger(_name).setLevel(logging.ERROR)
_WORD = re.compile(r"[!-\[\]-~]+")  # ASCII without blanks and backslashes

NO_REQUEST = "-"
request_id: ContextVar[str] = ContextVar("request_id", default=NO_REQUEST)


class Fields:
    """A message of named values: `log.info(Fields(status=200))` logs `status=200`, or in JSON `"status": 200`."""

    def __init__(self, **values: Value) -> None:
        self.values: Mapping[str, Value] = values

    def __str__(self) -> str:
        return " ".join(f"{name}={_word(value)}" for name, value in self.values.items())


class _Formatter(logging.Formatter):
    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, **always: str) -> None:
        """Add the values `always` to every line."""
        super().__init__()
        self._always = always

    def _head(self, record: logging.LogRecord) -> Iterator[tuple[str, Value]]:
        yield "pid", record.process or 0
        yield "request", request_id.get()
        yield from self._always.items()


class LineFormatter(_Formatter):
    """Formats lines such as
    2026-01-31T12:00:00.123Z INFO smolora.api pid=7 request=4… method=GET path=/ status=200 ms=9.5 client=::1
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 logging's name
        head = " ".join(f"{name}={value}" for name, value in self._head(record))
        return f"{self.formatTime(record)} {record.levelname} {record.name} {head} {record.message}"

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\r", "\\r").replace("\n", "\\n")


class JsonFormatter(_Formatter):
    """Formats lines such as {"time": …, "level": "INFO", "logger": "smolora.api", "pid": 7, "request": "4…", …}.

    The text of messages that aren't `Fields` is in `message`; a traceback is in `exception`.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Value] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            **dict(self._head(record)),
        }
        line |= record.msg.values if isinstance(record.msg, Fields) else {"message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def place_of(error: BaseException) -> str:
    """Return an error's stack frames, the innermost first, without its message, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    return " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))


def set_up(log_format: LogFormat = "text", level: int = logging.INFO, **always: str) -> None:
    """Log everything of this process to stderr in this format, with the values `always` in every line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(**always) if log_format == "json" else LineFormatter(**always))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it logs each step of a migration
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its start-up lines repeat ours
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # clients get its warnings as errors


def is_json() -> bool:
    """Return whether this process logs JSON, so that nothing else should be written to its stderr."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def _word(value: Value) -> str:
    """Format a value as one ASCII word, so that it can't look like another field."""
    if isinstance(value, str):
        if _WORD.fullmatch(value):
            return value
        return value.encode("unicode_escape").decode().replace(" ", "\\x20") or "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
