"""The log: one line for each event, with its request's id."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

from server.telemetry.logs import Fields, JsonFormatter, LineFormatter, request_id
from tests.kits.adapter_hub import REPO, hub_of


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
        "import logging; from server.telemetry import logs; logs.set_up();"
        "logging.getLogger('uvicorn.error').error('bad')"
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


def test_named_values_are_one_word_each() -> None:
    message = Fields(path="/a b=c\nd\xe9", status=200, ms=1.0, empty="", key="key-1")
    assert str(message) == "path=/a\\x20b=c\\nd\\xe9 status=200 ms=1.0 empty=- key=key-1"


def as_json(message: object, exc_info: object = None, **always: str) -> dict[str, object]:
    record = logging.LogRecord("smolora.api", logging.INFO, __file__, 1, message, None, None)
    record.__dict__["exc_info"] = exc_info
    text = JsonFormatter(**always).format(record)
    assert "\n" not in text
    found: dict[str, object] = json.loads(text)
    return found


def test_json_has_named_values_as_members() -> None:
    found = as_json(Fields(method="GET", path="/a b\n\xe9", status=200, ms=9.5), job="job-1")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(found.pop("time")))
    assert isinstance(found.pop("pid"), int)
    assert found == {
        "level": "INFO",
        "logger": "smolora.api",
        "request": "-",
        "job": "job-1",
        "method": "GET",
        "path": "/a b\n\xe9",
        "status": 200,
        "ms": 9.5,
    }


def test_json_has_other_messages_as_message() -> None:
    try:
        raise ValueError("several\nlines")
    except ValueError:
        found = as_json("failed: a\nb", exc_info=sys.exc_info())
    assert found["message"] == "failed: a\nb"
    assert str(found["exception"]).endswith("ValueError: several\nlines")


def test_libraries_lines_are_json_too() -> None:
    code = (
        "import logging; from server.telemetry import logs; logs.set_up('json', job='job-1');"
        "logging.getLogger('uvicorn.error').error('bad %s', 'thing')"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(said.stderr)
    assert (found["logger"], found["message"], found["job"]) == ("uvicorn.error", "bad thing", "job-1")


def test_a_line_of_a_job_names_it() -> None:
    record = logging.LogRecord("smolora.job", logging.INFO, __file__, 1, "begun", None, None)
    assert LineFormatter(job="job-1").format(record).endswith(" request=- job=job-1 begun")


def test_hub_urls_are_not_logged(tmp_path: Path) -> None:
    """The client library would log URLs, and URLs of large files are signed."""
    code = f"""
import sys
from pathlib import Path
from server.telemetry import logs
from server.model.base.hub import fetch_adapter
logs.set_up()
place, endpoint = sys.argv[1:]
fetch_adapter({REPO!r}, None, Path(place), max_config=99, max_weights=99, timeout=99, endpoint=endpoint)
"""
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"bytes"}
    with hub_of(files, []) as endpoint:
        command = [sys.executable, "-c", code, str(tmp_path), endpoint]
        said = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"bytes"
    assert endpoint not in said.stderr


def test_failed_hub_urls_are_not_logged() -> None:
    code = """
from server.telemetry import logs
from huggingface_hub import file_download
from huggingface_hub.utils import _http
file_download.logger.warning("Error while downloading from %s: %s", "https://cdn/x?Signature=xyzzy", "timed out")
_http.logger.warning("timed out thrown while requesting GET https://cdn/x?Signature=xyzzy")
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert "xyzzy" not in said.stderr
