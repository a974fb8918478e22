"""Signing in: the first key, a project that sees nothing of another, and a key that ends."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from adapters.peft.files import write
from server.model.base.weights import BaseModel
from tests.end_to_end.server_process import ServerProcess
from tests.server.jobs.merge_kit import sample
from tests.web.browser import PHONE, act, is_wider_than_the_screen, page_of, violations


@pytest.fixture(scope="module")
def server(
    browser: Browser, tiny_base: BaseModel, converted_tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Start a server with an adapter `ours` in the project `default`, and no key."""
    server = ServerProcess(tmp_path_factory.mktemp("home"), model=converted_tiny)
    directory = tmp_path_factory.mktemp("ours")
    write(directory, sample(tiny_base.config.shape, 1))
    server.upload("ours", directory)
    yield server
    server.close()


def test_the_docs_work_under_their_policy(server: ServerProcess, browser: Browser) -> None:
    """A script blocked by the policy would leave them empty, and logs an error to the console."""
    with page_of(browser, f"{server.url}/#/") as page:
        page.goto(f"{server.url}/docs")
        page.get_by_role("button", name="/health").first.click()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        expect(page.get_by_text('"ok"').first).to_be_visible()
        page.get_by_role("button", name="Authorize").click()
        page.get_by_label("auth-bearer-value").fill("a key")


def make_key(page: Page, name: str, project: str, scopes: tuple[str, ...]) -> str:
    """Create a key on the page like an operator; return its secret, which is shown once."""
    form = page.get_by_role("form", name="New key")
    if not form.is_visible():
        page.get_by_text("New key").click()
    form.get_by_label("Name").fill(name)
    form.get_by_role("textbox", name="Project").fill(project)
    for box in form.get_by_role("group", name="This key may").get_by_role("checkbox").all():
        box.uncheck()
    for scope in scopes:
        form.get_by_label(scope).check()
    form.get_by_role("button", name="Make the key").click()
    secret = page.locator(".secret code").filter(has_text="sk-smolora-")
    expect(page.locator(".secret")).to_contain_text(f"the key “{name}”")
    return secret.inner_text()


def sign_in(page: Page, secret: str) -> None:
    page.get_by_label("Key", exact=True).fill(secret)
    page.get_by_role("button", name="Sign in").click()


@pytest.fixture(scope="module")
def admin(server: ServerProcess, browser: Browser) -> str:
    """Create the first key: its creator stays signed in, and other visitors must sign in."""
    with page_of(browser, f"{server.url}/#/access") as page:
        expect(page.get_by_text("None yet: everyone who reaches this server")).to_be_visible()
        form = page.get_by_role("form", name="New key")
        form.get_by_label("Name").fill("laptop")
        form.get_by_label("everything").uncheck()
        form.get_by_label("read the metrics").check()
        expect(form.get_by_role("button", name="Make the key")).to_be_disabled()
        secret = make_key(page, "laptop", "default", ("everything",))
        expect(page.get_by_role("banner")).to_contain_text("laptop · default")
        expect(page.get_by_role("region", name="Keys, as a table")).to_contain_text("laptop")
        expect(page.locator(".secret")).to_contain_text(secret)
        page.get_by_role("button", name="Done").click()
        expect(page.locator(".secret")).to_have_count(0)
    with page_of(browser, f"{server.url}/#/adapters") as page:
        expect(page.get_by_role("heading", name="API key")).to_be_visible()
        assert violations(page) == []
        sign_in(page, "sk-smolora-mistyped")
        expect(page.get_by_role("alert")).to_contain_text("rejects this key")
        sign_in(page, secret)
        expect(page.get_by_role("link", name="ours")).to_be_visible()
    server.client.headers["Authorization"] = f"Bearer {secret}"
    return secret


def test_another_project_sees_nothing(server: ServerProcess, browser: Browser, admin: str) -> None:
    with page_of(browser, f"{server.url}/#/access") as page:
        sign_in(page, admin)
        secret = make_key(page, "stranger", "acme", ("generate", "train,"))
        expect(page.get_by_role("region", name="Keys, as a table")).to_contain_text("stranger")
    with page_of(browser, f"{server.url}/#/adapters/ours") as page:
        sign_in(page, secret)
        expect(page.get_by_text("There is no adapter ours, or none that you may see.")).to_be_visible()
        expect(page.get_by_role("link", name="ours")).to_have_count(0)
        page.get_by_role("link", name="Playground").click()
        expect(page.get_by_text("There is no adapter yet.")).to_be_visible()
        page.get_by_label("Text to continue").check()
        page.get_by_role("textbox", name="Text").fill("ab")
        page.get_by_label("Expression").fill("ours")
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_label("Expression")).to_have_attribute("aria-invalid", "true")
        expect(page.get_by_role("alert")).to_have_text("No such adapter: ours.")
        page.get_by_role("link", name="Train").click()
        expect(page.get_by_text("No job yet.")).to_be_visible()
        page.get_by_role("link", name="Engine").click()
        expect(page.get_by_text("may not read the engine's metrics")).to_be_visible()
        page.get_by_role("link", name="Keys and usage").click()
        expect(page.get_by_text("are for keys with the scope manage or admin")).to_be_visible()
        expect(page.get_by_role("region", name="Keys", exact=True)).to_have_count(0)
        assert violations(page) == []


def test_operator_sees_the_project_of_a_job(server: ServerProcess, browser: Browser, admin: str) -> None:
    assert server.client.put("/projects/theirs", json={}).status_code == 200
    for project in ("theirs", "default"):
        body = {"name": f"codes-{project}", "data": [{"text": "a"}] * 2, "validation": 0}
        headers = {"OpenAI-Project": project}
        assert server.client.post("/train", json=body, headers=headers).status_code == 202
    with page_of(browser, f"{server.url}/#/train") as page:
        sign_in(page, admin)
        jobs = page.get_by_role("navigation", name="Jobs")
        expect(jobs.get_by_role("link", name="codes-theirs")).to_contain_text("of theirs")
        expect(jobs.get_by_role("link", name="codes-default")).not_to_contain_text("of default")


def test_storage_of_a_key(server: ServerProcess, browser: Browser, admin: str) -> None:
    """In this tab, until it is closed or the user signs out; not in an address, a cookie or permanent storage."""
    with page_of(browser, server.url) as page:
        page.get_by_role("link", name="Adapters").click()
        sign_in(page, admin)
        expect(page.get_by_role("link", name="ours")).to_be_visible()
        assert page.evaluate("Object.values(sessionStorage)") == [admin]
        assert json.loads(page.evaluate("JSON.stringify(localStorage)")) == {}
        assert page.context.cookies() == []
        assert admin not in page.url
        page.reload()
        expect(page.get_by_role("link", name="ours")).to_be_visible()
        other = page.context.new_page()
        other.goto(f"{server.url}/#/adapters")
        expect(other.get_by_role("heading", name="API key")).to_be_visible()
        page.get_by_role("link", name="Playground").click()
        question = page.get_by_role("textbox", name="Question")
        question.fill("of whom?")
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("heading", name="API key")).to_be_visible()
        assert page.evaluate("Object.values(sessionStorage)") == []
        page.wait_for_function("() => !location.hash.includes('whom')")
        sign_in(page, admin)
        expect(question).to_have_value("of whom?")
        page.get_by_role("button", name="Sign out").click()
        made = server.client.post("/keys", json={"name": "else", "project": "acme", "scopes": ["generate"]})
        sign_in(page, made.json()["secret"])
        expect(question).to_have_value("")  # another person sees nothing of it


def test_a_prompt_outlives_its_key(server: ServerProcess, browser: Browser, admin: str) -> None:
    """A person whose key was revoked, or who follows a link, signs in and continues."""
    made = server.client.post("/keys", json={"name": "brief", "scopes": ["generate"]}).json()
    with page_of(browser, f"{server.url}/#/playground?p=of+whom%3F") as page:
        question = page.get_by_role("textbox", name="Question")
        sign_in(page, made["secret"])
        expect(question).to_have_value("of whom?")
        question.fill("of what?")
        server.client.delete(f"/keys/{made['id']}").raise_for_status()
        expect(page.get_by_role("alert")).to_contain_text("rejects this key")
        sign_in(page, admin)
        expect(question).to_have_value("of what?")


def test_a_key_that_is_remembered(server: ServerProcess, browser: Browser, admin: str) -> None:
    with page_of(browser, f"{server.url}/#/adapters") as page:
        page.get_by_label("Remember on this device").check()
        assert violations(page) == []
        sign_in(page, admin)
        expect(page.get_by_role("link", name="ours")).to_be_visible()
        other = page.context.new_page()
        other.goto(f"{server.url}/#/adapters")
        expect(other.get_by_role("link", name="ours")).to_be_visible()
        page.get_by_role("button", name="Sign out").click()
        expect(other.get_by_role("heading", name="API key")).to_be_visible()
        assert page.evaluate("Object.values(localStorage)") == []


def test_revoke(server: ServerProcess, browser: Browser, admin: str) -> None:
    """It takes effect at once: an open page asks for another key. The audit list has it."""
    with page_of(browser, f"{server.url}/#/access") as page:
        sign_in(page, admin)
        secret = make_key(page, "guest", "acme", ("generate",))
        with page_of(browser, f"{server.url}/#/adapters") as others:
            sign_in(others, secret)
            expect(others.get_by_text("None yet.")).to_be_visible()
            row = page.get_by_role("region", name="Keys, as a table").get_by_role("row", name="guest")
            act(row, "Revoke…")
            dialog = page.get_by_role("dialog")
            expect(dialog).to_contain_text("Requests with this key fail immediately.")
            dialog.get_by_role("button", name="Revoke").click()
            expect(row).to_contain_text("revoked")
            expect(others.get_by_role("alert")).to_contain_text("rejects this key")
        page.reload()
        expect(page.get_by_role("region", name="Audit", exact=True)).to_contain_text("guest")
        page.get_by_text("acme no limits").click()
        limits = page.get_by_role("form", name="Limits of acme")
        limits.get_by_label("Requests a minute").fill("60")
        limits.get_by_role("button", name="Save").click()
        expect(page.get_by_role("region", name="Projects")).to_contain_text("requests a minute: 60")
        assert violations(page) == []
    limit = server.client.get("/projects/acme").json()["requests_per_minute"]
    assert limit == 60


def test_usage_shows_names_of_keys(server: ServerProcess, browser: Browser, admin: str) -> None:
    """Only for users who may list keys."""
    made = server.client.post("/keys", json={"name": "named", "project": "acme", "scopes": ["generate"]}).json()
    body = {"prompt": "ab", "max_tokens": 1}
    headers = {"Authorization": f"Bearer {made['secret']}"}
    server.client.post("/generate", json=body, headers=headers).raise_for_status()
    with page_of(browser, f"{server.url}/#/access") as page:
        sign_in(page, admin)
        page.get_by_label("Group by").select_option("key")
        expect(page.get_by_role("region", name="Usage, as a table")).to_contain_text("named")


def test_limits_of_a_key_are_shown_and_changed(server: ServerProcess, browser: Browser, admin: str) -> None:
    with page_of(browser, f"{server.url}/#/access") as page:
        sign_in(page, admin)
        form = page.get_by_role("form", name="New key")
        page.get_by_text("New key", exact=True).click()
        form.get_by_label("Name").fill("bounded")
        form.get_by_text("Limits", exact=True).click()
        form.get_by_label("Stored bytes").fill("two")
        expect(form.get_by_text("Not a size: write it as 2 GiB.")).to_be_visible()
        form.get_by_label("Stored bytes").fill("2 GiB")
        form.get_by_label("Expires").fill("2100-01-01")
        form.get_by_role("button", name="Make the key").click()
        row = page.get_by_role("region", name="Keys, as a table").locator("tr").filter(has_text="bounded")
        expect(row).to_contain_text("stored bytes: 2.0 GiB")
        for label in ("Name", "Stored bytes", "Expires"):
            expect(form.get_by_label(label)).to_have_value("")
        act(row, "Change limits")
        limits = page.get_by_role("form", name="Limits of bounded")
        expect(limits.get_by_label("Stored bytes")).to_have_value("2.0 GiB")
        limits.get_by_label("Jobs at once").fill("3")
        assert violations(page) == []
        limits.get_by_role("button", name="Save").click()
        expect(row).to_contain_text("jobs at once: 3, stored bytes: 2.0 GiB")
        expect(limits).to_have_count(0)


def test_a_key_is_shown_by_name_and_project(server: ServerProcess, browser: Browser, admin: str) -> None:
    expiry = "2100-01-01T00:00:00Z"
    body = {"name": "n" * 40, "project": "acme", "scopes": ["generate"], "expires_at": expiry}
    made = server.client.post("/keys", json=body).json()
    with page_of(browser, server.url, PHONE) as page:
        sign_in(page, made["secret"])
        shown = page.get_by_role("banner").get_by_text(f"{body['name']} · acme")
        expect(shown).to_have_attribute(
            "title", re.compile(r"May generate\. Expires .*2100.*\. Kept until this tab is closed")
        )
        assert not is_wider_than_the_screen(page)
        assert violations(page) == []
        page.get_by_role("button", name="Sign out").click()
        sign_in(page, admin)
        expect(page.get_by_role("banner")).to_contain_text("laptop · default")


def test_a_key_that_may_not_train_is_offered_no_job(server: ServerProcess, browser: Browser, admin: str) -> None:
    made = server.client.post("/keys", json={"name": "reader", "scopes": ["generate"]}).json()
    with page_of(browser, f"{server.url}/#/train") as page:
        sign_in(page, made["secret"])
        expect(page.get_by_role("banner")).to_contain_text("reader · default")
        expect(page.get_by_text("Your key may not train.")).to_be_visible()
        expect(page.get_by_role("alert")).to_have_count(0)
        expect(page.get_by_role("link", name="New job")).to_have_count(0)
        assert violations(page) == []
