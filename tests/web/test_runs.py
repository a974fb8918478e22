"""Runs, their curves and their data on the page: what helps to choose between trained adapters."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.end_to_end.server_process import ServerProcess
from tests.web.browser import page_of

pytestmark = pytest.mark.thorough  # test_page.py tests what everyone sees


@pytest.fixture(scope="module")
def server(
    browser: Browser, converted_tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server without keys and without a worker."""
    server = ServerProcess(tmp_path_factory.mktemp("home"), model=converted_tiny)
    yield server
    server.close()


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
