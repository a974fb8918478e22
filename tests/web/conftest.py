"""A browser, and a server on the real base with a worker."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from adapters.peft.files import write
from server.model.base.weights import load_base
from tests.end_to_end.server_process import ServerProcess
from tests.server.jobs.merge_kit import sample
from tests.web.browser import CHROMIUM, MISSING, launch


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Launch a browser for a file's tests: while it is open, no other test of the process can run an event
    loop."""
    if CHROMIUM is None:
        pytest.skip(MISSING)
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(browser: Browser, base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Start a server after the browser, so that nothing is started without a browser."""
    server = ServerProcess(tmp_path_factory.mktemp("home"), model=base_dir, workers=1)
    yield server
    server.close()


@pytest.fixture(scope="session")
def adapter_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save random weights in PEFT's format that change the base's answers."""
    directory = tmp_path_factory.mktemp("adapter")
    write(directory, sample(load_base(base_dir).config.shape, 1, rank=2, alpha=0.5))
    return directory
