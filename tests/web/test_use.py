"""What people do with the page besides: leave in the middle, press Enter, open many tabs, take a phone."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from adapters.peft.files import write
from server.model.base.weights import BaseModel
from tests.end_to_end.peft_reference import CONFIG, WEIGHTS
from tests.end_to_end.server_process import ServerProcess
from tests.server.training.worker.merge_kit import sample
from tests.web.browser import DESKTOP, PHONE, drop, page_of

ROWS = [{"prompt": "a", "completion": "b"}] * 4
JSONL = "\n".join(map(json.dumps, ROWS)).encode()
CONNECTIONS = 6
"""What browsers have to one server, of all tabs together."""

QUICK_NEWS = """() => {
    const real = window.fetch;
    let seq = 0;
    const steps = () => new ReadableStream({
        async pull(controller) {
            await new Promise((resolve) => setTimeout(resolve, 100));
            seq += 1;
            const at = "2026-01-01T00:00:00Z";
            const data = {seq, at, level: "info", type: "metrics", message: "", data: {step: seq}};
            controller.enqueue(new TextEncoder().encode(`id: ${seq}\\ndata: ${JSON.stringify(data)}\\n\\n`));
        },
    });
    window.fetch = async (url, init) => {
        if (String(url).endsWith("/events")) return new Response(steps());
        if (/job-[^/]+$/.test(String(url))) await new Promise((resolve) => setTimeout(resolve, 1000));
        return real(url, init);
    };
}"""
"""A job that tells of a step each tenth of a second, through a network in which an answer takes one."""


@pytest.fixture(scope="module")
def server(
    browser: Browser, tiny_base: BaseModel, converted_tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Without keys, and without a worker; with the adapter `plain` and blends of it, more than a screen has."""
    server = ServerProcess(tmp_path_factory.mktemp("home"), model=converted_tiny)
    directory = tmp_path_factory.mktemp("plain")
    write(directory, sample(tiny_base.config.shape, 1))
    server.upload("plain", directory)
    for number in range(40):
        response = server.client.post(f"/compositions/blend{number:02}", json={"expression": "plain*0.5"})
        assert response.status_code == 201, response.text
    yield server
    server.close()


@pytest.fixture
def job(server: ServerProcess) -> str:
    return submitted(server)


def submitted(server: ServerProcess) -> str:
    response = server.client.post("/train", json={"name": "waits", "data": ROWS})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def held_back(page: Page, path: str) -> list[Route]:
    """What the page sends there, one after the other, and what is to go on with `continue_`."""
    held: list[Route] = []
    page.route(path, lambda route: held.append(route) if route.request.method == "POST" else route.continue_())
    return held


def pretend(page: Page, server: ServerProcess, job: str, report: Mapping[str, object], **fields: object) -> None:
    """Have the job be one that has ended so, whose events are a warning."""
    told = server.client.get(f"/train/{job}").json() | {"status": "succeeded", **fields}
    event = {"seq": 1, "at": "2026-01-01T00:00:00Z", "level": "warning", "type": "message", "data": {}}
    events = f"id: 1\ndata: {json.dumps(event | {'message': 'latest stays where it is'})}\n\n"
    page.route(f"**/train/{job}", lambda route: route.fulfill(json=told))
    page.route("**/report", lambda route: route.fulfill(json=report))
    page.route("**/events", lambda route: route.fulfill(body=events, content_type="text/event-stream"))


def test_news_may_come_faster_than_answers(server: ServerProcess, browser: Browser, job: str) -> None:
    with page_of(browser, server.url) as page:
        page.evaluate(QUICK_NEWS)
        page.evaluate(f"location.hash = '#/train/{job}'")
        expect(page.get_by_role("article", name="Job waits")).to_be_visible()
        server.client.post(f"/train/{job}/cancel").raise_for_status()
        expect(page.get_by_role("article", name="Job waits")).to_contain_text("cancelled")
