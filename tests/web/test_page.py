"""The page in a browser, on the real base: what its views let one do, and that it does happen."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.end_to_end.peft_reference import CONFIG, WEIGHTS
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import wait_until
from tests.web.browser import DESKTOP, PATIENCE, PHONE, act, drop, is_wider_than_the_screen, page_of, violations

pytestmark = pytest.mark.real

ROWS = Path(__file__).parent.parent.parent / "examples" / "http-codes.jsonl"
PROMPT = "The HTTP status code 404 means"
VIEWS = ("playground", "adapters", "train", "train/new", "engine", "access")


def view(server: ServerProcess, path: str) -> str:
    return f"{server.url}/#/{path}"


def fill_job(page: Page, name: str, **fields: str) -> None:
    page.get_by_label("Name").fill(name)
    page.get_by_text("More settings").click()
    for label, value in fields.items():
        page.get_by_label(label.replace("_", " ")).fill(value)


def rows_of_curve(page: Page) -> Locator:
    return page.get_by_role("region", name="Loss by step, as a table").locator("tbody tr")


def write_prompt(page: Page, prompt: str, expression: str) -> None:
    page.get_by_label("Text to continue").check()
    page.get_by_role("textbox", name="Text").fill(prompt)
    page.get_by_label("Expression").fill(expression)


def answer_of(page: Page, expression: str) -> Locator:
    return page.get_by_role("article", name=f"Answer of {expression}", exact=True)


@pytest.fixture(scope="module")
def codes(server: ServerProcess, browser: Browser) -> str:
    """An adapter that was trained on the page: what was seen on the way is asserted here, once for all tests."""
    with page_of(browser, view(server, "train/new")) as page:
        drop(page, ".drop", {"codes.jsonl": ROWS.read_bytes()})
        chosen = page.get_by_label("Data set").locator("option:checked")
        expect(chosen).to_have_text(re.compile("codes.jsonl · 28 rows"))
        fill_job(page, "codes", Epochs="6", Evaluate_every="4", Validation_share="0.1")

        page.get_by_role("button", name="Dry run").click()
        preview = page.get_by_role("status", name="Dry run")
        expect(preview).to_contain_text("26 rows with 127 trained-on tokens")
        expect(preview.locator("mark").first).to_have_text(" OK")
        assert not server.client.get("/train").json()["jobs"], "a dry run queues nothing"

        page.get_by_role("button", name="Train", exact=True).click()
        page.wait_for_url("**/train/job-*")
        page.get_by_text("As a table").first.click()
        expect(rows_of_curve(page).nth(1)).to_be_attached()
        seen = rows_of_curve(page).count()
        expect(rows_of_curve(page).nth(seen + 1)).to_be_attached()  # the curve moves

        page.get_by_role("button", name="Pause").click()
        page.get_by_role("button", name="Resume").click()
        expect(page.get_by_text("Published as codes@1")).to_be_visible(timeout=4 * PATIENCE)
        expect(rows_of_curve(page)).to_have_count(24)
        held = rows_of_curve(page).nth(3).locator("td").nth(1)
        assert float(held.inner_text()) < 4

        page.get_by_role("button", name="The HTTP status code 200 means").click()
        page.get_by_role("button", name="Compare").click()
        expect(page.locator(".compared .text").nth(1)).to_have_text(" OK.")
        assert page.locator(".compared .text").nth(0).inner_text().strip() != "OK."
    job = server.client.get("/train").json()["jobs"][0]
    events = server.client.get(f"/train/{job['id']}/events").json()
    assert any("pause" in event["message"] for event in events)
    return "codes"


@pytest.fixture(scope="module")
def noise(server: ServerProcess, browser: Browser, adapter_dir: Path) -> str:
    """An adapter that was dropped on the page, its two files one after the other."""
    with page_of(browser, view(server, "adapters")) as page:
        upload = page.get_by_role("form", name="Upload")
        drop(page, ".drop", {CONFIG: (adapter_dir / CONFIG).read_bytes()})
        expect(upload).to_contain_text("adapter_model.safetensors is missing")
        drop(page, ".drop", {WEIGHTS: (adapter_dir / WEIGHTS).read_bytes()})
        upload.get_by_label("Name").fill("noise")
        upload.get_by_role("button", name="Upload").click()
        expect(page.get_by_role("article", name="noise")).to_contain_text("in use")
    assert server.client.get("/adapters/noise").json()["latest"] == 1
    return "noise"


def test_wrong_rows_are_shown_by_line(server: ServerProcess, browser: Browser) -> None:
    rows = b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\nnot JSON\n'
    with page_of(browser, view(server, "train/new")) as page:
        drop(page, ".drop", {"wrong.jsonl": rows})
        faults = page.get_by_role("alert").locator("li")
        expect(faults).to_have_count(2)
        expect(faults.nth(0)).to_have_text("line 2: completion is missing")
        expect(faults.nth(1)).to_contain_text("line 3")


def test_wrong_fields_are_shown_next_to_them(server: ServerProcess, browser: Browser, codes: str) -> None:
    with page_of(browser, view(server, "train/new")) as page:
        page.get_by_label("Data set").select_option(index=1)
        fill_job(page, codes, Rank="1000")
        page.get_by_role("button", name="Dry run").click()
        rank = page.get_by_label("Rank")
        expect(rank).to_have_attribute("aria-invalid", "true")
        described = [
            page.locator(f"[id='{of}']").inner_text() for of in str(rank.get_attribute("aria-describedby")).split()
        ]
        assert any("256" in text for text in described), described


def test_a_whole_folder_is_dropped(server: ServerProcess, browser: Browser, adapter_dir: Path) -> None:
    """As a trainer leaves it: with the tokenizer's files and its own beside the two."""
    ours = {name: (adapter_dir / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    names = "README.md", "tokenizer.json", "tokenizer_config.json", "training_args.bin", "value_head.safetensors"
    others = dict.fromkeys(names, b"{}")
    with page_of(browser, view(server, "adapters")) as page:
        upload = page.get_by_role("form", name="Upload")
        drop(page, ".drop", {CONFIG: b"{}", WEIGHTS: b"{}", "old.zip": b"{}"})
        drop(page, ".drop", dict(sorted((ours | others).items())))
        drop(page, ".drop", {CONFIG: ours[CONFIG], "b.safetensors": ours[WEIGHTS]})
        expect(upload).to_contain_text(f"{CONFIG}, b.safetensors")  # what was just dropped, whatever was there
        upload.get_by_label("Name").fill("folder")
        upload.get_by_role("button", name="Upload").click()
        expect(page.get_by_role("article", name="folder")).to_contain_text("in use")
    assert server.client.delete("/adapters/folder").status_code == 204


def test_wrong_files_are_refused(server: ServerProcess, browser: Browser, adapter_dir: Path) -> None:
    with page_of(browser, view(server, "adapters")) as page:
        upload = page.get_by_role("form", name="Upload")
        drop(page, ".drop", {CONFIG: b"{}", WEIGHTS: b"nothing"})
        upload.get_by_label("Name").fill("broken")
        upload.get_by_role("button", name="Upload").click()
        expect(upload.get_by_role("alert")).not_to_be_empty()
    assert server.client.get("/adapters/broken").status_code == 404


def test_a_blend_by_sliders(server: ServerProcess, browser: Browser, codes: str, noise: str) -> None:
    """Sliders write the expression, the expression moves the sliders, and what is generated is that blend."""
    with page_of(browser, view(server, "playground")) as page:
        write_prompt(page, PROMPT, "")
        expression = page.get_by_label("Expression")
        page.get_by_label(codes, exact=True).check()
        page.get_by_label(noise, exact=True).check()
        expect(expression).to_have_value("codes+noise")
        slider = page.get_by_label("Weight of noise", exact=True)
        slider.focus()
        for _ in range(14):
            page.keyboard.press("ArrowLeft")
        expect(expression).to_have_value("codes+noise*0.3")
        expression.fill("codes*0.9+noise@1*-0.25")
        expect(slider).to_have_value("-0.25")
        expect(page.get_by_label("Version of noise")).to_have_value("1")

        page.keyboard.press("Tab")
        page.get_by_role("button", name="Generate").click()
        answer = answer_of(page, "codes*0.9+noise@1*-0.25")
        expect(answer).to_contain_text(re.compile(r"codes@1 . 0\.9 \+ noise@1 . -0\.25"))
        expect(answer.locator(".token").first).to_be_visible()
        shown = "".join(answer.locator(".tokens .token").all_inner_texts())
        expected = server.text(PROMPT, adapter="codes*0.9+noise@1*-0.25", max_tokens=256)
        assert shown == expected
        expect(answer_of(page, "base").locator(".text")).to_have_text(server.text(PROMPT, max_tokens=256))

        page.get_by_text("Save this blend under a name").click()
        page.get_by_label("Name").fill("mix")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("status")).to_contain_text("mix@1")
    parts = server.client.get("/adapters/mix").json()["parts"]
    assert [(part["name"], part["weight"]) for part in parts] == [("codes", 0.9), ("noise", -0.25)]


def test_an_answer_streams(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, view(server, "playground")) as page:
        write_prompt(page, "Once upon a time", "")
        page.get_by_text("Settings").click()
        page.get_by_label("Max tokens").fill("4000")
        page.get_by_role("textbox", name="Text").press("Control+Enter")
        text = answer_of(page, "base").locator(".text")
        expect(text).not_to_be_empty()
        before = len(text.inner_text())
        wait_until(lambda: len(text.inner_text()) > before, what="more of the text")
        page.get_by_role("link", name="Engine").click()
        page.get_by_role("link", name="Playground").click()
        expect(answer_of(page, "base")).to_have_attribute("aria-busy", "true")  # it goes on meanwhile
        page.get_by_role("button", name="Generate").click()  # in the place of the one that runs
        expect(text).not_to_be_empty()
        page.get_by_role("button", name="Stop").click()
        expect(answer_of(page, "base")).to_contain_text("stopped")
        assert text.inner_text()
    server.wait_until_idle()  # whoever stops it frees its sequence


def test_tokens_are_shaded_by_what_the_adapter_changed(
    server: ServerProcess, browser: Browser, codes: str
) -> None:
    said = server.text(PROMPT, adapter=codes)
    body = {
        "prompt": PROMPT,
        "adapters": [f"{codes}@1", "base"],
        "score": [said],
        "max_tokens": 1,
        "logprobs": 5,
    }
    tuned, base = (
        result["scores"][0]["logprobs"] for result in server.client.post("/compare", json=body).json()["results"]
    )
    with page_of(browser, view(server, "playground")) as page:
        write_prompt(page, PROMPT, codes)
        page.get_by_role("button", name="Generate").click()
        answer = answer_of(page, codes)
        tokens = answer.locator(".tokens .token")
        expect(tokens).to_have_text([entry["token"] for entry in tuned])
        for place, (one, other) in enumerate(zip(tuned, base, strict=True)):
            change = one["logprob"] - other["logprob"]
            shade = min(4, round(abs(change) / 0.75))
            wanted = f"{'up' if change > 0 else 'down'}-{shade}" if shade else ""
            assert str(tokens.nth(place).get_attribute("class")).replace("token", "").strip() == wanted, place
        tokens.nth(1).hover()
        for title, entry in ((codes, tuned[1]), ("base", base[1])):
            rows = answer.get_by_role("table", name=title, exact=True).locator("tr")
            names = [name.replace("␣", " ") for name in rows.locator("th").all_inner_texts()]
            tops = [token["token"] for token in entry["top"]]
            assert names == tops or names == [*tops[:-1], entry["token"]]
        answer.get_by_role("button", name="Inspect tokens").press("Enter")
        expect(tokens.nth(0)).to_be_focused()
        page.keyboard.press("ArrowRight")
        expect(tokens.nth(1)).to_be_focused()


def test_roll_back(server: ServerProcess, browser: Browser, adapter_dir: Path, noise: str) -> None:
    """And what else is done with versions: names, lineage, a download, a delete that asks first."""
    second = server.upload(noise, adapter_dir)
    assert second["version"] == 2
    with page_of(browser, view(server, f"adapters/{noise}")) as page:
        versions = page.get_by_role("region", name="Versions of noise")
        row = versions.get_by_role("row", name=re.compile("^1 "))
        act(row, "Use this version")
        expect(row).to_contain_text("in use")
        expect(page.get_by_role("region", name="Version 1", exact=True)).to_be_visible()
        assert server.client.get("/adapters/noise").json()["latest"] == 1
        page.get_by_text("Add alias").click()
        page.get_by_role("textbox", name="Alias").fill("prod")
        page.get_by_role("button", name="Set").click()
        expect(versions).to_contain_text("prod")
        assert list(server.client.get("/adapters/noise").json()["aliases"]) == ["prod"]
        with page.expect_download() as download:
            act(row, "Download")
        assert download.value.suggested_filename == "noise-1.zip"
        other = versions.get_by_role("row", name=re.compile("^2 "))
        act(other, "Delete version 2…")
        page.get_by_role("dialog", name="Delete version 2…?").get_by_role("button", name="Delete").click()
        expect(page.get_by_role("alert")).to_contain_text("prod")  # the alias holds it, and the answer says so
        page.get_by_role("button", name="Remove the alias prod").click()
        expect(versions).not_to_contain_text("prod")
        act(other, "Delete version 2…")
        page.get_by_role("dialog", name="Delete version 2…?").get_by_role("button", name="Delete").click()
        expect(page.get_by_role("status").filter(has_text="Version 2 was deleted.")).to_be_visible()
        expect(other).to_have_count(0)


def test_lineage(server: ServerProcess, browser: Browser, codes: str, noise: str) -> None:
    made = server.client.post("/compositions/lineage", json={"expression": f"{codes}*0.5+{noise}@1*0.5"})
    assert made.status_code == 201
    with page_of(browser, view(server, "adapters/lineage")) as page:
        expect(page.locator(".lineage .node")).to_have_text(["lineage@1", "codes@1", "noise@1", "base"])
        expect(page.locator(".lineage path")).to_have_count(4)
        page.get_by_role("link", name="codes@1").click()
        expect(page.get_by_role("article", name="codes")).to_contain_text("Held-out loss")


def test_rows_are_answered(server: ServerProcess, browser: Browser, codes: str) -> None:
    job = server.client.get("/train").json()["jobs"][0]["id"]
    with page_of(browser, view(server, f"train/{job}")) as page:
        rows = page.get_by_role("region", name="Rows and answers").locator("tbody tr")
        expect(rows.first).to_contain_text("not trained on")
        page.get_by_role("button", name="Answer these rows").click()
        expect(rows.filter(has_text="The HTTP status code 200 means").locator("td").last).to_contain_text("right")
        expect(rows.last.locator("td").last).not_to_have_text("\N{EN DASH}")


def test_an_adapter_of_texts_is_tried_with_a_text(server: ServerProcess, browser: Browser, codes: str) -> None:
    with page_of(browser, view(server, "playground")) as page:
        expect(page.get_by_role("radio", name="Question")).to_be_checked()
        page.goto(view(server, f"adapters/{codes}"))
        page.get_by_role("button", name="Try it").click()
        expect(page.get_by_label("Text to continue")).to_be_checked()


def test_the_engine(server: ServerProcess, browser: Browser, codes: str) -> None:
    server.generate(PROMPT, adapter=codes, max_tokens=1)
    with page_of(browser, view(server, "engine")) as page:
        expect(page.get_by_text("Tokens a second").first).to_be_visible()
        expect(page.get_by_role("region", name="Adapters in memory")).to_contain_text(codes)
        expect(page.locator(".charts canvas")).to_have_count(2)


@pytest.mark.parametrize(
    ("size", "scheme"), [pytest.param(DESKTOP, "light", marks=pytest.mark.thorough), (PHONE, "dark")]
)
def test_every_view_is_accessible(
    server: ServerProcess, browser: Browser, codes: str, noise: str, size: tuple[int, int], scheme: str
) -> None:
    """By axe-core's rules; and none is wider than the screen."""
    job = server.client.get("/train").json()["jobs"][0]["id"]
    with page_of(browser, server.url, size, "dark" if scheme == "dark" else "light") as page:
        for path in (*VIEWS, f"adapters/{codes}", f"train/{job}"):
            page.goto(view(server, path))
            expect(page.get_by_role("heading", level=1)).to_be_visible()  # the view's module has come
            page.wait_for_load_state("networkidle")
            assert violations(page) == [], path
            assert not is_wider_than_the_screen(page), path
        page.goto(view(server, "playground"))
        write_prompt(page, PROMPT, codes)
        page.get_by_role("button", name="Generate").click()
        expect(answer_of(page, codes).locator(".token").first).to_be_visible()
        assert violations(page) == []
        assert not is_wider_than_the_screen(page)


def test_by_keyboard_alone(server: ServerProcess, browser: Browser) -> None:
    with page_of(browser, server.url) as page:
        expect(page.get_by_role("heading", name="Playground")).to_be_visible()
        page.keyboard.press("Tab")
        expect(page.get_by_text("Skip to the content")).to_be_focused()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowDown")
        expect(page.get_by_label("Text to continue")).to_be_checked()
        page.keyboard.press("Tab")
        page.keyboard.type("The capital of France is")
        page.keyboard.press("Control+Enter")
        expect(answer_of(page, "base").locator(".text")).to_contain_text("Paris")
