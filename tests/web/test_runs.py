"""Runs, their curves and their data on the page: what helps to choose between trained adapters."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from adapters.peft.files import write
from server.model.base.weights import BaseModel
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import wait_until
from tests.server.jobs.merge_kit import sample
from tests.web.browser import DESKTOP, PATIENCE, PHONE, act, drop, is_wider_than_the_screen, page_of, violations
from tests.web.jobs_kit import PUBLISHED, ROWS, submitted

pytestmark = pytest.mark.thorough  # test_page.py tests what everyone sees


@pytest.fixture(scope="module")
def server(
    browser: Browser, converted_tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server without keys and without a worker."""
    server = ServerProcess(tmp_path_factory.mktemp("home"), model=converted_tiny)
    yield server
    server.close()


@pytest.fixture
def job(server: ServerProcess) -> str:
    return submitted(server)


def test_a_view_is_loaded_when_it_is_first_shown(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, server.url) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.reload()
        expect(page.get_by_role("heading", name="Playground")).to_be_visible()
        assert not any(url.endswith("/views/train.js") for url in asked)
        page.get_by_role("link", name="Train", exact=True).click()
        expect(page.get_by_role("heading", name="Train")).to_be_visible()
        assert any(url.endswith("/views/train.js") for url in asked)


def test_a_view_that_cannot_be_loaded_offers_a_reload(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, server.url) as page:
        page.route("**/views/train.js", lambda route: route.fulfill(status=404, body=""))
        page.get_by_role("link", name="Train", exact=True).click()
        expect(page.get_by_role("alert")).to_contain_text("can't be loaded")
        page.unroute("**/views/train.js")
        page.get_by_role("button", name="Reload the page").click()
        expect(page.get_by_role("heading", name="Train")).to_be_visible()


LIVE = """() => {
    const real = window.fetch;
    const stream = new TransformStream();
    const writer = stream.writable.getWriter();
    window.report = (step, data) => {
        const at = "2026-01-01T00:00:00Z";
        const event = {seq: step, at, level: "info", type: "metrics", message: "", data: {step, ...data}};
        void writer.write(new TextEncoder().encode(`id: ${step}\\ndata: ${JSON.stringify(event)}\\n\\n`));
    };
    window.fetch = async (url, init) =>
        String(url).endsWith("/events") ? new Response(stream.readable) : real(url, init);
}"""
"""The page's stream of a job's events is what `report(step, data)` sends."""


def open_live(page: Page, server: ServerProcess, job: str, rate: float = 0.001) -> None:
    """Open a job that has reported ten steps, with a held-out loss at step 4 alone."""
    page.add_init_script(f"({LIVE})()")
    page.goto(f"{server.url}/#/train/{job}")
    page.reload()
    for step in range(1, 11):
        held = {"eval_loss": 0.553} if step == 4 else {}
        report_step(page, step, train_loss=6 / step, learning_rate=rate / step, gradient_norm=1 + step, **held)
    expect(page.locator(".chart .u-over").first).to_be_visible()


def report_step(page: Page, step: int, **data: float) -> None:
    page.evaluate("([step, data]) => window.report(step, data)", [step, data])


def picture(chart: Locator) -> str:
    return str(chart.locator("canvas").evaluate("(canvas) => canvas.toDataURL()"))


def drag_over(chart: Locator, first: float, last: float) -> None:
    """Drag over the chart between two shares of its width."""
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    assert box is not None
    mouse, middle = chart.page.mouse, box["y"] + box["height"] / 2
    mouse.move(box["x"] + first * box["width"], middle)
    mouse.down()
    mouse.move(box["x"] + last * box["width"], middle, steps=5)
    mouse.up()


def test_a_zoom_survives_the_next_step(server: ServerProcess, browser: Browser, job: str) -> None:
    with page_of(browser, server.url) as page:
        open_live(page, server, job)
        figure = page.locator(".chart").filter(has_text="Loss by step")
        figure.get_by_text("As a table").click()
        rows = figure.locator("details tbody tr")
        expect(rows).to_have_count(10)
        drag_over(figure.locator(".u-over"), 0.25, 0.75)
        zoom = figure.locator(".zoom small")
        expect(zoom).to_have_text(re.compile(r"^step 3\.\d+ to 7\.\d+$"))
        before = zoom.inner_text()
        report_step(page, 11, train_loss=0.5)
        expect(rows).to_have_count(11)
        expect(zoom).to_have_text(before)
        figure.get_by_role("button", name="Reset zoom").click()
        expect(zoom).to_have_text("Drag over the chart to zoom in.")


def test_the_legend_keeps_the_last_held_out_loss(server: ServerProcess, browser: Browser, job: str) -> None:
    with page_of(browser, server.url) as page:
        open_live(page, server, job)
        legend = page.locator(".chart .u-legend").first
        expect(legend).to_contain_text("0.553 (at 4)")
        expect(legend).to_contain_text("0.6")  # training, at step 10


def test_curves_are_smoothed_and_logarithmic(server: ServerProcess, browser: Browser, job: str) -> None:
    with page_of(browser, server.url) as page:
        open_live(page, server, job)
        figure = page.locator(".chart").filter(has_text="Loss by step")
        figure.get_by_text("As a table").click()
        expect(figure.locator("details tbody tr")).to_have_count(10)
        page.get_by_label("Smoothing").fill("0.5")
        expect(figure.locator("details thead th")).to_have_text(
            ["step", "training", "training, smoothed", "held-out"]
        )
        expect(figure.locator("details tbody tr").nth(1).locator("td").nth(1)).to_have_text(
            "4.000"
        )  # (0.5·6 + 3) / 1.5
        linear = picture(figure)
        page.get_by_label("Logarithmic").check()
        wait_until(lambda: picture(figure) != linear, what="a logarithmic chart")
        page.get_by_text("Learning rate and gradient norm").click()
        for title, wanted in (("Learning rate by step", "0.0001000"), ("Gradient norm by step", "11.00")):
            course = page.locator(".chart").filter(has_text=title)
            course.get_by_text("As a table").click()
            expect(course.locator("details tbody tr").last.locator("td")).to_have_text(wanted)
        assert violations(page) == []


WRITTEN = """() => {
    window.written = new Set();
    const real = CanvasRenderingContext2D.prototype.fillText;
    CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
        window.written.add(text);
        return real.call(this, text, ...rest);
    };
}"""
"""`written` has the texts that charts draw."""


def test_ticks_of_small_values_are_exact(server: ServerProcess, browser: Browser, job: str) -> None:
    with page_of(browser, server.url) as page:
        page.add_init_script(f"({WRITTEN})()")
        open_live(page, server, job, rate=0.0004)
        page.get_by_text("Learning rate and gradient norm").click()
        wait_for(page, lambda: page.evaluate("[...written].some((text) => /^0\\.000[1-9]/.test(text))"))


MEASURED = {"slow": (0.0001, 2.35, 0.25), "fast": (0.01, 1.83, 0.96), "unmeasured": (0.001, None, None)}
"""By name: a run's learning rate, held-out loss and recall."""


@pytest.fixture
def runs(server: ServerProcess) -> list[dict[str, Any]]:
    """Queue the runs, and return them as if they had succeeded, except one that still waits."""
    found = []
    for number, (name, (rate, held, recall)) in enumerate(MEASURED.items()):
        body = {"name": name, "data": ROWS, "training": {"learning_rate": rate, "max_steps": 4}}
        job = server.client.post("/train", json=body).raise_for_status().json()
        if held is not None:
            job |= {
                "status": "succeeded",
                "adapter": PUBLISHED | {"name": name},
                "metrics": {
                    "eval_loss": held,
                    "base_eval_loss": 4.61,
                    "recall": recall,
                    "eval_exact_match": None if recall is None else 1 - recall,
                },
                "started_at": "2026-01-01T00:00:00Z",
                "finished_at": f"2026-01-01T00:0{number + 1}:00Z",
            }
        found.append(job)
    return found


def pretend_runs(page: Page, runs: list[dict[str, Any]]) -> None:
    """Answer the page with these jobs alone. A job that succeeded has reported four steps."""
    page.route(re.compile(r"/train(\?.*)?$"), lambda route: route.fulfill(json={"jobs": runs, "next": None}))

    def events(route: Route) -> None:
        (run,) = (run for run in runs if run["id"] in route.request.url)
        held = run["metrics"].get("eval_loss")
        steps = [{"step": step, "train_loss": 4 / step, "eval_loss": held} for step in range(1, 5)]
        fields = {"at": "2026-01-01T00:00:00Z", "level": "info", "type": "metrics", "message": ""}
        route.fulfill(json=[fields | {"seq": data["step"], "data": data} for data in steps if held])

    page.route("**/events?limit=*", events)


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_runs_are_sorted_and_compared(
    server: ServerProcess, browser: Browser, runs: list[dict[str, Any]], size: tuple[int, int]
) -> None:
    with page_of(browser, server.url, size) as page:
        pretend_runs(page, runs)
        page.goto(f"{server.url}/#/train")
        listed = page.get_by_role("navigation", name="Jobs")
        expect(listed).to_contain_text("held-out loss 1.83")
        expect(listed.get_by_role("link", name="unmeasured")).to_contain_text("learning rate 0.001")
        expect(listed).to_contain_text("just now")
        page.get_by_role("link", name="Compare runs").click()
        table = page.get_by_role("region", name="Runs, as a table")
        names = table.locator("tbody th a")
        expect(names).to_have_count(3)
        for column, wanted in (
            ("Held-out loss", ["fast", "slow", "unmeasured"]),
            ("Held-out loss", ["slow", "fast", "unmeasured"]),  # the other way round; unknown values stay last
            ("Held-out answers right", ["fast", "slow", "unmeasured"]),
            ("Recall", ["slow", "fast", "unmeasured"]),
            ("Learning rate", ["slow", "unmeasured", "fast"]),
            ("Name", ["fast", "slow", "unmeasured"]),
        ):
            table.get_by_role("button", name=column).click()
            expect(names).to_have_text(wanted)
        expect(table.locator("th[aria-sort=ascending]")).to_contain_text("Name")
        for name in ("fast", "slow"):
            table.get_by_role("checkbox", name=f"Compare {name},").check()
        expect(page.locator(".chart")).to_have_count(2)
        curve = page.locator(".chart").filter(has_text="Held-out loss by step")
        curve.get_by_text("As a table").click()
        expect(curve.locator("details tbody tr").first.locator("td")).to_have_text(["1.830", "2.350"])
        differing = page.get_by_role("region", name="Settings that differ, as a table").locator("tbody tr")
        expect(differing).to_have_count(1)
        expect(differing.first).to_have_text(re.compile(r"^Learning rate\s*0.01\s*0.0001$"))
        assert violations(page) == []
        assert not is_wider_than_the_screen(page)
        page.reload()  # the chosen runs are in the address
        expect(differing).to_have_count(1)


@pytest.fixture(scope="module")
def versions(server: ServerProcess, tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Upload ten adapters. `a` has seven versions, the newest of all adapters."""
    directory = tmp_path_factory.mktemp("adapter")
    for number in range(16):
        write(directory, sample(tiny_base.config.shape, number, rank=2))
        server.upload("bcdefghij"[number] if number < 9 else "a", directory)


def measured(page: Page, server: ServerProcess, **fields: object) -> None:
    """Answer the page as if jobs had measured each version. `fields` are other fields of each version."""
    listed = server.client.get("/adapters").json()
    for adapter in listed["adapters"]:
        for version in adapter["versions"]:
            version["metrics"] = {"eval_loss": 1.83, "base_eval_loss": 4.61, "recall": 0.96}
            version.update(fields)
    page.route(re.compile(r"/adapters\?limit"), lambda route: route.fulfill(json=listed))


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_the_deciding_columns_of_versions_are_in_sight(
    server: ServerProcess, browser: Browser, size: tuple[int, int]
) -> None:
    with page_of(browser, server.url, size) as page:
        measured(page, server)
        page.goto(f"{server.url}/#/adapters/a")
        table = page.get_by_role("region", name="Versions of a, as a table")
        expect(table.locator("tbody tr")).to_have_count(7)
        held = table.locator("tbody tr").first.locator("td").first
        expect(held).to_have_text(re.compile("^1\\.83\\s*\N{MINUS SIGN}2\\.78$"))
        box, inside = held.bounding_box(), table.bounding_box()
        assert box is not None
        assert inside is not None
        assert box["x"] + box["width"] <= inside["x"] + inside["width"]
        page.get_by_role("button", name="Actions for version 1").click()
        menu = page.locator(".menu:popover-open")
        expect(menu.get_by_role("button")).to_have_text(["Use this version", "Download", "Delete version 1…"])
        expect(menu.get_by_role("button").last).to_be_in_viewport(ratio=1)
        assert violations(page) == []
        assert not is_wider_than_the_screen(page)


@pytest.mark.usefixtures("versions")
def test_all_columns_of_versions_fit_a_laptop(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, server.url, (1366, 768)) as page:
        measured(page, server, verdict="can't tell", resident=True, warnings=["rounded"], bytes=1_950_000)
        page.goto(f"{server.url}/#/adapters/a")
        table = page.get_by_role("region", name="Versions of a, as a table")
        expect(table.locator("tbody tr").first).to_contain_text("no clear difference")
        assert table.evaluate("(of) => of.scrollWidth <= of.clientWidth")
        expect(table.locator("tbody tr").first.locator("td").last).to_be_in_viewport(ratio=1)


@pytest.mark.usefixtures("versions")
def test_recent_adapters_come_first(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, server.url) as page:
        measured(page, server)
        page.goto(f"{server.url}/#/adapters")
        expect(page.get_by_role("heading", name="Your project's 10")).to_be_visible()
        names = page.locator("ul.names .name")
        assert names.all_inner_texts() == list("ajihgfedcb")
        expect(page.locator("ul.names li").first).to_contain_text("7 versions · held-out loss 1.83")
        expect(page.get_by_role("form", name="Upload")).to_be_in_viewport()
        page.get_by_role("searchbox", name="Find").fill("zzz")
        expect(page.get_by_text("No adapter has “zzz” in its name.")).to_be_visible()


@pytest.mark.usefixtures("versions")
def test_a_rollback_is_selected_and_undone(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, f"{server.url}/#/adapters/a") as page:
        row = page.get_by_role("region", name="Versions of a, as a table").get_by_role("row").nth(5)
        act(row, "Use this version")
        expect(page.get_by_role("region", name="Version 3", exact=True)).to_be_visible()
        expect(row).to_contain_text("in use")
        assert server.client.get("/adapters/a").json()["latest"] == 3
        page.get_by_role("button", name="Undo").click()
        expect(page.get_by_role("region", name="Version 7", exact=True)).to_be_visible()
        assert server.client.get("/adapters/a").json()["latest"] == 7
        page.get_by_role("button", name="More actions for a").click()
        page.get_by_role("button", name="Delete adapter…").click()
        expect(page.get_by_role("dialog")).to_contain_text("All versions of a will be deleted.")
        page.get_by_role("button", name="Keep it").click()
        server.client.post("/compositions/gone", json={"expression": "a*0.5"}).raise_for_status()
        page.goto(f"{server.url}/#/adapters/gone")
        act(page.get_by_role("article", name="gone"), "Delete adapter…")
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(page.get_by_role("status").filter(has_text="gone was deleted.")).to_be_visible()


@pytest.mark.usefixtures("versions")
def test_a_phone_shows_the_list_or_the_detail(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, f"{server.url}/#/adapters", PHONE) as page:
        page.locator("ul.names").get_by_role("link").first.click()
        expect(page.get_by_role("article", name="a", exact=True)).to_be_in_viewport()
        expect(page.locator("ul.names")).to_be_hidden()
        page.get_by_role("link", name="All adapters").click()
        expect(page.locator("ul.names")).to_be_visible()
        expect(page.get_by_role("article")).to_have_count(0)


@pytest.mark.usefixtures("versions")
def test_a_list_that_has_not_changed_is_not_sent_again(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, f"{server.url}/#/adapters") as page:
        expect(page.locator("ul.names li")).not_to_have_count(0)
        with page.expect_response(lambda response: "/adapters?limit" in response.url) as polled:
            pass
        assert polled.value.status == 304
        page.goto(f"{server.url}/#/adapters/b")
        expect(page.get_by_role("article", name="b", exact=True)).to_be_visible()


def test_a_training_is_stopped_and_keeps_its_best(server: ServerProcess, browser: Browser, job: str) -> None:
    described = server.client.get(f"/train/{job}").json()
    described["progress"] |= {"step": 55, "total_steps": 90, "eta_seconds": 900}
    described["status"] = "running"
    with page_of(browser, server.url) as page:
        page.route(f"**/train/{job}", lambda route: route.fulfill(json=described))
        page.route(f"**/train/{job}/stop", lambda route: route.fulfill(json=described))
        page.goto(f"{server.url}/#/train/{job}")
        article = page.get_by_role("article", name="Job waits")
        expect(article.get_by_text("Step 55 of 90, about 15 min to go")).to_be_visible()
        expect(article.get_by_role("status")).to_have_text("60 % trained")  # read aloud each 10 %
        article.get_by_role("button", name="Stop and keep the best").click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("Training ends after step 55")
        assert violations(page) == []
        with page.expect_request(f"**/train/{job}/stop"):
            dialog.get_by_role("button", name="Stop").click()
        described["status"] = "paused"
        expect(article.get_by_text("Paused at step 55 of 90.")).to_be_visible()


def test_a_request_is_edited_as_json(server: ServerProcess, browser: Browser) -> None:
    content = "".join(json.dumps({"prompt": f"ask {number}", "completion": "b"}) + "\n" for number in range(8))
    with page_of(browser, f"{server.url}/#/train/new") as page:
        drop(page, ".drop", {"rows.jsonl": content.encode()})
        expect(page.get_by_label("Data set").locator("option:checked")).to_contain_text("rows.jsonl")
        page.get_by_label("Name").fill("edited")
        page.get_by_text("More settings").click()
        page.get_by_label("Early stopping").fill("3")
        page.get_by_label("Schedule").select_option("linear")
        page.get_by_label("Modules").fill("q_proj, v_proj")
        page.get_by_text("The request as JSON").click()
        request = page.get_by_role("textbox", name="Request")
        body = json.loads(request.input_value())
        assert body["training"] == {"early_stopping_patience": 3, "schedule": "linear"}
        assert body["lora"] == {"target_modules": ["q_proj", "v_proj"]}
        request.fill("{")
        expect(page.get_by_role("alert")).to_contain_text("This isn't a request yet")
        body |= {"alias": "prod", "lora": {"rank": 4, "use_rslora": True}, "validation": 0.5}
        body["training"] |= {"seed": 7, "packing": False, "eval_steps": 2}
        request.fill(json.dumps(body))
        for label, value in {"Rank": "4", "Seed": "7", "Alias": "prod", "Evaluate every (steps)": "2"}.items():
            expect(page.get_by_label(label, exact=True)).to_have_value(value)
        assert violations(page) == []
        with page.expect_request("**/train?dry_run=true") as sent:
            page.get_by_role("button", name="Dry run").click()
        assert sent.value.post_data_json == body
        expect(page.get_by_role("status", name="Dry run")).to_be_visible()


def test_rows_are_looked_at_and_excluded(
    browser: Browser, converted_tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On an empty server, sample rows are the first data set."""
    server = ServerProcess(tmp_path_factory.mktemp("home"), model=converted_tiny)
    try:
        with page_of(browser, f"{server.url}/#/train/data", PHONE) as page:
            page.get_by_role("button", name="Use sample rows").click()
            rows = page.get_by_role("region", name="Rows, as a table").locator("tbody tr")
            expect(rows).to_have_count(28)
            expect(rows.filter(has_text="validation")).not_to_have_count(0)
            assert not is_wider_than_the_screen(page)
            assert violations(page) == []
            page.get_by_label("Search in rows").fill("not FOUND")
            expect(rows).to_have_count(1)
            expect(rows.locator("th")).to_have_text("15")
            rows.get_by_role("checkbox").check()
            page.get_by_label("Search in rows").fill("")
            expect(page.get_by_text("1 row excluded.")).to_be_visible()
            page.get_by_role("button", name="Make a data set without it").click()
            expect(page.get_by_role("heading", name="http-codes-27-rows.jsonl")).to_be_visible()
            expect(rows).to_have_count(27)
            content = [{"text": "twice"}] * 2 + [{"text": f"once {number}"} for number in range(59)]
            lines = "\n".join(map(json.dumps, content))
            many = server.client.post("/datasets", files={"file": ("many.jsonl", lines)}).json()["id"]
            page.goto(f"{server.url}/#/train/data/{many}")
            expect(page.get_by_text("61 rows, 1 duplicate")).to_be_visible()
            expect(rows.first).to_contain_text("2 copies")
            page.get_by_role("button", name="Next").click()
            expect(page.get_by_text(re.compile("51.61 of 61"))).to_be_visible()
            expect(rows).to_have_count(11)
            page.get_by_role("button", name="Train on these rows").click()
            expect(page.get_by_label("Data set")).to_have_value(many)
    finally:
        server.close()


def metrics(second: int) -> str:
    """Return the engine's metrics as if it had answered one request in each of these seconds."""
    buckets = {"0.1": 0, "0.2": second // 2, "0.4": second, "+Inf": second}
    lines = [f'smolora_time_to_first_token_seconds_bucket{{le="{le}"}} {number}' for le, number in buckets.items()]
    lines += [
        f'smolora_requests_total{{outcome="{of}"}} {number}' for of, number in (("completed", 9), ("failed", 1))
    ]
    lines += [f'smolora_adapter_requests_total{{adapter="a{number}"}} {number}' for number in range(20)]
    return "\n".join([*lines, "smolora_requests_running 3", f"smolora_generated_tokens_total {100 * second}", ""])


def test_the_engine_shows_latencies_traffic_and_gaps(server: ServerProcess, browser: Browser) -> None:
    answered: list[str] = []

    def answer(route: Route) -> None:
        answered.append(route.request.url)
        route.fulfill(body=metrics(10 * len(answered)), content_type="text/plain")

    with page_of(browser, server.url) as page:
        page.clock.install(time=1_800_000_000)
        page.route("**/metrics?all_replicas=true", answer)
        page.goto(f"{server.url}/#/engine")
        tile = page.locator(".figures > div").filter(has_text="To the first token")
        expect(tile).to_contain_text(re.compile(r"200.ms.*380.ms.*since this view was opened"))
        busiest = page.get_by_role("region", name="Busiest adapters, as a table").locator("tbody tr")
        expect(busiest).to_have_count(12)
        expect(busiest.first).to_contain_text("a19")
        outcomes = page.get_by_role("region", name="Requests by outcome, as a table").locator("tbody tr")
        expect(outcomes.last).to_have_text(re.compile("failed.*1.*10.%"))
        page.get_by_role("link", name="Keys and usage").click()
        expect(page.get_by_role("heading", name="Keys and usage")).to_be_visible()
        page.clock.fast_forward(60_000)
        asked = len(answered)
        page.get_by_role("link", name="Engine").click()
        chart = page.locator(".chart").filter(has_text="Answers")
        expect(chart.locator("canvas")).to_be_visible()
        wait_for(page, lambda: len(answered) > asked + 2)
        assert curve_at(chart, 0.98)
        assert not curve_at(chart, 0.5)  # nobody read the metrics meanwhile
        assert violations(page) == []


def wait_for(page: Page, condition: Callable[[], bool]) -> None:
    """Wait while the page's requests are handled."""
    end = time.monotonic() + PATIENCE / 1000
    while not condition() and time.monotonic() < end:
        page.wait_for_timeout(50)
    assert condition()


def curve_at(chart: Locator, share: float) -> bool:
    """Return whether the first curve is drawn near that share of the chart's width, and right of it."""
    return bool(
        chart.locator("canvas").evaluate(
            """(canvas, share) => {
                const { width, height } = canvas;
                const [left, wide] = [Math.round(width * (share - 0.03)), Math.round(width * 0.05)];
                const { data } = canvas.getContext("2d").getImageData(left, 0, wide, height);
                const isCurve = (at) => data[at] === 15 && data[at + 1] === 107 && data[at + 2] === 92;
                return [...Array(data.length / 4).keys()].some((pixel) => isCurve(4 * pixel));
            }""",
            share,
        )
    )


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize("scheme", ["light", "dark", "forced"])
def test_views_of_runs_are_accessible(
    server: ServerProcess, browser: Browser, runs: list[dict[str, Any]], scheme: str
) -> None:
    """By axe-core's rules, also in forced colours."""
    with page_of(browser, server.url, scheme="dark" if scheme == "dark" else "light") as page:
        if scheme == "forced":
            page.emulate_media(forced_colors="active")
        pretend_runs(page, runs)
        chosen = "/".join(str(run["id"]) for run in runs[:2])
        others = ("train/data", "train/new", "adapters/a", "adapters", "engine", "access")
        for path in (f"train/runs/{chosen}", *others):
            page.goto(f"{server.url}/#/{path}")
            page.wait_for_load_state("networkidle")
            expect(page.get_by_text("Loading…")).to_have_count(0)
            assert violations(page) == [], path
