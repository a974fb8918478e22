"""Jobs for pages to show: submitted ones, and ones that seem to have ended."""

import json
from collections.abc import Mapping, Sequence

from playwright.sync_api import Page

from tests.end_to_end.server_process import ServerProcess

ROWS = [{"prompt": "a", "completion": "b"}] * 4
JSONL = "\n".join(map(json.dumps, ROWS)).encode()
PUBLISHED = {"name": "plain", "version": 1, "digest": ""}


def submitted(server: ServerProcess) -> str:
    response = server.client.post("/train", json={"name": "waits", "data": ROWS})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def pretend(
    page: Page,
    server: ServerProcess,
    job: str,
    report: Mapping[str, object],
    metrics_of_steps: Sequence[Mapping[str, object]] = (),
    **fields: object,
) -> None:
    """Answer the page as if the job had succeeded with these fields and this report, and with one warning."""
    described = server.client.get(f"/train/{job}").json() | {"status": "succeeded", **fields}
    event = {"seq": 1, "at": "2026-01-01T00:00:00Z", "level": "warning", "type": "message", "data": {}}
    found = [event | {"message": "latest stays where it is"}]
    for seq, data in enumerate(metrics_of_steps, 2):
        found.append(event | {"seq": seq, "level": "info", "type": "metrics", "message": "a step", "data": data})
    events = "".join(f"id: {one['seq']}\ndata: {json.dumps(one)}\n\n" for one in found)
    page.route(f"**/train/{job}", lambda route: route.fulfill(json=described))
    page.route("**/report", lambda route: route.fulfill(json=report))
    page.route("**/events", lambda route: route.fulfill(body=events, content_type="text/event-stream"))
