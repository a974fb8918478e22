"""The log: one line for each event, with its request's id."""

import logging
import re
import subprocess
import sys

from server.logs import LineFormatter, request_id


def line(message: str, **fields: object) -> str:
    record = logging.LogRecord("smolora.api", logging.WARNING, __file__, 1, message, None, None)
    record.__dict__.update(fields)
    return LineFormatter().format(record)


def test_a_line_has_a_time_a_level_and_the_requests_id() -> None:
    token = request_id.set("abc")
    try:
        found = line("something happened")
    finally:
        request_id.reset(token)
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(time + r" WARNING smolora.api pid=\d+ request=abc something happened", found)
    assert "request=-" in line("outside of any request")


def test_uvicorns_lines_look_the_same() -> None:
    code = (
        "import logging; from server import logs; logs.set_up(); logging.getLogger('uvicorn.error').error('bad')"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert re.fullmatch(r"\S+Z ERROR uvicorn\.error pid=\d+ request=- bad\n", said.stderr)


def test_line_ends_are_escaped() -> None:
    assert "\n" not in line("a\nb\r\nc")
    try:
        raise ValueError("several\nlines")
    except ValueError:
        traced = line("failed", exc_info=sys.exc_info())
    assert "ValueError: several\\nlines" in traced
    assert "\n" not in traced
