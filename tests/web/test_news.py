"""The page follows the server: a job's events, projects, and entries beyond its lists."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Request, Route, expect

from adapters.peft.files import write
from server.model.base.weights import BaseModel
from tests.end_to_end.peft_reference import CONFIG, WEIGHTS
from tests.end_to_end.server_process import ServerProcess
from tests.server.jobs.merge_kit import sample
from tests.web.browser import act, drop, page_of
from tests.web.test_sign_in import make_key, sign_in

pytestmark = pytest.mark.thorough  # test_page.py tests what everyone sees

PEFT_FILES = {"adapter_config": CONFIG, "adapter_model": WEIGHTS}
OPERATORS = "operators-0123456789"
ROWS = [{"prompt": "a", "completion": "b"}] * 4


@pytest.fixture(scope="module")
def server(
    browser: Browser, converted_tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Start a server with an operator's key, no other key, and no worker: jobs stay queued."""
    server = ServerProcess(
        tmp_path_factory.mktemp("home"), key=OPERATORS, model=converted_tiny, api_keys=OPERATORS
    )
    yield server
    server.close()


@pytest.fixture(scope="module")
def adapter(server: ServerProcess, tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("adapter")
    write(directory, sample(tiny_base.config.shape, 1))
    server.upload("zebra", directory)
    return "zebra"


@pytest.fixture
def job(server: ServerProcess) -> str:
    response = server.client.post("/train", json={"name": "waits", "data": ROWS})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def event(seq: int) -> str:
    fields = {
        "seq": seq,
        "at": "2026-01-01T00:00:00Z",
        "level": "info",
        "type": "log",
        "message": "news",
        "data": {},
    }
    return f"id: {seq}\ndata: {json.dumps(fields)}\n\n"


def test_a_server_that_ends_is_not_the_jobs_end(server: ServerProcess, browser: Browser, job: str) -> None:
    """The server disconnects followers of a job; they resume where they were."""
    asked: list[str | None] = []

    def lets_go(route: Route, request: Request) -> None:
        asked.append(request.headers.get("last-event-id"))
        if len(asked) == 1:
            route.fulfill(body=event(1), content_type="text/event-stream")
        else:
            route.continue_()

    with page_of(browser, server.url) as page:
        sign_in(page, OPERATORS)
        page.route("**/events", lets_go)
        page.goto(f"{server.url}/#/train/{job}")
        expect(page.get_by_text("1 event", exact=True)).to_be_visible()
        page.get_by_role("button", name="Pause").click()
        expect(page.get_by_text(re.compile(r"^[2-9] events$"))).to_be_visible()
        page.get_by_text(re.compile(r"events$")).click()
        expect(page.locator(".log")).to_contain_text("paused")
    assert asked[:2] == [None, "1"]


def test_a_job_of_many_events_is_not_asked_for_at_each(server: ServerProcess, browser: Browser, job: str) -> None:
    asked: list[str] = []
    body = "".join(event(seq) for seq in range(1, 501))
    with page_of(browser, server.url) as page:
        sign_in(page, OPERATORS)
        page.route("**/events", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
        page.on(
            "request", lambda request: asked.append(request.url) if request.url.endswith(f"/train/{job}") else None
        )
        page.goto(f"{server.url}/#/train/{job}")
        expect(page.get_by_text(re.compile(r"^[\d,]+ events$"))).to_be_visible()
        page.wait_for_timeout(1000)
    assert len(asked) < 20


def test_the_first_key_of_a_server_that_has_an_operators(server: ServerProcess, browser: Browser) -> None:
    """It may be any key; its creator stays signed in, and its project is listed at once."""
    with page_of(browser, f"{server.url}/#/access") as page:
        sign_in(page, OPERATORS)
        expect(page.get_by_text("None yet, except the operator's keys")).to_be_visible()
        expect(page.get_by_text("everyone who reaches this server")).to_have_count(0)
        make_key(page, "guest", "acme", ("generate",))
        expect(page.get_by_text(f"key …{OPERATORS[-4:]} · default")).to_be_visible()
        expect(page.get_by_role("region", name="Keys, as a table")).to_contain_text("guest")
        expect(page.get_by_role("region", name="Projects")).to_contain_text("acme")


def test_a_key_that_no_header_can_have(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, server.url) as page:
        sign_in(page, "sk-smolora-…")
        expect(page.get_by_role("alert")).to_contain_text("A key can't contain such characters")


def test_an_address_that_says_nothing(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, f"{server.url}/#/adapters/%") as page:
        expect(page.get_by_role("heading", name="API key")).to_be_visible()


def test_an_adapter_past_the_list(server: ServerProcess, browser: Browser, adapter: str) -> None:
    for number in range(500):
        response = server.client.post(f"/compositions/c{number:03}", json={"expression": f"{adapter}*0.5"})
        assert response.status_code == 201, response.text
    # It is in the list of public adapters, but not in the operator's project's.
    assert server.client.put(f"/adapters/{adapter}/visibility", json={"visibility": "public"}).status_code == 200
    with page_of(browser, server.url) as page:
        sign_in(page, OPERATORS)
        page.goto(f"{server.url}/#/adapters/{adapter}")
        expect(page.get_by_text("There are more than this page lists: find them by name.")).to_be_visible()
        expect(page.get_by_role("article", name=adapter)).to_contain_text("in use")
        page.get_by_role("button", name=f"More actions for {adapter}").click()
        expect(page.get_by_role("button", name="Make private")).to_be_visible()  # it is its project's
        page.keyboard.press("Escape")
        expect(page.get_by_role("heading", name="Other projects', public")).to_have_count(0)
        page.get_by_role("searchbox", name="Find").fill("EBR")
        expect(page.locator("ul.names").first.locator("li")).to_have_text(re.compile(adapter))  # its project's
        expect(page.locator("ul.names li")).to_have_count(1)
        page.goto(f"{server.url}/#/adapters/nothing")
        expect(page.get_by_text("There is no adapter nothing, or none that you may see.")).to_be_visible()
        page.goto(f"{server.url}/#/playground")
        page.get_by_role("searchbox", name="Find").fill("EBR")
        page.get_by_role("checkbox", name=adapter).check()
        page.get_by_role("searchbox", name="Find").fill("c00")
        expect(page.get_by_role("checkbox", name="c001")).to_be_visible()
        expect(page.get_by_role("checkbox", name=adapter)).to_be_checked()
        expect(page.get_by_role("textbox", name="Expression")).to_have_value(adapter)
        page.goto(f"{server.url}/#/train/new")
        page.get_by_text("More settings").click()
        page.get_by_role("textbox", name="Start from").fill(adapter)


def test_jobs_past_the_list(server: ServerProcess, browser: Browser, job: str) -> None:
    """They are loaded by a button; running jobs are always on the first page."""
    for number in range(100):
        body = {"name": f"job{number:03}", "data": ROWS}
        assert server.client.post("/train", json=body).status_code == 202
    runs = json.loads(server.client.get(f"/train/{job}").content) | {
        "name": "runs",
        "id": "runs",
        "status": "running",
    }
    with page_of(browser, server.url) as page:
        sign_in(page, OPERATORS)
        page.route("**/train?status=running", lambda route: route.fulfill(json={"jobs": [runs], "next": None}))
        page.goto(f"{server.url}/#/train")
        listed = page.get_by_role("navigation", name="Jobs").get_by_role("link")
        expect(listed).to_have_count(101)
        expect(listed.first).to_contain_text("runs")
        expect(listed.nth(100)).to_contain_text("job000")
        page.get_by_role("button", name="Older jobs").click()
        expect(listed.filter(has_text="waits")).not_to_have_count(0)
        expect(page.get_by_role("button", name="Older jobs")).to_have_count(0)


def test_another_projects_adapters_are_the_operators_too(
    server: ServerProcess, browser: Browser, tiny_base: BaseModel, tmp_path: Path
) -> None:
    """Actions on them apply in their project."""
    made = server.client.post("/keys", json={"name": "theirs", "project": "beta"})
    assert made.status_code == 201, made.text
    write(tmp_path, sample(tiny_base.config.shape, 2))
    beta = {"OpenAI-Project": "beta"}
    files = {name: (tmp_path / file).read_bytes() for name, file in PEFT_FILES.items()}
    assert server.client.post("/adapters/tone", files=files, headers=beta).status_code == 201
    blend = {"expression": "tone*0.5"}
    assert server.client.post("/compositions/half", json=blend, headers=beta).status_code == 201
    with page_of(browser, server.url) as page:
        sign_in(page, OPERATORS)
        page.goto(f"{server.url}/#/adapters/beta/half")
        expect(page.locator("ul.hidden li", has_text="beta/tone@1 comes from base")).to_be_attached()
        page.goto(f"{server.url}/#/adapters/beta/tone")
        with page.expect_download() as saved:
            act(page.get_by_role("region", name="Versions of beta/tone, as a table"), "Download")
        assert saved.value.suggested_filename == "beta-tone-1.zip"
        article = page.get_by_role("article", name="beta/tone")
        act(article, "Make public…")
        page.get_by_role("dialog").get_by_role("button", name="Make public").click()
        expect(article.get_by_text("beta/tone is public now.")).to_be_visible()
        act(article, "Make private")
        expect(article.get_by_text("beta/tone is private now.")).to_be_visible()
    assert server.client.get("/adapters/tone", headers=beta).json()["visibility"] == "private"


def test_a_name_that_would_be_another_address(
    server: ServerProcess, browser: Browser, tiny_base: BaseModel, tmp_path: Path
) -> None:
    write(tmp_path, sample(tiny_base.config.shape, 3))
    with page_of(browser, server.url) as page:
        sign_in(page, OPERATORS)
        page.goto(f"{server.url}/#/adapters")
        drop(page, ".drop", {file: (tmp_path / file).read_bytes() for file in PEFT_FILES.values()})
        upload = page.get_by_role("form", name="Upload")
        upload.get_by_label("Name").fill("acme/tone")
        upload.get_by_role("button", name="Upload").click()
        expect(upload.get_by_label("Name")).to_have_attribute("aria-invalid", "true")
        expect(upload).to_contain_text("Must be 1 to 64 letters")


def test_a_base_without_a_chat_template(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, server.url) as page:
        page.route("**/ready", lambda route: route.fulfill(json={"model": "plain", "chat_template": False}))
        sign_in(page, OPERATORS)
        expect(page.get_by_text("plain, as it is (the base)")).to_be_visible()
        expect(page.get_by_label("Question")).to_have_count(0)
        expect(page.get_by_role("textbox", name="Text")).to_be_visible()
        with page.expect_request("**/compare") as asked:
            page.get_by_role("button", name="Continue “The capital of France is”").click()
        body = asked.value.post_data_json
        assert body is not None
        assert body["prompt"] == "The capital of France is"
