"""The model card: a README.md that is made from an adapter's report, and downloaded with the adapter's files.

Model hubs read the front matter. Users write the description and names, so they are escaped and appear as text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import cast

from server.model.base.source import HubModel
from server.system.messages import plural

Fields = Mapping[str, object]

_MARKUP = re.compile(r"[\\`*_\[\]<>|#&!~]")
_MARKUP_AT_START = re.compile(r"^(\d*)([-+=.)])")  # starts a list or a rule, or underlines a heading
_MAX_CURVE_ROWS = 10
_MEASURES = {"loss": "{:.4f}", "perplexity": "{:.3f}", "accuracy": "{:.2%}", "exact_match": "{:.2%}"}
_FIGURES = {"accuracy": "{:.1%}", "macro_f1": "{:.3f}", "brier": "{:.3f}", "calibration_error": "{:.3f}"}
_TITLES = {"base": "untouched base", "latest": "version before", "parent": "parent", "tuned": "this"}


def model_card(report: Fields, hub: HubModel | None = None) -> str:
    """Return the Markdown for the report of a training job or a merge. The report may have been stored as JSON.

    `hub` is the base on the hub, if the hub has it.
    """
    if report.get("kind") == "merge":
        return _merge_card(report, hub)
    parts = [_front_matter(report, hub), f"# {_text(report['name'])}"]
    if report["description"]:
        parts.append("\n".join(f"> {_text(line)}" for line in str(report["description"]).splitlines()))
    parts += [_introduction(report), *_usage(report, hub), "## Evaluation", _evaluation(report), _test(report)]
    parts += _decisions(report)
    parts += ["## Cost", _table(("", ""), _cost(report)), "## Origin"]
    parts += [_table(("", ""), _origin(report)), "## Configuration", _configuration(report)]
    curves = _curves(_fields(report, "curves"))
    return "\n\n".join(part for part in [*parts, *curves] if part) + "\n"


def bare_card(base_model: str | None, hub: HubModel | None) -> str:
    """Return the Markdown for an adapter without a report, such as an uploaded one. It names no version, so that
    equal adapters have equal cards."""
    report: Fields = {"base_model": {"name": base_model}, "adapter": True, "method": "lora"}
    return "\n\n".join([_front_matter(report, hub), "# A LoRA adapter", *_usage(report, hub)]) + "\n"


def _merge_card(report: Fields, hub: HubModel | None) -> str:
    config, adapter = _fields(report, "config"), _fields(report, "adapter")
    parts = cast("Sequence[Fields]", _fields(report, "lineage")["parts"])
    made_of = [
        (f"{_text(part['name'])}@{part['version']}", f"{part['weight']:g}", f"`{part['digest']}`")
        for part in parts
    ]
    rank = "that of A and B" if config["rank"] is None and report["method"] != "svd" else adapter["rank"]
    how = f"`{report['method']}`, density {config['density']:g}, seed {config['seed']}, rank {rank}"
    distance = report["distance"]
    off = "the exact sum is 0" if distance is None else f"{distance:.2%} of the exact sum's norm away from it"
    facts = [
        ("method", how),
        ("distance", off),
        ("adapter", f"`{adapter['digest']}`"),
        ("stored", _bytes(report["bytes_stored"])),
        ("wall time", f"{report['wall_seconds']:,.1f} s"),
    ]
    head = [_front_matter(report, hub), f"# {_text(report['name'])}", _introduction(report), *_usage(report, hub)]
    body = ["## Parts", _table(("adapter", "weight", "digest"), made_of), _table(("", ""), facts)]
    return "\n\n".join([*head, *body]) + "\n"


_AUTO = """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("folder of this file")"""
_BY_HAND = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("folder or hub id of the base")
model = PeftModel.from_pretrained(base, "folder of this file")"""


def _usage(report: Fields, hub: HubModel | None) -> list[str]:
    """Return a heading, code that loads the adapter, and a remark about its base. Empty for a whole model."""
    if not report["adapter"]:
        return []
    if hub is not None:
        remark = f"`adapter_config.json` names the base, {_text(hub.id)}."
        if hub.note:
            remark += f" {_text(hub.note)}"
        return ["## Use", f"```python\n{_AUTO}\n```", remark]
    name = _fields(report, "base_model")["name"]
    known_as = "" if name is None else f", {_text(name)},"
    remark = (
        f"No hub id of its base{known_as} is known. Write the base's folder or hub id to "
        "`base_model_name_or_path` in `adapter_config.json`, and `AutoPeftModelForCausalLM` finds it by itself."
    )
    return ["## Use", f"```python\n{_BY_HAND}\n```", remark]


def _front_matter(report: Fields, hub: HubModel | None) -> str:
    name = _fields(report, "base_model")["name"] if hub is None else hub.id
    values = {
        **({} if name is None else {"base_model": name}),
        "library_name": "peft" if report["adapter"] else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["smolora", str(report["method"])],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]  # JSON is valid YAML
    return "\n".join(["---", *lines, "---"])


def _introduction(report: Fields) -> str:
    base = _fields(report, "base_model")
    if not report["adapter"]:
        return f"All weights of {_text(base['name'])}, fine-tuned."
    adapter = _fields(report, "adapter")
    modules = ", ".join(f"`{name}`" for name in cast("Sequence[str]", adapter["target_modules"]))
    name = "an unknown base" if base["name"] is None else _text(base["name"])
    return (
        f"A LoRA adapter for {name}: rank {adapter['rank']}, alpha {adapter['alpha']:g}"
        f"{', rank-stabilized' if adapter['use_rslora'] else ''}, on {modules}. "
        "PEFT's `PeftModel.from_pretrained` reads it over that base, whose weights stay as they are."
    )


def _evaluation(report: Fields) -> str:
    """Return a table of adapter, base and earlier versions, then the verdicts and the decision on publishing."""
    gate = _fields(report, "gate")
    ending = [f"Publication (`{gate['publish_if']}`): {_text(gate['reason'])}."]
    if report.get("moves_latest") is False:
        ending.append("It did not become `latest`.")
    ending = [*_verdicts(report), *ending]
    recalled = _recalled(report)
    if not report["evaluation"]:
        head = "Not measured on held-out rows: no rows were held out."
        return "\n\n".join([head, *([_table(*recalled)] if recalled else []), *ending])
    table = _measured(_fields(report, "evaluation"), "held-out row", recalled[1] if recalled else [])
    return "\n\n".join([table, *ending])


def _test(report: Fields) -> str:
    """Return the table and the verdict of the test rows, or an empty text if there are none."""
    if not report.get("test"):
        return ""
    test = _fields(report, "test")
    comparison = cast("Fields | None", test["comparison"])
    remark = "Nothing was chosen by the test rows."
    verdict = [] if comparison is None else [f"- {_text(comparison['summary'])}"]
    return "\n\n".join([_measured(test, "test row"), *verdict, remark])


def _measured(evaluation: Fields, noun: str, more: Sequence[tuple[str, ...]] = ()) -> str:
    """Return a sentence and a table of measurements on rows. `more` are further rows of the table."""
    columns = {name: _fields(evaluation, name) for name in _TITLES if evaluation.get(name)}
    rows = [
        (measure.replace("_", " "), *(_value(column[measure], form) for column in columns.values()))
        for measure, form in _MEASURES.items()
        if any(column[measure] is not None for column in columns.values())
    ]
    size = (
        f"{_count(evaluation, 'num_rows', noun)}, {_count(evaluation, 'num_tokens', 'counted token')} "
        "(loss in nats a token)"
    )
    return f"On {size}:\n\n{_table(('', *(_TITLES[name] for name in columns)), [*rows, *more])}"


def _recalled(report: Fields) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """Return the header and the only row of a table, or None if nothing was measured.

    The table shows how many training rows the model reproduces exactly.
    """
    if not report.get("recall"):
        return None
    recall = _fields(report, "recall")
    right = _fields(recall, "num_right")
    measured = [name for name in _TITLES if right.get(name) is not None]
    shares = [f"{right[name]} of {recall['num_rows']}" for name in measured]
    return ("", *(_TITLES[name] for name in measured)), [("trained rows remembered", *shares)]


def _verdicts(report: Fields) -> list[str]:
    """Return a Markdown list of the comparisons' verdicts, or [] if the report (of an older release) has none."""
    found = cast("Mapping[str, Fields | None]", report.get("comparisons") or {})
    lines = [f"- {_text(comparison['summary'])}" for comparison in found.values() if comparison is not None]
    lines += [f"- {_text(reason)}" for reason in cast("Fields", report.get("unmeasured") or {}).values()]
    return ["\n".join(lines)] if lines else []


def _decisions(report: Fields) -> list[str]:
    """Return a section for each question of a job of decisions: how far to trust the answers."""
    parts = []
    for name, found in cast("Mapping[str, Fields]", report.get("decisions") or {}).items():
        parts += [f"## Decisions: {_text(name)}", _text(found["summary"])]
        if not found["num_rows"]:
            continue
        columns = {key: _fields(found, key) for key in _TITLES if found.get(key)}
        rows = []
        for figure, form in _FIGURES.items():
            if figure in columns["tuned"]:
                cells = [_estimate(column[figure], form) for column in columns.values()]
                rows.append((figure.replace("_", " "), *cells))
            if figure in cast("Fields", columns["tuned"].get("uncalibrated", {})):
                cells = [_estimate(_fields(column, "uncalibrated")[figure], form) for column in columns.values()]
                rows.append((f"{figure.replace('_', ' ')} without temperature", *cells))
        parts.append(_table(("", *(_TITLES[key] for key in columns)), rows))
        if found["temperature"] is not None:
            kind = found.get("rows", "held-out")  # missing in an older release's report
            how = (
                "each row was measured with one fitted without it"
                if kind == "held-out"
                else ("it was fitted to the held-out rows, and nothing was chosen by the test rows")
            )
            parts.append(
                f"In brackets: 95 % intervals over {_count(found, 'num_rows', f'{kind} row')}. The version's "
                f"temperature is {found['temperature']:.3f}; {how}."
            )
        parts += _reliability(found) + _confusion(_fields(found, "confusion"))
    return parts


def _estimate(estimate: object, form: str) -> str:
    value, low, high = (form.format(cast("Fields", estimate)[name]) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _reliability(found: Fields) -> list[str]:
    """Return the reliability curve as a table, if there is one."""
    bins = cast("Sequence[Fields]", found["reliability"])
    rows = [
        (
            f"{one['low']:.0%} to {one['high']:.0%}",
            f"{one['num_rows']:,}",
            f"{one['confidence']:.1%}",
            f"{one['accuracy']:.1%}",
        )
        for one in bins
    ]
    return [_table(("confidence", "rows", "mean confidence", "accuracy"), rows)] if rows else []


def _confusion(confusion: Fields) -> list[str]:
    """Return the confusion matrix as a table: a row for each right answer, a column for each given one."""
    counts = cast("Sequence[Sequence[int]]", confusion["counts"])
    options = [_text(option) for option in cast("Sequence[str]", confusion["options"])]
    if len(counts) > len(options):
        options.append("others")
    rows = [(option, *(f"{count:,}" for count in row)) for option, row in zip(options, counts, strict=True)]
    return ["Right answers by row, given answers by column:", _table(("", *options), rows)]


def _cost(report: Fields) -> list[tuple[str, str]]:
    return [
        ("method", _text(report["method"])),
        (
            "trainable parameters",
            f"{report['trainable_parameters']:,} ({report['trainable_share']:.2%} of the base)",
        ),
        ("optimizer steps", f"{report['steps']:,} ({report['epochs']:.3g} epochs){_kept(report)}"),
        ("tokens", f"{report['tokens']:,}"),
        ("tokens per second", f"{report['tokens_per_second']:,.1f}"),
        ("wall time", f"{report['wall_seconds']:,.1f} s"),
        ("peak memory", _bytes(report["peak_memory_bytes"])),
        ("stored", _bytes(report["bytes_stored"])),
    ]


def _count(fields: Fields, name: str, noun: str) -> str:
    return plural(cast("int", fields[name]), noun)


def _kept(report: Fields) -> str:
    """Return a remark if the weights aren't those of the last step, else an empty text."""
    kept = report.get("kept_step", report["steps"])
    return "" if kept == report["steps"] else f"; the weights are those of step {kept:,}, the best one"


def _origin(report: Fields) -> list[tuple[str, str]]:
    base, data, environment = (_fields(report, name) for name in ("base_model", "data", "environment"))
    adapter, lineage = report["adapter"], report["lineage"]
    rows = [("base", f"{_text(base['name'])}, `{base['digest']}`")]
    if lineage:
        parent = _fields(report, "lineage")
        rows.append(("started from", f"{_text(parent['start_from'])}, `{parent['digest']}`"))
    if adapter:
        rows.append(("adapter", f"`{_fields(report, 'adapter')['digest']}`"))
    rows.append(
        ("data", f"{_count(data, 'rows', 'row')}, {data['truncated']:,} of them truncated, `{data['digest']}`")
    )
    if long := _long_rows(data):
        rows.append(("long rows", long))
    if data["validation_digest"]:
        overlap = f", {data['overlap']:,} of them training rows too" if data["overlap"] else ""
        rows.append(
            ("held out", f"{_count(data, 'validation_rows', 'row')}{overlap}, `{data['validation_digest']}`")
        )
    if data.get("test_digest"):
        overlap = f", {data['test_overlap']:,} of them other rows too" if data["test_overlap"] else ""
        rows.append(("test", f"{_count(data, 'test_rows', 'row')}{overlap}, `{data['test_digest']}`"))
    versions = ", ".join(f"{name} {version}" for name, version in _fields(environment, "versions").items())
    machine = (
        f"{environment['device']} ({environment['instructions']}), {_count(environment, 'threads', 'thread')}"
    )
    if gpu := environment.get("gpu"):
        machine = f"{_text(gpu)} ({environment['device']})"
    computed_by = ", then ".join(map(_text, cast("Sequence[str]", environment["computed_by"])))
    rows += [("device", f"{machine}, {environment['dtype']}"), ("computed by", computed_by)]
    rows.append(("versions", _text(versions)))
    return rows


def _long_rows(data: Fields) -> str:
    """Return what became of rows that were too long, held-out ones included. Older reports don't say it."""
    what = {"split": "split into windows that count as rows", "dropped": "dropped"}
    found = [f"{data[name]:,} {words}" for name, words in what.items() if data.get(name)]
    return ", ".join(found + ([f"{_count(data, 'lost_tokens', 'token')} lost"] if data.get("lost_tokens") else []))


def _configuration(report: Fields) -> str:
    config = {key: value for key, value in _fields(report, "config").items() if key not in ("name", "description")}
    return f"```json\n{json.dumps(config, indent=2)}\n```"


def _curves(curves: Mapping[str, object]) -> list[str]:
    """Return a heading and a short table for each curve."""
    parts = []
    for name, curve in curves.items():
        points = cast("Sequence[tuple[int, float]]", curve)
        if points:
            last, count = len(points) - 1, min(len(points), _MAX_CURVE_ROWS)
            chosen = [points[i * last // max(1, count - 1)] for i in range(count)]
            rows = [(f"{step:,}", f"{value:.4g}") for step, value in chosen]
            parts += [f"## {_text(name.replace('_', ' '))}", _table(("step", ""), rows)]
    return parts


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(value: object, form: str) -> str:
    return "-" if value is None else form.format(value)


def _bytes(value: object) -> str:
    return f"{cast('int', value) / 1e6:,.1f} MB"


def _text(value: object) -> str:
    """Escape a user's text: no markup, no table cells, no list, and on one line."""
    line = "".join(character for character in " ".join(str(value).split()) if character.isprintable())
    line = _MARKUP.sub(r"\\\g<0>", line)
    return _MARKUP_AT_START.sub(r"\1\\\2", line)


def _fields(report: Fields, name: str) -> Fields:
    return cast("Fields", report[name])
