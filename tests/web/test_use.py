"""What people do with the page besides: leave in the middle, press Enter, open many tabs, take a phone."""

import json
import os
import re
import time
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from adapters.peft.files import write
from server.model.base.weights import BaseModel
from tests.end_to_end.peft_reference import CONFIG, WEIGHTS
from tests.end_to_end.server_process import ServerProcess
from tests.server.jobs.merge_kit import sample
from tests.web.browser import DESKTOP, PATIENCE, PHONE, act, drop, is_wider_than_the_screen, page_of, violations
from tests.web.jobs_kit import JSONL, PUBLISHED, pretend, submitted

pytestmark = pytest.mark.thorough  # what everybody does with it: test_page.py

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
        if (!/job-[^/]+$/.test(String(url))) return real(url, init);
        window.most = Math.max(window.most ?? 0, (window.asked = (window.asked ?? 0) + 1));
        await new Promise((resolve) => setTimeout(resolve, 1000));
        return real(url, init).finally(() => (window.asked -= 1));
    };
}"""
"""A job that tells of a step each tenth of a second, through a network in which an answer takes one.
`window.most`: how many of those answers were on their way at once."""


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


def held_back(page: Page, path: str, method: str = "POST") -> list[Route]:
    """What the page sends there, one after the other, and what is to go on with `continue_`."""
    held: list[Route] = []
    page.route(path, lambda route: held.append(route) if route.request.method == method else route.fallback())
    return held


def wait_for_number(page: Page, seen: Sized, number: int) -> None:
    """Until so many were seen, in handlers that run while the page is waited for."""
    end = time.monotonic() + PATIENCE / 1000
    while len(seen) < number and time.monotonic() < end:
        page.wait_for_timeout(20)
    assert len(seen) == number


def test_news_may_come_faster_than_answers(server: ServerProcess, browser: Browser, job: str) -> None:
    with page_of(browser, server.url) as page:
        page.evaluate(QUICK_NEWS)
        page.evaluate(f"location.hash = '#/train/{job}'")
        expect(page.get_by_role("article", name="Job waits")).to_be_visible()
        server.client.post(f"/train/{job}/cancel").raise_for_status()
        expect(page.get_by_role("article", name="Job waits")).to_contain_text("cancelled")
        assert page.evaluate("window.most") <= 2  # of the news, and of the look every few seconds


def test_a_form_is_filled_in_while_its_rows_are_sent(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, f"{server.url}/#/train/new") as page:
        held = held_back(page, "**/datasets")
        drop(page, ".drop", {"rows.jsonl": JSONL})
        page.get_by_label("Name").fill("mine")
        page.get_by_label("Epochs").fill("7")
        wait_for_number(page, held, 1)
        held[0].continue_()
        expect(page.get_by_label("Data set").locator("option:checked")).to_contain_text("rows.jsonl")
        expect(page.get_by_label("Name")).to_have_value("mine")
        expect(page.get_by_label("Epochs")).to_have_value("7")


def test_a_dry_run_is_of_what_stands_there(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, f"{server.url}/#/train/new") as page:
        drop(page, ".drop", {"rows.jsonl": JSONL})
        expect(page.get_by_label("Data set").locator("option:checked")).to_contain_text("rows.jsonl")
        held = held_back(page, "**/train?dry_run=true")
        page.get_by_role("button", name="Dry run").click()
        wait_for_number(page, held, 1)
        page.get_by_label("Epochs").fill("9")
        with page.expect_response("**/train?dry_run=true"):
            held[0].continue_()
        page.wait_for_timeout(300)
        expect(page.get_by_role("status", name="Dry run")).to_have_count(0)
        page.get_by_role("button", name="Dry run").click()
        wait_for_number(page, held, 2)
        held[1].continue_()
        expect(page.get_by_role("status", name="Dry run")).to_contain_text("9 steps")


def test_what_is_sent_again_is_the_same_job(server: ServerProcess, browser: Browser) -> None:
    """Whoever presses Train again, since no answer came, doesn't know whether the first one got there."""
    with page_of(browser, f"{server.url}/#/train/new") as page:
        drop(page, ".drop", {"rows.jsonl": JSONL})
        expect(page.get_by_label("Data set").locator("option:checked")).to_contain_text("rows.jsonl")
        page.get_by_label("Name").fill("once")
        keys: list[str] = []

        def lost(route: Route) -> None:
            if route.request.method != "POST":
                route.continue_()
                return
            keys.append(route.request.headers["idempotency-key"])
            route.fulfill(status=429, body="")

        page.route("**/train", lost)
        for number, name in enumerate(("once", "once", "another", "once"), start=1):
            page.get_by_label("Name").fill(name)
            page.get_by_role("button", name="Train", exact=True).click()
            wait_for_number(page, keys, number)
            expect(page.get_by_role("alert")).to_contain_text("429")
        page.get_by_role("link", name="Adapters").click()
        expect(page.get_by_role("heading", name="Adapters")).to_be_visible()
        page.go_back()
        page.get_by_role("button", name="Train", exact=True).click()
        wait_for_number(page, keys, 5)
        page.unroute("**/train")
    assert keys[0] == keys[1] == keys[3] == keys[4] != keys[2]


def test_a_first_job_is_gone_to(server: ServerProcess, browser: Browser) -> None:
    """Though the list has it before whoever sent it is answered."""
    lists: list[list[object]] = [[]]
    with page_of(browser, server.url) as page:
        page.route("**/train", lambda route: route.fulfill(json={"jobs": lists[-1], "next": None}))
        page.goto(f"{server.url}/#/train")
        drop(page, ".drop", {"rows.jsonl": JSONL})
        expect(page.get_by_label("Data set").locator("option:checked")).to_contain_text("rows.jsonl")
        page.get_by_label("Name").fill("first")
        held = held_back(page, "**/train")
        page.get_by_role("button", name="Train", exact=True).click()
        wait_for_number(page, held, 1)
        job = server.client.get(f"/train/{submitted(server)}").json()
        lists.append([job])
        expect(page.get_by_role("navigation", name="Jobs").get_by_role("link")).to_have_count(1)
        expect(page.get_by_label("Name")).to_have_value("first")
        held[0].fulfill(status=202, json=job)
        page.wait_for_url(f"**/train/{job['id']}")
        expect(page.get_by_role("article", name="Job waits")).to_be_visible()


def test_enter_is_for_the_field_in_which_one_is(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, f"{server.url}/#/playground") as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url) if request.method == "POST" else None)
        page.get_by_role("textbox", name="Question").fill("of whom?")
        page.get_by_role("searchbox", name="Find").fill("blend1")
        page.keyboard.press("Enter")
        page.get_by_label("Expression").fill("blend01+blend02")
        page.get_by_text("Save this blend under a name").click()
        page.get_by_label("Name").fill("kept")
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_contain_text("kept@1")
        assert asked == [f"{server.url}/compositions/kept"]
        page.get_by_label("Expression").press("Enter")
        expect(page.get_by_role("article", name="Answer of blend01+blend02")).to_be_visible()


def test_any_weight_is_generated(server: ServerProcess, browser: Browser) -> None:
    """A slider's steps are no bounds; a value that isn't a number is shown, and not left out."""
    with page_of(browser, f"{server.url}/#/playground") as page:
        page.get_by_role("textbox", name="Question").fill("of whom?")
        page.get_by_label("Expression").fill("plain*0.33")
        page.get_by_text("Settings").click()
        page.get_by_label("Temperature").press_sequentially("1e")
        page.get_by_role("button", name="Generate").click()
        page.wait_for_timeout(300)
        expect(page.get_by_role("article", name="Answer of plain*0.33")).to_have_count(0)
        page.get_by_label("Temperature").fill("0")
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_role("article", name="Answer of plain*0.33")).to_be_visible()


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_what_is_chosen_is_seen(server: ServerProcess, browser: Browser, size: tuple[int, int]) -> None:
    """However long the list is in which it was."""
    for _ in range(20):
        submitted(server)
    with page_of(browser, f"{server.url}/#/adapters", size) as page:
        page.get_by_role("link", name="blend38").click()
        wait_until_high(page)
        if size == DESKTOP:  # nor does the list go, in which one may want the next
            expect(page.get_by_role("link", name="blend38")).to_be_in_viewport()
            assert violations(page) == []
        page.goto(f"{server.url}/#/train")
        page.get_by_role("navigation", name="Jobs").get_by_role("link").nth(19).click()
        wait_until_high(page)


def wait_until_high(page: Page) -> None:
    """Until the heading of what was chosen is in the upper half of the screen."""
    expect(page.get_by_role("article")).to_have_count(1)
    page.wait_for_function(
        """() => {
            const { top } = document.querySelector("article h2").getBoundingClientRect();
            return 0 <= top && top < innerHeight / 2;
        }"""
    )


PLACES = "['main form', '[name=name]'].map((of) => document.querySelector(of).getBoundingClientRect().top)"
"""Where the form of a new job begins, and a field of it that is below the lists."""


@pytest.mark.parametrize(("size", "status"), [((1280, 500), 403), (PHONE, 429)])
def test_reading_position_is_kept(
    server: ServerProcess, browser: Browser, size: tuple[int, int], status: int
) -> None:
    """By a list that comes late, nor by one that is away for a moment."""
    for _ in range(20):
        submitted(server)
    server.client.post("/datasets", files={"file": ("rows.jsonl", JSONL)}).raise_for_status()
    with page_of(browser, server.url, size) as page:
        held = {path: held_back(page, path, "GET") for path in ("**/train", "**/datasets")}
        page.goto(f"{server.url}/#/train/new")
        page.get_by_text("More settings").click()
        for routes in held.values():
            wait_for_number(page, routes, 1)

        page.evaluate("scrollTo(0, 300)")
        places = page.evaluate(PLACES)
        assert places[0] < 0
        for path, routes in held.items():
            routes[0].continue_()
            page.unroute(path)
        jobs = page.locator("nav[aria-label=Jobs] a")  # a phone hides them
        expect(jobs.nth(19)).to_be_attached()
        expect(page.get_by_label("Data set").locator("option", has_text="rows.jsonl")).not_to_have_count(0)
        page.wait_for_timeout(300)
        assert page.evaluate(PLACES) == pytest.approx(places, abs=2)
        place = page.evaluate("scrollY")
        answer = {"title": "not now"}
        with page.expect_response(lambda response: response.status == status):
            page.route("**/train", lambda route: route.fulfill(status=status, json=answer), times=1)
        with page.expect_response(lambda response: response.url.endswith("/train") and response.ok):
            pass
        expect(page.get_by_role("alert")).to_have_count(0)
        expect(jobs.nth(19)).to_be_attached()
        page.wait_for_timeout(300)
        assert abs(page.evaluate("scrollY") - place) < 2


def test_a_job_of_many_steps(server: ServerProcess, browser: Browser, job: str) -> None:
    """Ten thousand rows that are drawn anew at each step are seconds, in which nothing can be pressed."""
    steps = [
        {"seq": step, "at": "2026-01-01T00:00:00Z", "level": "info", "type": "metrics", "message": "a step"}
        | {"data": {"step": step, "train_loss": 1.0, **({"eval_loss": 2.0} if step == 4007 else {})}}
        for step in range(1, 10_001)
    ]
    body = "".join(f"id: {step['seq']}\ndata: {json.dumps(step)}\n\n" for step in steps)
    server.client.post(f"/train/{job}/cancel").raise_for_status()
    with page_of(browser, server.url) as page:
        page.route("**/events", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
        page.goto(f"{server.url}/#/train/{job}")
        expect(page.get_by_text("10,000 events")).to_be_visible()
        page.get_by_text("As a table").first.click()
        expect(page.locator(".log li")).to_have_count(500)
        rows = page.get_by_role("region", name="Loss by step, as a table").locator("tbody tr")
        expect(rows.last).to_contain_text("10000")
        expect(rows.filter(has_text="4007")).to_contain_text("2.000")  # the measured value is shown
        assert rows.count() == 502


def test_a_long_name_on_a_phone(
    server: ServerProcess, browser: Browser, tiny_base: BaseModel, tmp_path: Path
) -> None:
    name = "x" * 64
    write(tmp_path, sample(tiny_base.config.shape, 4))
    server.upload(name, tmp_path)
    with page_of(browser, f"{server.url}/#/playground", PHONE) as page:
        page.get_by_label("Expression").fill(f"{name}*0.5+plain")
        expect(page.get_by_text(f"{name} alone")).to_be_visible()
        box = page.get_by_label(f"{name} alone").bounding_box()
        assert box is not None
        assert box["width"] == box["height"]  # not pressed flat
        assert not is_wider_than_the_screen(page)


def test_one_adapter_twice(server: ServerProcess, browser: Browser, tiny_base: BaseModel, tmp_path: Path) -> None:
    """Two versions in one blend: each has a slider, and what it doesn't move stays as it is."""
    write(tmp_path, sample(tiny_base.config.shape, 5))
    server.upload("plain", tmp_path)
    with page_of(browser, f"{server.url}/#/playground") as page:
        expression = page.get_by_label("Expression")
        expression.fill("plain@1*0.5+plain@2*0.123456")
        page.get_by_label("Weight of plain@1", exact=True).press("ArrowLeft")
        expect(expression).to_have_value("plain@1*0.45+plain@2*0.123456")
        page.get_by_label("plain@1", exact=True).click()
        expect(expression).to_have_value("plain@2*0.123456")


def test_charts_come_once_they_can_be_loaded(server: ServerProcess, browser: Browser) -> None:
    """Their library is asked for when the first is drawn, which may be while the server starts anew."""
    asked: list[str] = []

    def fails_once(route: Route) -> None:
        asked.append(route.request.url)
        if len(asked) == 1:
            route.fulfill(status=404, body="")
        else:
            route.continue_()

    with page_of(browser, server.url) as page:
        page.route("**/uplot.mjs*", fails_once)
        page.goto(f"{server.url}/#/engine")
        expect(page.get_by_text("can't be drawn").first).to_be_visible()
        expect(page.locator("canvas").first).to_be_visible()
        expect(page.get_by_text("can't be drawn")).to_have_count(0)


def test_tabs_that_nobody_looks_at(server: ServerProcess, browser: Browser) -> None:
    """They leave the browser's connections to the one that is looked at, and go on when they are."""
    hide = """(is) => {
        Object.defineProperty(document, "hidden", {configurable: true, get: () => is});
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    try:
        first = submitted(server)
        pages = []
        for number in range(CONNECTIONS + 1):
            page = context.new_page()
            page.goto(f"{server.url}/#/train/{first if number == 0 else submitted(server)}")
            expect(page.locator(".log li").first).to_be_attached()
            page.evaluate(hide, True)
            pages.append(page)
        server.client.post(f"/train/{first}/cancel").raise_for_status()
        pages[0].evaluate(hide, False)
        expect(pages[0].locator(".log")).to_contain_text("cancelled")
    finally:
        context.close()


def test_a_job_that_is_not_there(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, server.url) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url) if "events" in request.url else None)
        page.goto(f"{server.url}/#/train/job-nothing")
        expect(page.get_by_role("alert")).to_contain_text("job-nothing")
        page.wait_for_timeout(3000)
    assert len(asked) == 1, asked


def test_a_file_that_has_changed_since_it_was_chosen(
    server: ServerProcess, browser: Browser, tiny_base: BaseModel, tmp_path: Path
) -> None:
    write(tmp_path, sample(tiny_base.config.shape, 2))
    with page_of(browser, f"{server.url}/#/adapters") as page:
        upload = page.get_by_role("form", name="Upload")
        upload.locator("input[type=file]").set_input_files([tmp_path / CONFIG, tmp_path / WEIGHTS])
        upload.get_by_label("Name").fill("changed")
        (tmp_path / CONFIG).write_text("{}")
        os.utime(tmp_path / CONFIG, (1, 1))
        upload.get_by_role("button", name="Upload").click()
        expect(upload.get_by_role("alert")).to_contain_text(f"{CONFIG} can't be read")


def test_user_who_navigated_away_stays_there(
    server: ServerProcess, browser: Browser, tiny_base: BaseModel, tmp_path: Path
) -> None:
    write(tmp_path, sample(tiny_base.config.shape, 3))
    with page_of(browser, f"{server.url}/#/adapters") as page:
        held = held_back(page, "**/adapters/late")
        upload = page.get_by_role("form", name="Upload")
        drop(page, ".drop", {file: (tmp_path / file).read_bytes() for file in (CONFIG, WEIGHTS)})
        upload.get_by_label("Name").fill("late")
        upload.get_by_role("button", name="Upload").click()
        wait_for_number(page, held, 1)
        page.get_by_role("link", name="Engine").click()
        expect(page.get_by_role("heading", name="Engine")).to_be_visible()
        with page.expect_response("**/adapters/late"):
            held[0].continue_()
        page.wait_for_timeout(500)
        assert page.url.endswith("#/engine")


def test_user_who_left_a_delete_stays_there(server: ServerProcess, browser: Browser, job: str) -> None:
    server.client.post(f"/train/{job}/cancel").raise_for_status()
    server.client.post("/compositions/gone", json={"expression": "plain*0.5"}).raise_for_status()
    with page_of(browser, server.url) as page:
        for path in (f"train/{job}", "adapters/gone"):
            page.goto(f"{server.url}/#/{path}")
            held = held_back(page, f"**/{path}", "DELETE")
            if path.startswith("adapters/"):
                act(page.get_by_role("article"), "Delete adapter…")
            else:
                page.get_by_role("article").get_by_role("button", name="Delete").click()
            page.get_by_role("dialog").get_by_role("button", name="Delete").click()
            wait_for_number(page, held, 1)
            page.get_by_role("link", name="Engine").click()
            expect(page.get_by_role("heading", name="Engine")).to_be_visible()
            with page.expect_response(lambda response: response.request.method == "DELETE"):
                held[0].continue_()
            page.wait_for_timeout(500)
            assert page.url.endswith("#/engine")


def test_the_audit_list_has_words_for_every_action(server: ServerProcess, browser: Browser, job: str) -> None:
    server.client.post(f"/train/{job}/cancel").raise_for_status()
    server.client.delete(f"/train/{job}").raise_for_status()
    rows = server.client.post("/datasets", files={"file": ("few.jsonl", JSONL + b"\n" + JSONL)}).json()["id"]
    server.client.delete(f"/datasets/{rows}").raise_for_status()
    server.client.put("/adapters/plain/aliases/prod", json={"version": 1}).raise_for_status()
    server.client.delete("/adapters/plain/aliases/prod").raise_for_status()
    file = server.client.post(
        "/v1/files", files={"file": ("few.jsonl", JSONL)}, data={"purpose": "fine-tune"}
    ).json()["id"]
    server.client.delete(f"/v1/files/{file}").raise_for_status()
    with page_of(browser, f"{server.url}/#/access") as page:
        log = page.get_by_role("region", name="Audit", exact=True)
        for words in ("removed a job's files", "deleted a data set", "removed an alias", "deleted a file"):
            expect(log).to_contain_text(words)
        expect(log.get_by_role("row").filter(has_text="set an alias")).to_contain_text("plain@prod → 1")
        assert not re.search(r"\b(job|dataset|alias|file)\.(delete|set)\b", log.inner_text())


def test_why_no_version_was_published(server: ServerProcess, browser: Browser, job: str) -> None:
    """The command line says so, and a job's warnings; who looks at the page alone has to know as much."""
    reason = "its loss of 2.0000 is not below the base's, 1.0000"
    report = {"method": "lora", "evaluation": None, "gate": {"passes": False, "reason": reason}}
    with page_of(browser, server.url) as page:
        pretend(page, server, job, report, adapter=None)
        page.goto(f"{server.url}/#/train/{job}")
        article = page.get_by_role("article", name="Job waits")
        expect(article.get_by_text(f"No version was published: {reason}")).to_be_visible()
        expect(article.locator(":scope > p.warning")).to_contain_text("Latest stays where it is.")


@pytest.mark.parametrize("distance", [0.25, None])
def test_the_card_of_a_merge(server: ServerProcess, browser: Browser, job: str, distance: float | None) -> None:
    report = {
        "kind": "merge",
        "method": "dare_ties",
        "distance": distance,  # None: the exact sum is 0
        "wall_seconds": 3.0,
        "peak_memory_bytes": 1 << 30,
        "bytes_stored": 1 << 20,
        "lineage": {"expression": "codes@1+shouting@2*0.5", "parts": []},
    }
    with page_of(browser, server.url) as page:
        pretend(page, server, job, report, kind="merge", adapter=PUBLISHED)
        page.goto(f"{server.url}/#/train/{job}")
        card = page.locator(".reported")
        expect(card).to_contain_text("dare_ties")
        expect(card).to_contain_text("codes@1+shouting@2*0.5")
        if distance is not None:
            expect(card).to_contain_text("0.250 from the exact sum")
        for wrong in ("LoRA", "held out", "0 rows", "Steps", *(["Distance"] if distance is None else [])):
            expect(card).not_to_contain_text(wrong)
        expect(page.get_by_role("article", name="Job waits")).not_to_contain_text("Training loss")


def test_prompts_of_many_rows_are_not_asked_for(server: ServerProcess, browser: Browser, job: str) -> None:
    """All would be read for the few that are shown, each time that somebody looks at the job."""
    answer = server.client.get(f"/train/{job}").json()
    report = {"method": "lora", "evaluation": None, "gate": {"passes": True, "reason": ""}}
    large = {"config": answer["config"] | {"dataset": "ds-large"}, "data": answer["data"] | {"rows": 500_000}}
    asked: list[str] = []
    with page_of(browser, server.url) as page:
        pretend(page, server, job, report, adapter=PUBLISHED, **large)
        page.on("request", lambda request: asked.append(request.url) if request.method == "POST" else None)
        page.goto(f"{server.url}/#/train/{job}")
        expect(page.get_by_role("form", name="Compare")).to_be_visible()
        page.wait_for_timeout(500)
    assert asked == []


def pretend_answer(page: Page, text: str, warnings: Sequence[str] = (), **end: object) -> None:
    """Answer the base and `plain` with this text. Without `end` the stream breaks off."""
    adapters = [{"name": "plain", "version": 1, "weight": 1, "digest": ""}]
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0}
    timing = {"ttft_ms": 1, "total_ms": 1}
    last = {"usage": usage, "timing": timing, "warnings": warnings, "seed": 1, **end}
    sent: list[dict[str, object]] = []
    for result, parts in enumerate(([], adapters)):
        sent.append({"result": result, "text": text, "logprobs": scored(text)})
        if end:
            sent.append({"result": result, "text": "", "logprobs": [], "adapters": parts, **last})
    if end:
        sent.append({"result": 1, "reference": scored(text)})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in sent) + ("data: [DONE]\n\n" if end else "")
    page.route("**/compare", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def scored(text: str) -> list[dict[str, object]]:
    """Return a token for each byte of the text, as an answer has them."""
    return [{"token": "", "bytes": [byte], "logprob": -1.0, "top": []} for byte in text.encode()]


def ask_plain(page: Page) -> Locator:
    page.get_by_label("Text to continue").check()
    page.get_by_role("textbox", name="Text").fill("ab")
    page.get_by_label("Expression").fill("plain")
    page.get_by_role("button", name="Generate").click()
    return page.get_by_role("article", name="Answer of plain", exact=True)


def test_a_shaded_text_is_the_text(server: ServerProcess, browser: Browser) -> None:
    """Characters that several tokens make are there, and Arabic runs from right to left."""
    said = "مرحبا 👋🏽 你好."
    with page_of(browser, server.url) as page:
        pretend_answer(page, said, ["plain@1: its loss is worse"], finish_reason="stop")
        answer = ask_plain(page)
        tokens = answer.locator(".tokens .token")
        expect(tokens.first).to_be_visible()
        assert "".join(tokens.all_text_contents()) == said
        first, last = (tokens.filter(has_text=letter).first.bounding_box() for letter in "مب")
        assert first is not None
        assert last is not None
        assert first["x"] > last["x"]
        expect(answer.locator(".warning")).to_contain_text("plain@1: its loss is worse.")
        assert violations(page) == []


def test_an_answer_that_breaks_off(server: ServerProcess, browser: Browser) -> None:
    """However orderly whoever stands between ends it."""
    with page_of(browser, server.url) as page:
        pretend_answer(page, "abc")
        answer = ask_plain(page)
        expect(answer.locator(".text")).to_have_text("abc")
        expect(page.get_by_role("alert")).to_contain_text("broke off")


def test_a_proxy_that_says_when(server: ServerProcess, browser: Browser) -> None:
    """Retry-After may be a date."""
    headers = {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}
    with page_of(browser, server.url) as page:
        page.route("**/compare", lambda route: route.fulfill(status=429, headers=headers, body="<html>"))
        ask_plain(page)
        fault = page.get_by_role("alert")
        expect(fault).to_contain_text("answered 429")
        expect(fault).not_to_contain_text("NaN")


def test_a_job_that_ends_while_one_asks_to_cancel_it(server: ServerProcess, browser: Browser, job: str) -> None:
    """What is pressed then deletes nothing."""
    with page_of(browser, f"{server.url}/#/train/{job}") as page:
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("button", name="End the job")).to_be_visible()
        pretend(page, server, job, {"method": "lora", "evaluation": None}, adapter=None)
        expect(page.get_by_role("heading", name="waits")).to_contain_text("succeeded")
        expect(page.get_by_role("dialog")).to_have_count(0)


def test_a_file_that_is_dropped_beside_its_place(server: ServerProcess, browser: Browser) -> None:
    """It isn't opened in the page's place; a text is for the field on which it is dropped."""
    dropped = """(types) => types.map((type) => ["dragover", "drop"].map((name) => {
        const transfer = new DataTransfer();
        type === "file" ? transfer.items.add(new File(["x"], "rows.jsonl")) : transfer.setData("text/plain", "x");
        const init = {bubbles: true, cancelable: true, dataTransfer: transfer};
        return !document.querySelector("h1").dispatchEvent(new DragEvent(name, init));
    }))"""
    with page_of(browser, f"{server.url}/#/train/new") as page:
        expect(page.get_by_role("heading", name="Train")).to_be_visible()
        assert page.evaluate(dropped, ["file", "text"]) == [[True, True], [False, False]]


def test_the_focus_stays_where_something_was_done(server: ServerProcess, browser: Browser, job: str) -> None:
    """Though the button is gone then: who uses a keyboard or a screen reader isn't sent to the top of the page."""
    for weight in (0.5, 0.6, 0.7):
        made = server.client.post("/compositions/turned", json={"expression": f"plain*{weight}"})
        made.raise_for_status()
    with page_of(browser, f"{server.url}/#/adapters/turned") as page:
        versions = page.get_by_role("region", name="Versions of turned, as a table")
        rows = versions.locator("tbody tr")
        rows.nth(1).get_by_role("button", name="Actions for version 2").press("Enter")
        page.get_by_role("button", name="Use this version").press("Enter")
        expect(page.get_by_text("turned now means version 2.")).to_be_visible()
        expect(rows.nth(1).get_by_role("button", name="Actions for version 2")).to_be_focused()
        rows.first.get_by_role("button", name="Actions for version 3").press("Enter")
        page.get_by_role("button", name="Delete version 3…").press("Enter")
        page.keyboard.press("Enter")
        expect(versions.locator("tbody tr")).to_have_count(2)
        expect(versions).to_be_focused()
        page.goto(f"{server.url}/#/train/{job}")
        article = page.get_by_role("article", name="Job waits")
        article.get_by_role("button", name="Pause").press("Enter")
        expect(article.get_by_role("button", name="Resume")).to_be_visible()
        expect(article).to_be_focused()
        page.goto(f"{server.url}/#/train/new")
        drop(page, ".drop", {"few.jsonl": JSONL})
        page.get_by_label("Name").fill("keyboard")
        train = page.get_by_role("button", name="Train", exact=True)
        expect(train).to_be_enabled()  # once the rows are there
        train.press("Enter")
        page.wait_for_url("**/train/job-*")
        expect(page.locator(".sides > .chosen")).to_be_focused()


def test_a_dialog_has_the_focus_before_the_next_key(server: ServerProcess, browser: Browser) -> None:
    """A quick second Enter confirms. It doesn't open the menu again."""
    with page_of(browser, f"{server.url}/#/adapters/plain") as page:
        page.get_by_role("button", name="More actions for plain").click()
        focused = page.get_by_role("button", name="Delete adapter…").evaluate(
            "(item) => (item.click(), Promise.resolve().then(() => document.activeElement.textContent.trim()))"
        )
        assert focused == "Delete"


def test_an_alias_after_its_version_is_deleted(server: ServerProcess, browser: Browser) -> None:
    """The form for it names what is there."""
    for weight in (0.5, 0.6):
        made = server.client.post("/compositions/named", json={"expression": f"plain*{weight}"})
        made.raise_for_status()
    with page_of(browser, f"{server.url}/#/adapters/named") as page:
        article = page.get_by_role("article", name="named")
        article.get_by_text("Add alias").click()
        expect(article.get_by_label("Version", exact=True)).to_have_value("2")
        act(article.locator("tbody tr").first, "Delete version 2…")
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(article.locator("tbody tr")).to_have_count(1)
        article.get_by_label("Alias", exact=True).fill("prod")
        article.get_by_role("button", name="Set").click()
        expect(article.get_by_role("button", name="Remove the alias prod")).to_be_visible()
    assert server.client.get("/adapters/named").json()["aliases"] == {"prod": 1}


def test_a_form_waits_while_one_looks_elsewhere(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, f"{server.url}/#/train/new") as page:
        drop(page, ".drop", {"few.jsonl": JSONL})
        page.get_by_label("Name").fill("waited")
        page.get_by_text("More settings").click()
        page.get_by_label("Rank").fill("4")
        expect(page.get_by_label("Data set").locator("option:checked")).to_contain_text("4 rows")
        page.get_by_role("link", name="Adapters").click()
        expect(page.get_by_role("heading", name="Adapters")).to_be_visible()
        page.go_back()
        expect(page.get_by_label("Name")).to_have_value("waited")
        expect(page.get_by_label("Rank")).to_be_visible()
        expect(page.get_by_label("Rank")).to_have_value("4")
        page.get_by_role("button", name="Train", exact=True).click()
        page.wait_for_url("**/train/job-*")
        page.get_by_role("link", name="New job").click()
        expect(page.get_by_label("Name")).to_have_value("")
        page.get_by_text("More settings").click()
        expect(page.get_by_label("Rank")).to_have_value("")


def test_what_was_chosen_may_be_deleted_meanwhile(
    server: ServerProcess, browser: Browser, tiny_base: BaseModel, tmp_path: Path
) -> None:
    write(tmp_path, sample(tiny_base.config.shape, 2))
    server.upload("brief", tmp_path)
    with page_of(browser, f"{server.url}/#/train/new") as page:
        drop(page, ".drop", {"few.jsonl": JSONL})
        chosen = page.get_by_label("Data set").locator("option:checked")
        expect(chosen).to_contain_text("4 rows")
        rows = page.get_by_label("Data set").input_value()
        page.get_by_text("More settings").click()
        page.get_by_label("Start from").select_option("brief")
        page.get_by_role("link", name="Adapters").click()
        expect(page.get_by_role("heading", name="Adapters")).to_be_visible()
        server.client.delete("/adapters/brief").raise_for_status()
        held = held_back(page, "**/adapters?*", "GET")
        held_rows = held_back(page, "**/datasets", "GET")
        page.go_back()
        expect(page.get_by_label("Start from")).to_have_value("brief")  # as it would be sent
        expect(page.get_by_label("Data set")).to_have_value(rows)
        wait_for_number(page, held, 2)
        wait_for_number(page, held_rows, 1)
        for listing in (*held, *held_rows):
            listing.continue_()
        expect(chosen).to_contain_text("4 rows")
        expect(page.get_by_label("Start from").locator("option", has_text="brief")).to_have_count(0)
        expect(page.get_by_label("Start from")).to_have_value("")
        with page.expect_request("**/train?dry_run=true") as sent:
            page.get_by_role("button", name="Dry run").click()
        assert "start_from" not in json.loads(sent.value.post_data or "")


def test_a_data_set_that_nobody_needs_any_more(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, f"{server.url}/#/train/new") as page:
        drop(
            page,
            ".drop",
            {"a-long-name-" * 4 + "kept.jsonl": json.dumps({"prompt": "kept", "completion": "b"}).encode()},
        )
        chosen = page.get_by_label("Data set").locator("option:checked")
        expect(chosen).to_contain_text("kept.jsonl")
        kept = page.get_by_label("Data set").input_value()
        drop(page, ".drop", {"gone.jsonl": json.dumps({"prompt": "gone", "completion": "b"}).encode()})
        expect(chosen).to_contain_text("gone.jsonl")
        gone = page.get_by_label("Data set").input_value()
        delete_chosen(page)
        expect(chosen).to_have_text("choose one")
        expect(page.get_by_label("Data set").locator("option", has_text="gone.jsonl")).to_have_count(0)
        expect(page.locator(".drop")).not_to_contain_text("gone.jsonl")
        assert server.client.get(f"/datasets/{gone}").status_code == 404
        page.get_by_label("Data set").select_option(kept)
        assert violations(page) == []
        body = {"name": "needs", "dataset": kept}
        needs = server.client.post("/train", json=body).raise_for_status().json()["id"]
        delete_chosen(page)
        expect(page.get_by_role("alert")).to_contain_text("needs this data set")
        expect(page.get_by_label("Data set")).to_have_value(kept)
        page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
        assert not is_wider_than_the_screen(page)
    server.client.post(f"/train/{needs}/cancel").raise_for_status()


def test_rows_that_come_meanwhile_are_not_what_is_deleted(server: ServerProcess, browser: Browser) -> None:
    """Who is asked about some rows, while others are being sent, hasn't answered for those."""
    with page_of(browser, f"{server.url}/#/train/new") as page:
        drop(page, ".drop", {"asked.jsonl": json.dumps({"prompt": "asked", "completion": "b"}).encode()})
        chosen = page.get_by_label("Data set").locator("option:checked")
        expect(chosen).to_contain_text("asked.jsonl")
        held = held_back(page, "**/datasets")
        drop(page, ".drop", {"came.jsonl": json.dumps({"prompt": "came", "completion": "b"}).encode()})
        wait_for_number(page, held, 1)
        page.get_by_role("button", name="Delete these rows").click()
        expect(page.get_by_role("dialog")).to_contain_text("asked.jsonl")
        held[0].continue_()
        expect(chosen).to_contain_text("came.jsonl")
        expect(page.get_by_role("dialog")).to_have_count(0)


def delete_chosen(page: Page) -> None:
    page.get_by_role("button", name="Delete these rows").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()


def test_a_page_that_is_opened_begins_at_its_top(server: ServerProcess, browser: Browser, job: str) -> None:
    """For the keyboard: the first Tab is the skip link."""
    with page_of(browser, f"{server.url}/#/train/{job}") as page:
        expect(page.get_by_role("article", name="Job waits")).to_be_visible()
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()


def test_a_legend_after_the_window_has_another_size(server: ServerProcess, browser: Browser, job: str) -> None:
    """It has the last values still."""
    report = {"method": "lora", "evaluation": None, "curves": {"train_loss": [[1, 3.5], [2, 2.5]]}}
    with page_of(browser, server.url) as page:
        pretend(page, server, job, report, adapter=None)
        page.goto(f"{server.url}/#/train/{job}")
        legend = page.locator(".u-legend")
        expect(legend).to_contain_text("2.5")
        page.set_viewport_size({"width": 700, "height": 800})
        page.wait_for_timeout(500)
        expect(legend).to_contain_text("2.5")
