"""The README.md of an adapter, as a hub and a Markdown reader see it."""

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from server.model.base.source import HubModel
from server.model.base.weights import BaseModel
from server.training.decisions import question_reports
from server.training.evaluate import Scores
from server.training.model_card import bare_card, model_card
from server.training.report import build_report
from server.training.spec import JobSpec
from tests.server.training.reports.decisions_kit import decision_data, decision_evaluation, sharp_scores
from tests.server.training.reports.report_kit import FOUND, SPEC, UNMEASURED

READER = MarkdownIt("commonmark").enable("table")


def rows(text: str) -> list[list[str]]:
    """All rows of all tables, as a reader sees them."""
    found: list[list[str]] = []
    for token in READER.parse(text.split("---\n", 2)[2]):
        if token.type == "tr_open":
            found.append([])
        elif token.type == "inline" and token.level == 4 and found:
            found[-1].append("".join(child.content for child in token.children or ()))
    return found


def test_an_adapter(tiny_base: BaseModel) -> None:
    text = model_card(json.loads(json.dumps(build_report(SPEC, tiny_base, FOUND))))
    card = ModelCard(text)
    assert card.data["base_model"] == "tiny-llama"
    assert card.data["library_name"] == "peft"
    assert card.data["tags"] == ["smolora", "lora"]
    table = rows(text)
    assert ["", "untouched base", "version before", "this"] in table
    assert ["loss", "2.5000", "0.7500", "0.5000"] in table
    assert ["accuracy", "40.00%", "80.00%", "87.50%"] in table
    assert ["exact match", "0.00%", "25.00%", "50.00%"] in table
    assert ["trained rows remembered", "0 of 8", "0 of 8", "8 of 8"] in table
    assert "- better than the untouched base: 10 of 12 rows" in text
    assert "- better than tweets@2: 10 of 12 rows, trained ones included, exactly right, against 1 (diff" in text
    assert ["optimizer steps", "21 (3 epochs)"] in table
    assert ["tokens per second", "412.5"] in table
    assert ["peak memory", "1,500.0 MB"] in table
    assert ["stored", "1.2 MB"] in table
    assert ["base", f"tiny-llama, {tiny_base.digest}"] in table
    assert ["started from", f"tweets@2, {'cd' * 32}"] in table
    assert ["adapter", "12" * 32] in table
    assert ["data", f"54 rows, 2 of them truncated, {'ab' * 32}"] in table
    assert ["held out", f"6 rows, 3 of them training rows too, {'ef' * 32}"] in table
    assert ["21", "0.5"] in table, "the curve's last point"
    assert "rank 8, alpha 16, on `q_proj`, `v_proj`." in text
    assert FOUND.gate.reason in text
    assert '"learning_rate": 0.001' in text
    assert text.endswith("\n")


def test_the_card_lists_the_code_that_computed(tiny_base: BaseModel) -> None:
    assert ["device", "cpu (AVX512), 2 threads, bf16"] in rows(model_card(build_report(SPEC, tiny_base, FOUND)))
    gpu = replace(
        FOUND.environment,
        device="cuda:0",
        gpu="NVIDIA L4, compute capability 8.9",
        computed_by=("torch", "torch on NVIDIA L4"),
        versions={"torch": "2.13.0", "cuda": "13.0", "driver": "580.65.06"},
    )
    table = rows(model_card(build_report(SPEC, tiny_base, replace(FOUND, environment=gpu))))
    assert ["device", "NVIDIA L4, compute capability 8.9 (cuda:0), bf16"] in table
    assert ["computed by", "torch, then torch on NVIDIA L4"] in table
    assert ["versions", "torch 2.13.0, cuda 13.0, driver 580.65.06"] in table


def test_what_became_of_long_rows(tiny_base: BaseModel) -> None:
    data = replace(FOUND.data, num_split=2, num_dropped=1, num_lost_tokens=1234)
    table = rows(model_card(build_report(SPEC, tiny_base, replace(FOUND, data=data))))
    assert ["long rows", "2 split into windows that count as rows, 1 dropped, 1,234 tokens lost"] in table
    table = rows(model_card(build_report(SPEC, tiny_base, FOUND)))
    assert not any(row[0] == "long rows" for row in table)


def test_the_best_evaluations_weights(tiny_base: BaseModel) -> None:
    found = replace(FOUND, cost=replace(FOUND.cost, kept_step=10))
    table = rows(model_card(build_report(SPEC, tiny_base, found)))
    assert ["optimizer steps", "21 (3 epochs); the weights are those of step 10, the best one"] in table


def test_all_weights_without_held_out_rows(tiny_base: BaseModel) -> None:
    found = replace(UNMEASURED, adapter=None, curves={})
    text = model_card(build_report(JobSpec(name="all", method="full"), tiny_base, found))
    card = ModelCard(text)
    assert card.data["library_name"] == "transformers"
    assert "All weights of tiny-llama, fine-tuned." in text
    assert "no rows were held out" in text
    assert "started from" not in text


def test_unmeasured_values_have_no_row(tiny_base: BaseModel) -> None:
    base, tuned = (Scores(replace(of.held_out, matches=None)) for of in (FOUND.base, FOUND.tuned) if of.held_out)
    table = rows(model_card(build_report(SPEC, tiny_base, replace(FOUND, base=base, tuned=tuned, latest=None))))
    assert ["loss", "2.5000", "0.5000"] in table
    assert not any(row[0] in ("exact match", "trained rows remembered") for row in table)


def test_a_version_that_left_latest_behind(tiny_base: BaseModel) -> None:
    report = build_report(SPEC, tiny_base, FOUND)
    assert "did not become" not in model_card(report | {"moves_latest": True})
    assert "It did not become `latest`." in model_card(report | {"moves_latest": False})


def test_recall_without_held_out_rows(tiny_base: BaseModel) -> None:
    found = replace(UNMEASURED, tuned=Scores(None, (True, False)), base=Scores(None, (False, False)))
    assert ["trained rows remembered", "0 of 2", "1 of 2"] in rows(
        model_card(build_report(SPEC, tiny_base, found))
    )


def test_decisions(tiny_base: BaseModel) -> None:
    data = decision_data([n % 3 for n in range(40)])
    base, tuned = decision_evaluation([(0.0, -1.0, -2.0)] * 40), decision_evaluation(sharp_scores(40))
    found = question_reports(data, {"base": base, "tuned": tuned})
    text = model_card(json.loads(json.dumps(build_report(SPEC, tiny_base, replace(FOUND, decisions=found)))))
    table = rows(text)
    assert "## Decisions: team\n\nRight on 32 of 40 held-out rows (the base on 14, " in text
    assert ["accuracy", "35.0% (20.6% to 51.7%)", "80.0% (64.4% to 90.9%)"] in table
    names = [row[0] for row in table]
    assert names.index("brier") + 1 == names.index("brier without temperature")
    assert ["", "billing", "shipping", "sales"] in table
    assert ["sales", "3", "0", "10"] in table
    assert "fitted without it" in text
    few = question_reports(decision_data([0]), {"base": None, "tuned": decision_evaluation([(0.0, -9.0, -9.0)])})
    text = model_card(build_report(SPEC, tiny_base, replace(FOUND, decisions=few)))
    assert ["accuracy", "100.0% (2.5% to 100.0%)"] in rows(text)
    assert "fitted without it" not in text
    none = question_reports(decision_data([0]), {"base": None, "tuned": None})
    text = model_card(build_report(SPEC, tiny_base, replace(FOUND, decisions=none)))
    assert "No held-out row was measured" in text


def test_a_report_of_an_older_release(tiny_base: BaseModel) -> None:
    report = build_report(SPEC, tiny_base, FOUND)
    newer = ("recall", "comparisons", "moves_latest", "decisions")
    old = {key: value for key, value in report.items() if key not in newer}
    assert ["loss", "2.5000", "0.7500", "0.5000"] in rows(model_card(old))


@pytest.mark.parametrize(
    "description",
    [
        "# Heading\n\n| a | b |\n|---|---|\n| 1 | 2 |",
        "<script>alert(1)</script> <img src=x onerror=y> &amp;",
        "[click](https://example.org) ![see](x.png) <https://example.org> `code` **bold** ~~gone~~",
        "---\nbase_model: other\n---",
        "- item\n+ item\n* item\n1. item\n23) item\n\n    indented\n> quoted\n```\nfence",
        "title\n===\nother\n---",
        "tab\tand\x00control\u2028lines",
    ],
)
def test_a_description_is_only_text(description: str, tiny_base: BaseModel) -> None:
    plain = model_card(build_report(replace(SPEC, description="x"), tiny_base, FOUND))
    text = model_card(build_report(replace(SPEC, description=description), tiny_base, FOUND))
    assert ModelCard(text).data.to_dict() == ModelCard(plain).data.to_dict()
    start = text.split("---\n", 2)[2]
    quote = start[start.index(">") : start.index("\n\nA LoRA adapter")]
    kinds = {token.type for token in READER.parse(quote)}
    inline = {child.type for token in READER.parse(quote) for child in token.children or ()}
    assert kinds <= {"blockquote_open", "blockquote_close", "paragraph_open", "paragraph_close", "inline"}
    assert inline <= {"text", "softbreak", "text_special"}
    assert text.count("\n## ") == plain.count("\n## ")


def test_a_bases_name_is_only_text(tiny_base: BaseModel) -> None:
    name = 'a|b"\n: <i>c</i>'
    text = model_card(build_report(SPEC, replace(tiny_base, name=name), FOUND))
    assert ModelCard(text).data["base_model"] == name
    assert ["base", f'a|b" : <i>c</i>, {tiny_base.digest}'] in rows(text)


def test_how_to_load_an_adapter(tiny_base: BaseModel) -> None:
    """If the base has a hub id, PEFT finds the base by itself."""
    report = build_report(SPEC, tiny_base, FOUND)
    plain, known = model_card(report), model_card(report, HubModel("owner/tiny", "c0ffee"))
    assert "PeftModel.from_pretrained(base," in plain
    assert "No hub id of its base, tiny-llama, is known." in plain
    assert ModelCard(known).data["base_model"] == "owner/tiny"
    assert "AutoPeftModelForCausalLM.from_pretrained(" in known
    assert "Its weights differ." in model_card(report, HubModel("owner/tiny", note="Its weights differ."))
    whole = build_report(JobSpec(name="all", method="full"), tiny_base, replace(FOUND, adapter=None))
    assert "## Use" not in model_card(whole)


def test_a_card_without_a_report() -> None:
    card = bare_card("x<i>y", None)
    assert ModelCard(card).data["base_model"] == "x<i>y"
    assert "x\\<i\\>y" in card
    assert "AutoPeft" in bare_card(None, HubModel("owner/tiny"))
