"""Take the pictures of docs/page.md: `make screenshots`. A server on the real base trains what they show."""

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from server.model.base.source import EMBEDDED, resolve_base
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import wait_until
from tests.kits.cache import CACHE, ROOT
from tests.web.browser import DESKTOP, PHONE, launch, page_of, save

DOCS = ROOT / "docs" / "page"
TRAINING_SECONDS = 900.0
"""Time for a job on a busy machine: if one picture fails, those after it aren't renewed."""
PROMPT = "The HTTP status code 404 means"


def train(server: ServerProcess, file: str, name: str, **training: int) -> None:
    """Run a job from an example file to its end."""
    path = ROOT / "examples" / file
    data = server.client.post("/datasets", files={"file": (file, path.read_bytes())}).json()["id"]
    body = {"name": name, "dataset": data, "lora": {"rank": 8}, "training": training}
    job = server.client.post("/train", json=body).json()["id"]
    wait_until(
        lambda: server.client.get(f"/train/{job}").json()["status"] == "succeeded",
        TRAINING_SECONDS,
        "a trained adapter",
    )


def generate(page: Page, url: str) -> None:
    page.goto(f"{url}/#/playground")
    page.get_by_label("Text to continue").check()
    page.get_by_role("textbox", name="Text").fill(PROMPT)
    page.get_by_label("Expression").fill("codes*0.7+shouting*0.9")
    page.get_by_role("button", name="Generate").click()
    answer = page.get_by_role("article", name="Answer of codes*0.7+shouting*0.9")
    answer.locator(".token").nth(1).click()
    expect(page.get_by_text("writing")).to_have_count(0)


def main() -> int:
    DOCS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        server = ServerProcess(Path(home), model=resolve_base(EMBEDDED, CACHE), workers=1)
        try:
            train(server, "http-codes.jsonl", "codes", epochs=20)
            train(server, "shouting.jsonl", "shouting", epochs=12)
            server.client.post("/compositions/mix", json={"expression": "codes*0.7+shouting*0.9"})
            browser = launch(playwright)
            with page_of(browser, server.url) as page:
                generate(page, server.url)
                save(page, DOCS / "playground.png")
                page.goto(f"{server.url}/#/adapters/mix")
                expect(page.locator(".lineage .node").first).to_be_visible()
                save(page, DOCS / "adapters.png")
                page.goto(f"{server.url}/#/train/new")
                page.get_by_label("Data set").select_option(index=1)
                page.get_by_label("Name").fill("again")
                page.get_by_text("More settings").click()
                page.get_by_label("Evaluate every").fill("3")
                page.get_by_role("button", name="Dry run").click()
                expect(page.locator(".preview")).to_be_visible()
                save(page, DOCS / "new-job.png")
                page.get_by_role("button", name="Train", exact=True).click()
                expect(page.get_by_text("What it changed")).to_be_visible(timeout=1000 * TRAINING_SECONDS)
                save(page, DOCS / "job.png")
            with page_of(browser, server.url, PHONE, "dark") as page:
                generate(page, server.url)
                save(page, DOCS / "phone-dark.png")
            with page_of(browser, f"{server.url}/#/engine", DESKTOP, "dark") as page:
                for _ in range(4):
                    server.texts([PROMPT] * 4, max_tokens=200, ignore_eos=True)
                save(page, DOCS / "engine-dark.png")
            browser.close()
        finally:
            server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
