"""The log of every process of ours, the server, its workers and their jobs: one line for each event, on stderr.

A line has the process it comes from and the id of the request it belongs to, if any. None holds a prompt or a
generated text, and line ends within a message are escaped. What uvicorn says looks the same.
"""

import logging
import sys
import time
from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id", default="-")


class LineFormatter(logging.Formatter):
    """2026-01-31T12:00:00.123Z INFO smolora.api pid=7 request=4… method=GET path=/ status=200 ms=9.5 client=::1"""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s pid=%(process)d request=%(request_id)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        record.request_id = request_id.get()
        return super().format(record).replace("\r", "\\r").replace("\n", "\\n")


def set_up(level: int = logging.INFO) -> None:
    """Send everything of this process to stderr in this form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it names each step of a migration
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its start-up lines repeat ours
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of what clients are told anyway
