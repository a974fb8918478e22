"""Headless Chromium on a page of a running server; errors that the page reports fail the test."""

import re
import shutil
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Locator, Page, Playwright, expect

from tests.web.vendor import PACKAGES

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
MISSING = "needs Chromium: apt-get install chromium"
PATIENCE = 60_000.0
"""Milliseconds for anything that should take a few: machines that run tests are busy."""

DESKTOP = (1280, 900)
PHONE = (390, 844)

expect.set_options(timeout=PATIENCE)


def launch(playwright: Playwright) -> Browser:
    """Launch Debian's browser, not one downloaded by Playwright."""
    return playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@contextmanager
def page_of(
    browser: Browser,
    url: str,
    size: tuple[int, int] = DESKTOP,
    scheme: Literal["light", "dark"] = "light",
) -> Iterator[Page]:
    """Open the page at `url` like a new user. Raise AssertionError at the end if it logged console errors
    (including violations of its policy), threw, or requested anything from another host."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(f"threw: {error}"))
    page.on(
        "console",
        lambda message: (
            wrong.append(message.text) if message.type == "error" and not _is_answer(message.text) else None
        ),
    )
    page.on("request", lambda request: None if _is_own(request.url, url) else wrong.append(f"asked {request.url}"))
    try:
        page.goto(url)
        yield page
    finally:
        context.close()
    assert not wrong, wrong


def _is_answer(text: str) -> bool:
    """Return whether this is Chromium's own message about an error response."""
    return text.startswith("Failed to load resource: the server responded with a status of 4")


def _is_own(asked: str, url: str) -> bool:
    return asked.startswith((url.partition("/#")[0] + "/", "blob:"))


def violations(page: Page) -> list[str]:
    """Return axe-core's findings about the page."""
    page.evaluate((PACKAGES / "axe-core" / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run().then((results) => results.violations)")
    return [
        f"{violation['id']}: {violation['help']}: {node['html'][:200]}"
        for violation in found
        for node in violation["nodes"]
    ]


def is_wider_than_the_screen(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth > innerWidth"))


def drop(page: Page, selector: str, files: dict[str, bytes]) -> None:
    """Drop files there, as from a file manager."""
    contents = [[name, b64encode(content).decode()] for name, content in files.items()]
    transfer = page.evaluate_handle(
        """(contents) => {
            const transfer = new DataTransfer();
            for (const [name, text] of contents) {
                const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
                transfer.items.add(new File([bytes], name));
            }
            return transfer;
        }""",
        contents,
    )
    page.dispatch_event(selector, "drop", {"dataTransfer": transfer})


def act(place: Locator, action: str) -> None:
    """Choose an action from the first menu ("⋯") in `place`."""
    place.get_by_role("button", name=re.compile("[Aa]ctions for ")).first.click()
    place.page.get_by_role("button", name=action, exact=True).click()


def save(page: Page, path: Path) -> None:
    """Save a screenshot of the whole page."""
    page.screenshot(path=path, full_page=True)
