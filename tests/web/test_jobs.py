"""What the page says of a job: its result, its settings, and its rows as the base and the adapter answer them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Route, expect

from adapters.peft.files import write
from server.model.base.weights import BaseModel
from tests.end_to_end.server_process import ServerProcess
from tests.server.jobs.merge_kit import sample
from tests.web.browser import PHONE, drop, is_wider_than_the_screen, page_of, violations
from tests.web.jobs_kit import JSONL, PUBLISHED, ROWS, pretend, submitted

pytestmark = pytest.mark.thorough

REPORT = {"method": "lora", "evaluation": None, "gate": {"passes": True, "reason": ""}}


@pytest.fixture(scope="module")
def server(
    browser: Browser, tiny_base: BaseModel, converted_tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server without keys and without a worker, with the adapter `plain`."""
    server = ServerProcess(tmp_path_factory.mktemp("home"), model=converted_tiny)
    directory = tmp_path_factory.mktemp("plain")
    write(directory, sample(tiny_base.config.shape, 1))
    server.upload("plain", directory)
    yield server
    server.close()


@pytest.fixture
def job(server: ServerProcess) -> str:
    return submitted(server)


def measures(loss: float, exact_match: float = 0.0) -> dict[str, float]:
    return {"loss": loss, "perplexity": loss, "accuracy": 0.5, "exact_match": exact_match}


def overfitted(num_rows: int, kept_step: int = 4) -> dict[str, object]:
    """Return the report of a job whose held-out loss rises after step 4."""
    held_out = {4: 1.83, 8: 3.26, 12: 2.35}
    tuned = held_out[kept_step]
    return {
        "method": "lora",
        "evaluation": {
            "num_rows": num_rows,
            "num_completions": num_rows,
            "base": measures(4.61),
            "tuned": measures(tuned),
            "latest": None,
        },
        "gate": {"passes": True, "reason": ""},
        "steps": 12,
        "kept_step": kept_step,
        "curves": {"train_loss": [[step, 6 / step] for step in range(1, 13)], "eval_loss": list(held_out.items())},
    }


def test_figures_are_of_the_kept_step(server: ServerProcess, browser: Browser, job: str) -> None:
    metrics = {"train_loss": 0.00197, "eval_loss": 1.83, "base_eval_loss": 4.61}
    pictures = []
    for kept_step, train, held_out in ((4, "1.50", "1.83"), (8, "0.750", "3.26")):
        with page_of(browser, server.url) as page:
            pretend(page, server, job, overfitted(3, kept_step), adapter=None, metrics=metrics)
            page.goto(f"{server.url}/#/train/{job}")
            article = page.get_by_role("article", name="Job waits")
            figures = article.locator(".figures > div")
            expect(figures.nth(0)).to_have_text(f"Training loss{train} step {kept_step}, kept")
            expect(figures.nth(1)).to_have_text(f"Held-out loss{held_out} step {kept_step}, kept")
            expect(figures.nth(2)).to_have_text("Base's held-out loss4.61")
            expect(article).not_to_contain_text("0.00197")
            legend = page.locator(".u-legend")
            for value in (str(kept_step), train.rstrip("0"), held_out, "4.61"):
                expect(legend).to_contain_text(value)
            page.get_by_text("As a table").click()
            row = (
                page.get_by_role("region", name="Loss by step, as a table").locator("tbody tr").nth(kept_step - 1)
            )
            expect(row).to_contain_text(f"{kept_step} (kept)")
            assert violations(page) == []
            pictures.append(page.locator("canvas").evaluate("(canvas) => canvas.toDataURL()"))
    assert pictures[0] != pictures[1]  # the line at the kept step


@pytest.mark.parametrize(
    ("num_rows", "kept_step", "conclusion"),
    [
        (3, 4, " (3 rows: too few to tell)."),
        (40, 4, ": fewer epochs would do."),
        (40, 12, "; the weights of step 12 were kept."),
    ],
)
def test_a_rising_held_out_loss_is_reported(
    server: ServerProcess, browser: Browser, job: str, num_rows: int, kept_step: int, conclusion: str
) -> None:
    with page_of(browser, server.url) as page:
        pretend(page, server, job, overfitted(num_rows, kept_step), adapter=None)
        page.goto(f"{server.url}/#/train/{job}")
        rose = page.get_by_text("Held-out loss rose after step 4")
        expect(rose).to_have_text(f"Held-out loss rose after step 4, from 1.83 to 2.35{conclusion}")
        verdict = page.locator(".reported > p").filter(has_text="than the base's")
        expect(verdict).to_contain_text("(3 rows: too few to tell)" if num_rows == 3 else "(40 rows)")


def test_a_held_out_share_that_strays_is_explained(server: ServerProcess, browser: Browser, job: str) -> None:
    """Also by a dry run, which is the first to show how many rows are held out."""
    data = {"rows": 29, "validation_rows": 11, "trained_tokens": 100}
    sentence = "11 of 40 rows are held out, not 4: each row's text decides whether it is held out"
    for share, validation_rows, is_explained in ((0.1, 11, True), (0.1, 5, False), ("rows", 11, False)):
        with page_of(browser, server.url) as page:
            counts = data | {"validation_rows": validation_rows}
            report = overfitted(11) | {"config": {"validation": share}, "data": counts}
            pretend(page, server, job, report, adapter=None)
            page.goto(f"{server.url}/#/train/{job}")
            shown = page.locator(".reported")
            expect(shown).to_contain_text("On 11 held-out rows")
            expect(shown.get_by_text(sentence)).to_have_count(int(is_explained))
    with page_of(browser, f"{server.url}/#/train/new") as page:
        drop(page, ".drop", {"rows.jsonl": JSONL})

        def strayed(route: Route) -> None:
            dry = route.fetch().json()
            route.fulfill(json=dry | {"data": dry["data"] | data, "config": dry["config"] | {"validation": 0.1}})

        page.route("**/train?dry_run=true", strayed)
        page.get_by_role("button", name="Dry run").click()
        expect(page.get_by_role("status", name="Dry run")).to_contain_text(sentence)


def test_verdicts_and_recall(server: ServerProcess, browser: Browser, job: str) -> None:
    """Versions are compared on the same rows; a parent that is the latest version is named once."""
    against_base = {
        "version": None,
        "metric": "exact_match",
        "num_rows": 28,
        "includes_trained": True,
        "tuned": 25 / 28,
        "other": 0.0,
        "low": 0.7,
        "high": 1.0,
        "verdict": "better",
    }
    before = {
        "version": "waits@1",
        "metric": "loss",
        "num_rows": 3,
        "tuned": 1.83,
        "other": 2.35,
        "low": None,
        "high": None,
        "verdict": "can't tell",
    }
    many = before | {"version": "waits@2", "num_rows": 400, "low": -0.12, "high": 0.034}
    report = overfitted(3) | {
        "recall": {"num_rows": 25, "num_right": {"base": 0, "tuned": 25, "latest": 3, "parent": None}},
        "comparisons": {"base": against_base, "latest": before, "parent": before},
        "moves_latest": False,
    }
    with page_of(browser, server.url) as page:
        pretend(page, server, job, report, adapter=None)
        page.goto(f"{server.url}/#/train/{job}")
        sentences = page.locator(".reported > p")
        expect(sentences).to_have_text(
            [
                "Right on 0 of 3 held-out rows, which it never saw (the base: 0 of 3), and 25 of 25 trained rows.",
                "Better than the base: 25 rows right against 0 (28 rows, trained ones included).",
                (
                    "No clear difference from waits@1: held-out loss 1.83 against 2.35 "
                    "(3 held-out rows: too few to tell)."
                ),
                "latest stays at waits@1.",
                re.compile("^Held-out loss rose"),
            ]
        )
        recall = page.locator(".reported tr").filter(has_text="recall")
        expect(recall.locator("td")).to_have_text(["0 of 25", "3 of 25", "25 of 25"])
        assert violations(page) == []
        pretend(page, server, job, report | {"comparisons": {"base": None, "latest": many}}, adapter=None)
        page.reload()
        expect(sentences.nth(1)).to_have_text(
            "No clear difference from waits@2: held-out loss 1.83 against 2.35 "
            "(400 held-out rows; the difference may be -0.12 to 0.034)."
        )
        shares = many | {"metric": "exact_match", "tuned": 0.5, "other": 0.4975, "low": -0.16, "high": 0.17}
        pretend(page, server, job, report | {"comparisons": {"base": None, "latest": shares}}, adapter=None)
        page.reload()
        expect(sentences.nth(1)).to_have_text(
            "No clear difference from waits@2: 200 rows right against 199 "
            "(400 held-out rows; the difference may be \N{MINUS SIGN}16 to +17 points)."
        )
        evaluation = {"num_rows": 300, "num_completions": 200, "base": measures(4), "tuned": measures(1, 0.75)}
        pretend(page, server, job, report | {"evaluation": evaluation, "data": {"overlap": 3}}, adapter=None)
        page.reload()
        expect(sentences.first).to_have_text(
            "Right on 150 of 200 held-out rows (the base: 0 of 200), and 25 of 25 trained rows."
        )
        unmeasured = {"base": against_base, "latest": None, "parent": None}
        pretend(page, server, job, report | {"comparisons": unmeasured}, adapter=None)
        page.reload()
        expect(sentences.nth(2)).to_have_text("latest stays where it was.")


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": {"rank": 4, "dropout": 0.1}, "training": {"epochs": 7, "seed": 7, "eval_steps": 2}},
        {"start_from": "plain", "lora": {"dropout": 0.1}, "training": {"max_steps": 5, "batch_size": 2}},
        {"method": "full", "training": {"schedule": "constant"}},
    ],
)
def test_train_again_keeps_all_settings(
    server: ServerProcess, browser: Browser, settings: dict[str, object]
) -> None:
    rows = "".join(json.dumps({"prompt": f"again {number}", "completion": "b"}) + "\n" for number in range(8))
    dataset = server.client.post("/datasets", files={"file": ("again.jsonl", rows)}).json()["id"]
    body = {"name": "again", "dataset": dataset, "validation": 0.25, "description": "As before", **settings}
    first = server.client.post("/train", json=body).raise_for_status().json()
    with page_of(browser, f"{server.url}/#/train/{first['id']}") as page:
        article = page.get_by_role("article", name="Job again")
        article.get_by_text("Settings").click()
        config = first["config"]
        for name in ("validation", "publish_if", *config["lora"], *config["training"]):
            title = re.compile(f"^{name.capitalize().replace('_', ' ')}$")
            expect(article.locator("dt").filter(has_text=title)).to_have_count(1)
        rate = article.locator("dt").filter(has_text="Learning rate").locator("+ dd")
        assert float(rate.inner_text()) == config["training"]["learning_rate"]
        article.get_by_role("button", name="Train again").click()
        expect(page.get_by_label("Name")).to_have_value("again")
        expect(page.get_by_label("Data set")).to_have_value(dataset)
        page.get_by_role("button", name="Dry run").click()
        expect(page.get_by_role("status", name="Dry run")).to_be_visible()
        page.get_by_role("button", name="Train", exact=True).click()
        page.wait_for_url("**/train/job-*")
        second = server.client.get(f"/train/{page.url.rpartition('/')[2]}").json()
    assert second["id"] != first["id"]
    assert second["config"] == first["config"]


def test_an_earlier_jobs_other_settings_can_be_left_out(server: ServerProcess, browser: Browser) -> None:
    body = {"name": "seeded", "data": ROWS, "training": {"seed": 7}, "alias": "prod"}
    first = server.client.post("/train", json=body).raise_for_status().json()["id"]
    with page_of(browser, f"{server.url}/#/train/{first}") as page:
        page.get_by_role("button", name="Train again").click()
        drop(page, ".drop", {"rows.jsonl": JSONL})
        expect(page.get_by_label("Data set").locator("option:checked")).to_contain_text("rows.jsonl")
        other = page.get_by_text("Also as in the earlier job")
        expect(other).to_be_visible()
        expect(page.get_by_role("form", name="New job").locator("dl")).not_to_contain_text("prod")
        assert violations(page) == []
        page.get_by_role("button", name="Leave these out").click()
        expect(other).to_have_count(0)
        with page.expect_request("**/train?dry_run=true") as sent:
            page.get_by_role("button", name="Dry run").click()
    assert "seed" not in json.loads(sent.value.post_data or "")["training"]


def test_rows_are_answered_by_base_and_adapter(server: ServerProcess, browser: Browser) -> None:
    """Held-out rows come first. If the data set would be split otherwise now, none are shown."""
    rows = [{"prompt": f"ask {number}", "completion": f" b{number}"} for number in range(8)]
    lines = "\n".join(map(json.dumps, rows))
    dataset = server.client.post("/datasets", files={"file": ("ask.jsonl", lines)}).json()["id"]
    body = {"name": "asks", "dataset": dataset, "validation": 0.25}
    described = server.client.post("/train", json=body).raise_for_status().json()
    samples = server.client.post("/train?dry_run=true", json=body).json()["samples"]
    assert [row["held_out"] for row in samples] == sorted((row["held_out"] for row in samples), reverse=True)
    assert samples[0]["held_out"]

    def compared(route: Route) -> None:
        prompt = json.loads(route.request.post_data or "")["prompt"]
        tuned = "no" if prompt == samples[0]["prompt"] else prompt.replace("ask ", "b")
        route.fulfill(json={"results": [{"choices": [{"text": text}]} for text in ("no", tuned)]})

    with page_of(browser, server.url, PHONE) as page:
        pretend(page, server, described["id"], REPORT, adapter=PUBLISHED)
        page.route("**/compare", compared)
        page.goto(f"{server.url}/#/train/{described['id']}")
        table = page.get_by_role("region", name="Rows and answers")
        shown = table.locator("tbody tr")
        expect(shown).to_have_count(len(samples))
        for number, row in enumerate(samples):
            kind = "not trained on" if row["held_out"] else "trained on"
            expect(shown.nth(number).locator("td").first).to_have_text(kind)
            expect(shown.nth(number)).to_contain_text(row["prompt"])
        page.get_by_role("button", name="Answer these rows").click()
        expect(table.get_by_text("right", exact=True)).to_have_count(len(samples) - 1)
        expect(shown.first).not_to_contain_text("right")
        assert violations(page) == []
        assert not is_wider_than_the_screen(page)
        page.get_by_role("button", name=samples[1]["prompt"]).click()
        expect(page.get_by_label("Prompt, as in your rows")).to_have_value(samples[1]["prompt"])
    with page_of(browser, server.url) as page:
        other = described["data"] | {"validation_digest": "0" * 64}
        pretend(page, server, described["id"], REPORT, adapter=PUBLISHED, data=other)
        with page.expect_response("**/train?dry_run=true"):
            page.goto(f"{server.url}/#/train/{described['id']}")
        expect(page.get_by_role("form", name="Compare")).to_be_visible()
        page.wait_for_timeout(300)
        expect(page.get_by_role("region", name="Rows and answers")).to_have_count(0)


@pytest.mark.parametrize(
    ("kinds", "kind"), [({"messages": 3, "text": 1}, "Question"), ({"text": 4}, "Text to continue")]
)
def test_an_adapter_is_tried_with_its_rows_kind_of_prompt(
    server: ServerProcess, browser: Browser, job: str, kinds: dict[str, int], kind: str
) -> None:
    described = server.client.get(f"/train/{job}").json()
    listed = server.client.get("/adapters?name=plain").json()
    for version in listed["adapters"][0]["versions"]:
        version["config"]["kinds"], version["metrics"]["recall"], version["verdict"] = kinds, 0.96, "can't tell"
    other = {"Question": "Text to continue", "Text to continue": "Question"}[kind]
    with page_of(browser, server.url) as page:
        pretend(page, server, job, REPORT, adapter=PUBLISHED, data=described["data"] | {"kinds": kinds})
        page.goto(f"{server.url}/#/train/{job}")
        expect(page.get_by_role("radio", name=kind)).to_be_checked()
        page.get_by_role("link", name="Playground").click()
        page.get_by_role("radio", name=other).check()
        page.route("**/adapters?*", lambda route: route.fulfill(json=listed))
        page.goto(f"{server.url}/#/adapters/plain")
        expect(page.get_by_role("region", name="Versions of plain")).to_contain_text(
            re.compile("96.%.*no clear difference")
        )
        page.get_by_role("button", name="Try it").click()
        expect(page.get_by_role("radio", name=kind)).to_be_checked()


DECISIONS = {
    "team": {
        "num_rows": 46,
        "summary": "Right on 41 of 46 held-out rows: expect 76% to 96% right answers on rows like these.",
        "reliability": [
            {"low": 0.4, "high": 0.6, "num_rows": 16, "confidence": 0.52, "accuracy": 0.75},
            {"low": 0.8, "high": 1.0, "num_rows": 30, "confidence": 0.93, "accuracy": 29 / 30},
        ],
        "confusion": {"options": ["billing", "sales"], "counts": [[20, 1, 0], [3, 20, 0], [1, 0, 1]]},
    }
}


def test_a_report_says_how_far_to_trust_decisions(server: ServerProcess, browser: Browser, job: str) -> None:
    with page_of(browser, server.url, PHONE) as page:
        pretend(page, server, job, REPORT | {"decisions": DECISIONS}, adapter=None)
        page.goto(f"{server.url}/#/train/{job}")
        section = page.get_by_role("region", name="Decisions: team", exact=True)
        expect(section).to_contain_text("Right on 41 of 46 held-out rows")
        section.get_by_text("As a table").click()
        curve = section.get_by_role("region", name="Right answers by confidence, as a table")
        expect(curve.locator("tbody tr")).to_have_text([re.compile(r"52\s*75.00"), re.compile(r"93\s*96.67")])
        section.get_by_text("Which answers are confused").click()
        matrix = section.get_by_role("region", name="Answers to team, as a table")
        expect(matrix.locator("tbody tr").nth(1)).to_have_text(re.compile(r"sales\s*3\s*20\s*0"))
        expect(matrix.locator("tbody tr").nth(2)).to_have_text(re.compile(r"others\s*1\s*0\s*1"))
        assert not is_wider_than_the_screen(page)
        assert violations(page) == []


def test_an_adapter_of_decisions_decides(server: ServerProcess, browser: Browser, job: str) -> None:
    listed = server.client.get("/adapters").json()
    (plain,) = (one for one in listed["adapters"] if one["name"] == "plain")
    plain["versions"][-1] |= {"job_id": job, "config": {"decisions": {}}}
    options = [{"value": "billing", "probability": 0.3}, {"value": "sales", "probability": 0.7}]
    answer = {"type": "choice", "name": "team", "choice": "sales", "confidence": 0.4, "probabilities": options}
    decided = {"results": [{"index": 0, "answers": [answer]}], "calibrated": True, "warnings": []}
    with page_of(browser, server.url) as page:
        pretend(page, server, job, REPORT | {"decisions": DECISIONS})
        page.route(re.compile(r"/adapters\?"), lambda route: route.fulfill(json=listed))
        page.route("**/decide", lambda route: route.fulfill(json=decided))
        page.goto(f"{server.url}/#/adapters/plain")
        page.get_by_label("Input", exact=True).fill("What do you charge?")
        with page.expect_request("**/decide") as request:
            page.get_by_role("button", name="Decide", exact=True).click()
        version = plain["versions"][-1]["version"]
        assert request.value.post_data_json == {"adapter": f"plain@{version}", "input": "What do you charge?"}
        group = page.get_by_role("group", name="team")
        expect(group.locator(".badge")).to_have_text("sales")
        expect(group.locator("tbody tr")).to_have_text([re.compile(r"sales\s*70"), re.compile(r"billing\s*30")])
        assert group.locator("meter").first.evaluate("(meter) => meter.value") == 0.7
        assert violations(page) == []
        threshold = group.get_by_label("Answer only if it is at least this likely")
        expect(threshold.locator("option")).to_have_text(
            [
                re.compile("^0.%: answers 46 of 46 held-out rows, 89.% of them right"),
                re.compile("^80.%: answers 30 of 46 held-out rows, 97.% of them right"),
            ]
        )
        threshold.select_option("0.8")
        expect(group.locator(".badge")).to_have_text("unsure")
        expect(page.get_by_role("region", name="Decisions: team", exact=True)).to_be_visible()


def test_answers_to_held_out_prompts_by_step(server: ServerProcess, browser: Browser, job: str) -> None:
    """The newest is shown with the wanted answer and the base's; earlier ones are opened to compare."""

    def samples(*tuned: str | None) -> list[dict[str, object]]:
        prompts = ("The code 404 means", "word " * 100)
        of_base = (" that <b>nothing</b> works", None)
        return [
            {"prompt": prompt, "wanted": " Not Found", "base": base, "tuned": text}
            for prompt, base, text in zip(prompts, of_base, tuned, strict=True)
        ]

    steps: list[dict[str, object]] = [{"step": step, "train_loss": 6 / step} for step in range(1, 13)]
    steps[3]["samples"] = samples(" Found", None)
    steps[7]["samples"] = samples("", " Gone")
    steps[11]["samples"] = samples(" Not Found\n", " Not")
    with page_of(browser, server.url, PHONE) as page:
        pretend(page, server, job, overfitted(3, 12), steps, adapter=None)
        page.goto(f"{server.url}/#/train/{job}")
        shown = page.get_by_role("region", name="Answers while training")
        first, second = (shown.get_by_role("article", name=f"Prompt {place}") for place in (1, 2))
        expect(first).to_contain_text("The code 404 means")
        newest = first.locator("dl").first
        expect(newest.locator("dt")).to_have_text(["Wanted", "Step 12", "Base"])
        expect(newest.locator("dd")).to_have_text(["Not Found", "right Not Found", "that <b>nothing</b> works"])
        expect(second.locator("dl").first.locator("dd")).to_have_text(["Not Found", "Not", "\N{EN DASH}"])
        for place in (first, second):
            place.get_by_text("2 other answers").click()
        earlier = first.locator("details dl")
        expect(earlier.locator("dt")).to_have_text(["Step 8", "Step 4"])
        expect(earlier.locator("dd")).to_have_text(["(nothing)", "Found"])
        expect(second.locator("details dl dd")).to_have_text(["Gone", "\N{EN DASH}"])
        long = second.locator("p.text")
        expect(long).to_be_hidden()
        second.get_by_text("word word").first.click()
        expect(long).to_be_visible()
        assert violations(page) == []
        assert not is_wider_than_the_screen(page)
        pretend(page, server, job, overfitted(3, 4), steps, adapter=None)
        page.reload()
        expect(newest.locator("dt")).to_have_text(["Wanted", "Step 4", "Base"])  # whose weights were published
    with page_of(browser, server.url) as page:
        pretend(page, server, job, overfitted(3), adapter=None)
        page.goto(f"{server.url}/#/train/{job}")
        expect(page.get_by_role("article", name="Job waits")).to_contain_text("Loss by step")
        expect(page.get_by_role("region", name="Answers while training")).to_have_count(0)
