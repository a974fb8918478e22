"""The playground: a board of equal columns, threads, links, history, code, and what screen readers get."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, FloatRect, Locator, Page, expect

from adapters.peft.files import write
from server.model.base.weights import BaseModel
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import wait_until
from tests.server.jobs.merge_kit import sample
from tests.web.browser import DESKTOP, PATIENCE, PHONE, is_wider_than_the_screen, page_of, violations

pytestmark = pytest.mark.thorough  # test_page.py tests what everyone sees


@pytest.fixture(scope="module")
def server(
    browser: Browser, tiny_base: BaseModel, converted_tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Start a server with a worker, without keys, with the adapters `plain` (two versions) and `other`."""
    server = ServerProcess(tmp_path_factory.mktemp("home"), model=converted_tiny, workers=1)
    for seed, name in enumerate(("plain", "plain", "other")):
        directory = tmp_path_factory.mktemp(name)
        write(directory, sample(tiny_base.config.shape, seed))
        server.upload(name, directory)
    yield server
    server.close()


@pytest.fixture
def page(server: ServerProcess, browser: Browser) -> Iterator[Page]:
    with page_of(browser, server.url) as page:
        yield page


def setting(page: Page, label: str, value: str) -> None:
    field = page.get_by_label(label, exact=True)
    if not field.is_visible():
        page.get_by_text("Settings", exact=True).click()
    field.fill(value)


def ask(page: Page, text: str, expression: str = "plain", max_tokens: int = 8, is_chat: bool = False) -> None:
    page.get_by_label("Question" if is_chat else "Text to continue", exact=True).first.check()
    page.get_by_role("textbox", name="Question" if is_chat else "Text", exact=True).fill(text)
    page.get_by_label("Expression").fill(expression)
    setting(page, "Max tokens", str(max_tokens))
    page.get_by_role("button", name="Generate", exact=True).click()
    ended(page)


def ended(page: Page) -> None:
    expect(page.get_by_role("article").first).to_be_visible()
    expect(page.locator("[aria-busy=true]")).to_have_count(0)


def column(page: Page, expression: str) -> Locator:
    return page.get_by_role("article", name=f"Answer of {expression}", exact=True)


def texts(page: Page, expression: str) -> list[str]:
    return column(page, expression).locator("p.text").all_text_contents()


def tokens(page: Page, expression: str) -> Locator:
    """Return the tokens with letters. The model's weights are random, so others may be parts of characters."""
    return column(page, expression).locator(".token").filter(has_text=re.compile("[a-z]"))


def boxes(locator: Locator) -> list[FloatRect]:
    return [box for box in (one.bounding_box() for one in locator.all()) if box is not None]


def test_columns_are_equal_and_the_base_is_first(page: Page) -> None:
    page.get_by_label("Expression").fill("plain+other")
    page.get_by_label("plain alone").check()
    page.get_by_label("other alone").check()
    page.get_by_label("the base").uncheck()
    page.get_by_label("the base").check()
    ask(page, "ab", "plain+other", 100)
    columns = page.locator(".board article")
    assert [one.get_attribute("aria-label") for one in columns.all()] == [
        f"Answer of {of}" for of in ("base", "plain+other", "plain", "other")
    ]
    found = boxes(columns)
    assert {round(box["y"]) for box in found} == {round(found[0]["y"])}
    widths = [box["width"] for box in found]
    assert max(widths) - min(widths) < 1
    assert min(widths) > 250
    page.set_viewport_size({"width": 2560, "height": 1000})
    assert sum(box["width"] for box in boxes(columns)) > 2000
    assert not is_wider_than_the_screen(page)


def test_inspector_is_at_its_token_with_bars_on_one_scale(page: Page) -> None:
    ask(page, "ab", "plain", 250)
    token = tokens(page, "plain").first
    token.hover()
    inspector = page.locator(".inspector")
    expect(inspector).to_be_visible()
    (place,), (box,) = boxes(token), boxes(inspector)
    assert 0 <= box["y"] - (place["y"] + place["height"]) < 20
    meters = [round(meter["width"]) for meter in boxes(inspector.locator("meter"))]
    assert len(meters) == 10
    assert len(set(meters)) == 1
    page.mouse.move(0, 0)
    expect(inspector).to_have_count(0)
    token.click()
    page.mouse.move(0, 0)
    expect(inspector).to_be_visible()  # as on a phone, which has no pointer to rest
    token.click()
    expect(inspector).to_have_count(0)


def test_inspector_is_not_cut_off_by_the_board(page: Page) -> None:
    """Though short answers make the board lower than the inspector, and the right column is at its end."""
    ask(page, "ab", "plain", 4)
    column(page, "plain").get_by_role("button", name="Inspect tokens").click()
    expect(page.locator(".inspector")).to_be_in_viewport(ratio=1)
    board = page.get_by_role("region", name="Answers")
    assert board.evaluate("(of) => of.scrollHeight <= of.clientHeight")


def test_the_kind_of_prompt_fits_the_adapter(server: ServerProcess, browser: Browser) -> None:
    """Or the page says so: an adapter seems not to have learned anything under the other kind."""
    listed = server.client.get("/adapters?limit=500").json()
    (plain,) = (adapter for adapter in listed["adapters"] if adapter["name"] == "plain")
    kinds = {1: {"messages": 4}, 2: {"completion": 4}}
    for version in plain["versions"]:
        version["config"]["kinds"] = kinds[version["version"]]
    with page_of(browser, server.url) as page:
        page.route("**/adapters?limit=*", lambda route: route.fulfill(json=listed))
        page.reload()
        page.get_by_label("plain", exact=True).check()
        hint = page.get_by_role("status").filter(has_text="learned from")
        expect(hint).to_have_text(re.compile("plain learned from plain prompts:\\s*use Text to continue"))
        hint.get_by_role("button").click()
        expect(page.get_by_role("radio", name="Text to continue")).to_be_checked()
        expect(hint).to_have_count(0)
        page.get_by_label("Version of plain").select_option("1")
        expect(hint).to_have_text(re.compile("plain learned from questions of a chat:\\s*use Question"))
        assert violations(page) == []


def test_another_version_of_an_adapter_is_added(page: Page) -> None:
    page.get_by_label("plain", exact=True).check()
    page.get_by_role("button", name="Add version 1").click()
    expect(page.get_by_label("Expression")).to_have_value("plain+plain@1")
    expect(page.get_by_label("plain@1 alone")).to_be_visible()
    expect(page.get_by_role("button", name=re.compile("^Add version"))).to_have_count(0)


def test_tokens_of_a_prompt_are_counted(server: ServerProcess, page: Page) -> None:
    page.get_by_role("textbox", name="Question").fill("of whom?")
    page.get_by_role("button", name="Count tokens").click()
    messages = [{"role": "user", "content": "of whom?"}]
    counted = server.client.post("/tokenize", json={"messages": messages}).json()
    words = page.get_by_text("prompt and answer together")
    expect(words).to_have_text(
        f"{counted['count']} tokens; prompt and answer together may have {counted['max_model_len']:,}"
    )
    page.get_by_role("textbox", name="Question").fill("of what?")
    expect(words).to_have_count(0)


def test_answers_are_in_sight_wherever_the_form_is_sent(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, server.url, (1280, 500)) as page:
        page.get_by_role("textbox", name="Question").fill("of whom?")
        setting(page, "Max tokens", "4")
        page.get_by_label("Seed", exact=True).press("Enter")
        ended(page)
        expect(column(page, "base").get_by_role("heading")).to_be_in_viewport()
        expect(page.get_by_label("Seed", exact=True)).to_be_in_viewport()


def test_one_click_is_one_request(page: Page) -> None:
    posted: list[str] = []
    page.on("request", lambda request: posted.append(request.url) if request.method == "POST" else None)
    ask(page, "ab", "plain+other")
    expect(tokens(page, "plain+other").first).to_be_visible()
    assert [url.rsplit("/", 1)[1] for url in posted] == ["compare"]


def test_a_rate_limit_is_shown_once_and_can_be_retried(page: Page) -> None:
    problem = {"title": "Too Many Requests", "status": 429, "detail": "Rate limit: 3 requests a minute"}
    page.route(
        "**/compare",
        lambda route: route.fulfill(status=429, headers={"Retry-After": "2"}, body=json.dumps(problem)),
        times=1,
    )
    ask(page, "ab")
    expect(page.get_by_role("alert")).to_have_count(1)
    expect(page.get_by_role("alert")).to_contain_text("3 requests a minute")
    page.get_by_role("button", name="Retry", exact=True).click()  # once it is enabled
    ended(page)
    expect(page.get_by_role("alert")).to_have_count(0)
    assert all(texts(page, "plain") + texts(page, "base"))


def test_columns_share_a_seed_that_can_be_pinned(page: Page) -> None:
    sent: list[object] = []
    page.on(
        "request",
        lambda request: sent.append(json.loads(request.post_data or "")["seed"]) if request.post_data else None,
    )
    setting(page, "Temperature", "1")
    ask(page, "ab")
    seeds = page.get_by_role("button", name=re.compile("^Seed "))
    expect(seeds).to_have_text([f"Seed {sent[0]}"] * 2)
    seeds.first.click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value(str(sent[0]))
    page.get_by_role("button", name="Generate", exact=True).click()
    ended(page)
    assert sent == [sent[0]] * 2


def test_an_answer_that_was_cut_off_goes_on(server: ServerProcess, page: Page) -> None:
    page.get_by_text("Settings", exact=True).click()
    expect(page.get_by_label("Max tokens")).to_have_value("256")
    ask(page, "ab", max_tokens=6)
    (first,) = texts(page, "plain")
    column(page, "plain").get_by_role("button", name="Continue").click()
    ended(page)
    rest = server.text("ab" + first, adapter="plain", max_tokens=6)
    assert texts(page, "plain") == [first + rest]
    expect(tokens(page, "plain").first).to_be_attached()  # all of them were scored


def test_two_answers_are_compared_word_by_word(page: Page) -> None:
    said = [(0, "The code means Not Found."), (1, "The code means Gone.")]
    end = {"finish_reason": "stop", "seed": 1, "warnings": [], "adapters": []}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0}
    events = [
        {"result": place, "text": text, **end, "usage": usage, "timing": {"ttft_ms": 1, "total_ms": 1}}
        for place, text in said
    ]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/compare", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, "ab")
    page.get_by_label("Show").select_option(label="differences from base")
    article = column(page, "plain")
    expect(article.locator("del")).to_have_text(["Not Found"])
    expect(article.locator("ins")).to_have_text(["Gone"])


def test_the_address_has_the_request(server: ServerProcess, page: Page) -> None:
    ask(page, "first & ä", "plain*0.7+other", 7)
    ask(page, "second", "other", 7)
    page.go_back()
    field = page.get_by_role("textbox", name="Text")
    expect(field).to_have_value("first & ä")
    expect(page.get_by_label("Expression")).to_have_value("plain*0.7+other")
    page.reload()
    expect(field).to_have_value("first & ä")
    expect(page.get_by_label("Expression")).to_have_value("plain*0.7+other")
    page.get_by_text("Settings", exact=True).click()
    expect(page.get_by_label("Max tokens")).to_have_value("7")
    page.get_by_role("link", name="Engine").click()
    page.get_by_role("link", name="Playground").click()
    expect(field).to_have_value("first & ä")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    field.fill("third")
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_text("Copied.")).to_be_visible()
    link = page.evaluate("navigator.clipboard.readText()")
    assert link.startswith(f"{server.url}/#/playground?")  # behind the #: no server sees it
    other = page.context.new_page()
    other.goto(link)
    expect(other.get_by_role("textbox", name="Text")).to_have_value("third")


def test_earlier_runs_are_kept_and_exported(page: Page, tmp_path: Path) -> None:
    ask(page, "first", "plain", 5)
    first = texts(page, "plain")
    ask(page, "second", "other", 5)
    page.get_by_text("History (2)").click()
    page.get_by_role("button", name=re.compile("^first")).click()
    assert texts(page, "plain") == first
    expect(page.get_by_role("textbox", name="Text")).to_have_value("first")
    saved = {}
    for kind in ("Markdown", "JSON"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Export {kind}").click()
        download.value.save_as(tmp_path / kind)
        saved[kind] = (tmp_path / kind).read_text("utf-8")
    run = json.loads(saved["JSON"])
    assert [answer["expression"] for answer in run["answers"]] == ["base", "plain"]
    assert run["answers"][1]["turns"][0]["text"] == first[0]
    assert "## `plain`" in saved["Markdown"]
    assert first[0] in saved["Markdown"]
    for kind in ("Markdown", "JSON"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Export all as {kind}").click()
        download.value.save_as(tmp_path / kind)
        saved[kind] = (tmp_path / kind).read_text("utf-8")
    asked = [run["answers"][0]["turns"][0]["asked"] for run in json.loads(saved["JSON"])]
    assert asked == ["second", "first"]
    assert saved["Markdown"].count("# Playground, ") == 2


@pytest.mark.parametrize("is_chat", [False, True])
def test_code_does_what_the_page_does(page: Page, is_chat: bool) -> None:
    """It asks for the answer of each column, or of the only one."""
    ask(page, 'it\'s "so"', "plain*0.5", 6, is_chat)
    columns = [texts(page, name)[0] for name in ("base", "plain*0.5")]
    page.get_by_role("button", name="View code").click()
    run_code(page, columns)
    page.get_by_role("group", name="Answered side by side").get_by_label("base").uncheck()
    run_code(page, columns[1:])


def run_code(page: Page, columns: list[str]) -> None:
    code = page.get_by_role("region", name="Code")
    for language in ("curl", "Python", "openai"):
        page.get_by_role("button", name=language, exact=True).click()
        assert code.evaluate("(of) => of.scrollWidth <= of.clientWidth")  # long lines are wrapped
        source = code.inner_text()
        command = ["bash", "-c", source] if language == "curl" else [sys.executable, "-c", source]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if language == "curl":
            answers = [json.loads(line)["choices"][0]["text"] for line in printed.splitlines()]
            assert answers == columns, language
        else:
            assert printed == "".join(f"{text}\n" for text in columns), language


def test_each_column_is_a_thread(server: ServerProcess, page: Page) -> None:
    page.get_by_label("System message").fill("be brief")
    ask(page, "of whom?", max_tokens=6, is_chat=True)
    page.get_by_role("textbox", name="Reply").fill("and why?")
    page.get_by_role("button", name="Send").click()
    ended(page)
    for name in ("base", "plain"):
        _, first, _, second = texts(page, name)
        messages = [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "of whom?"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "and why?"},
        ]
        body = {"messages": messages, "adapter": name, "max_tokens": 6, "temperature": 0}
        assert server.client.post("/generate", json=body).json()["choices"][0]["text"] == second
    plain = column(page, "plain")
    plain.get_by_role("button", name="Edit").first.click()
    plain.get_by_role("textbox", name="Question").fill("of what?")
    plain.get_by_role("button", name="Ask all again").click()
    ended(page)
    expect(plain.locator("p.text")).to_have_count(1)
    body = {"messages": [messages[0], {"role": "user", "content": "of what?"}], "adapter": "plain"}
    sampling = {"max_tokens": 6, "temperature": 0}
    assert texts(page, "plain") == [
        server.client.post("/generate", json={**body, **sampling}).json()["choices"][0]["text"]
    ]
    setting(page, "Temperature", "1")
    page.get_by_role("button", name="Generate", exact=True).click()
    ended(page)
    before = plain.get_by_role("button", name=re.compile("^Seed ")).inner_text()
    plain.get_by_role("button", name="Regenerate").click()
    ended(page)
    expect(plain.get_by_role("button", name=re.compile("^Seed "))).not_to_have_text(before)
    expect(column(page, "base").get_by_role("button", name=re.compile("^Seed "))).to_have_text(before)


def test_screen_readers_get_text_first(page: Page) -> None:
    ask(page, "ab")
    article = column(page, "plain")
    expect(tokens(page, "plain").first).to_be_visible()
    (said,) = texts(page, "plain")
    tree = article.aria_snapshot()
    assert max(re.findall(r"[a-z]+", said), key=len) in tree
    assert tree.count("button") <= 3  # not one for each token
    expect(page.locator("[aria-live=polite]").filter(has_text="plain has answered.")).to_have_count(1)
    article.get_by_role("button", name="Inspect tokens").press("Enter")
    expect(article.locator(".token").first).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(article.locator(".token").nth(1)).to_be_focused()
    expect(page.locator(".inspector")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".inspector")).to_have_count(0)


def test_forced_colours_keep_the_shades_and_the_current_tab(page: Page) -> None:
    ask(page, "ab", "plain*4", 60)
    page.emulate_media(forced_colors="active")
    styles = {
        tone: page.locator(f".legend .token[class*={tone}]").evaluate(
            "(of) => getComputedStyle(of).textDecorationLine + ' ' + getComputedStyle(of).textDecorationStyle"
        )
        for tone in ("up", "down")
    }
    assert styles == {"up": "underline solid", "down": "underline dotted"}
    current = page.locator(".top nav a[aria-current]").evaluate("(of) => getComputedStyle(of).borderBottomWidth")
    assert current == "3px"


def test_an_error_leaves_no_empty_columns(page: Page) -> None:
    page.get_by_label("Text to continue").check()
    page.get_by_role("textbox", name="Text").fill("word " * 3000)
    page.get_by_role("button", name="Generate", exact=True).click()
    field = page.get_by_role("textbox", name="Text")
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_role("alert")).to_have_count(1)
    expect(page.get_by_role("alert")).not_to_contain_text("things are wrong")
    field.fill("ab")
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.get_by_role("article")).to_have_count(0)


def test_a_slider_is_filled_from_zero(page: Page) -> None:
    expression = page.get_by_label("Expression")
    expression.fill("plain*7+other*0")
    slider = page.get_by_label("Weight of plain", exact=True)
    expect(slider).to_have_value("7")
    fill = "(of) => getComputedStyle(of.parentElement, '::before').backgroundSize"
    assert float(page.get_by_label("Weight of other", exact=True).evaluate(fill).split("%")[0]) == 0
    slider.dblclick()
    expect(expression).to_have_value("plain+other*0")
    expression.fill("plain@1*0.5+plain@2*0.25")
    expect(page.get_by_label("Weight of plain@2", exact=True)).to_have_value("0.25")


@pytest.mark.parametrize(
    ("size", "media"), [(DESKTOP, {}), (PHONE, {"color_scheme": "dark"}), (DESKTOP, {"forced_colors": "active"})]
)
def test_every_state_is_accessible(
    server: ServerProcess, browser: Browser, size: tuple[int, int], media: dict[str, str]
) -> None:
    with page_of(browser, server.url, size) as page:
        page.emulate_media(**media)  # type: ignore[arg-type]
        assert violations(page) == []
        ask(page, "of whom?", "plain*0.5+other", 8, is_chat=True)
        page.get_by_role("textbox", name="Reply").fill("and why?")
        page.get_by_role("button", name="Send").click()
        ended(page)
        column(page, "base").get_by_role("button", name="Edit").last.click()
        column(page, "plain*0.5+other").get_by_role("button", name="Inspect tokens").click()
        expect(page.locator(".inspector")).to_be_visible()
        page.get_by_role("button", name="View code").click()
        expect(page.get_by_role("region", name="Code")).to_be_visible()
        page.get_by_text("History (1)").click()
        assert violations(page) == []
        assert not is_wider_than_the_screen(page)
        page.get_by_label("Show").select_option(label="differences from base")
        expect(page.locator(".diff").first).to_be_visible()
        assert violations(page) == []


def test_the_best_weights_are_found_and_saved_with_their_evaluation(server: ServerProcess, page: Page) -> None:
    rows = "".join(json.dumps({"prompt": f"{n} is", "completion": f" {n % 3}"}) + "\n" for n in range(12)).encode()
    data = server.client.post("/datasets", files={"file": ("fresh.jsonl", rows)}).raise_for_status().json()["id"]
    page.get_by_label("Expression").fill("plain*2+other*2")
    page.get_by_text("Find the best weights").click()
    page.get_by_label("Data set").select_option(data)
    page.get_by_role("button", name="Measure", exact=True).click()
    found = page.get_by_role("region", name="Weights measured")
    expect(found.get_by_text("Best:")).to_be_visible(timeout=4 * PATIENCE)
    (job,) = server.client.get("/evaluate").json()["evaluations"]
    results = server.client.get(f"/evaluate/{job['id']}").json()["results"]
    assert len(results) == 13  # eleven on the line, the present weights, and the base
    blends = [result for result in results if result["adapter"] != "base"]
    best = min(results, key=lambda result: result["value"])
    expect(found.get_by_text("Best:")).to_contain_text(f"{best['adapter']}, loss")
    expect(found.locator("tr.chosen")).to_contain_text(best["adapter"])
    assert len(blends) == 12
    assert violations(page) == []
    if best["adapter"] == "base":  # of random weights
        return
    found.get_by_role("button", name="Use these weights").click()
    expect(page.get_by_label("Expression")).to_have_value(best["adapter"])
    found.get_by_label("Name for the best").fill("tuned")
    found.get_by_role("button", name="Save with its evaluation").click()
    expect(page.get_by_role("status")).to_contain_text("tuned@1")
    version = server.client.get("/adapters/tuned/1").json()
    assert version["config"]["evaluation"] == {"id": job["id"], "results": [best]}
    page.get_by_role("link", name="tuned@1").click()
    expect(page.get_by_role("region", name="Version 1")).to_contain_text("on 12 rows of")


def test_weights_are_measured_on_held_out_rows(server: ServerProcess, page: Page) -> None:
    """Of the data set that the blend's parts were trained on."""
    rows = "".join(json.dumps({"prompt": f"{n} and", "completion": f" {n % 5}"}) + "\n" for n in range(40))
    data = server.client.post("/datasets", files={"file": ("known.jsonl", rows)}).raise_for_status().json()["id"]
    body = {"name": "known", "dataset": data, "validation": 0.5, "training": {"max_steps": 1}}
    job = server.client.post("/train", json=body).raise_for_status().json()
    wait_until(
        lambda: server.client.get(f"/train/{job['id']}").json()["status"] == "succeeded", what="a trained adapter"
    )
    page.get_by_label("Expression").fill("known")
    page.get_by_text("Find the best weights").click()
    page.get_by_label("Data set").select_option(data)
    expect(page.get_by_role("checkbox", name="Only rows that were held out of training")).to_be_checked()
    page.get_by_role("button", name="Measure", exact=True).click()
    found = page.get_by_role("region", name="Weights measured")
    expect(found.get_by_text("Best:")).to_contain_text(f"on {job['data']['validation_rows']} rows")
    found.get_by_role("button", name="known*0.5", exact=True).click()
    expect(page.get_by_label("Expression")).to_have_value("known*0.5")
    page.get_by_role("checkbox", name="Only rows that were held out of training").uncheck()
    expect(page.get_by_text("A part was trained on this data set")).to_be_visible()
    body = {
        "name": "child",
        "start_from": "known",
        "data": [{"text": "Another row"}],
        "training": {"max_steps": 1},
    }
    job = server.client.post("/train", json=body).raise_for_status().json()
    wait_until(
        lambda: server.client.get(f"/train/{job['id']}").json()["status"] == "succeeded", what="a trained child"
    )
    page.reload()
    page.get_by_label("Expression").fill("child")
    page.get_by_text("Find the best weights").click()
    page.get_by_label("Data set").select_option(data)  # on which its parent was trained
    expect(page.get_by_role("checkbox", name="Only rows that were held out of training")).to_be_visible()
