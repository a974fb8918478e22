"""Jobs for pages to show: submitted ones, and ones that seem to have ended."""

import json
from collections.abc import Mapping

from playwright.sync_api import Page

from tests.end_to_end.server_process import ServerProcess

ROWS = [{"prompt": "a", "completion": "b"}] * 4
JSONL = "\n".join(map(json.dumps, ROWS)).encode()
PUBLISHED = {"name": "plain", "version": 1, "digest": ""}


def submitted(server: ServerProcess) -> str:
    response = server.client.post("/train", json={"name": "waits", "data": ROWS})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def pretend(page: Page, server: ServerProcess, job: str, report: Mapping[str, object], **fields: object) -> None:
    """Answer the page as if the job had succeeded with these fields and this report, and with one warning."""
    described = server.client.get(f"/train/{job}").json() | {"status": "succeeded", **fields}
    event = {"seq": 1, "at": "2026-01-01T00:00:00Z", "level": "warning", "type": "message", "data": {}}
    events = f"id: 1\ndata: {json.dumps(event | {'message': 'latest stays where it is'})}\n\n"
    page.route(f"**/train/{job}", lambda route: route.fulfill(json=described))
    page.route("**/report", lambda route: route.fulfill(json=report))
    page.route("**/events", lambda route: route.fulfill(body=events, content_type="text/event-stream"))
