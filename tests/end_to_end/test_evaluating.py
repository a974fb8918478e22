"""Evaluations on real servers with real workers: next to a training's report and /decide, killed, cancelled."""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from adapters.peft.files import write
from server.cli.main import app
from server.model.base.weights import BaseModel
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import (
    CHILD,
    WORKER,
    code_rows,
    get,
    processes,
    submit,
    succeeded,
    wait_until,
)
from tests.server.jobs.merge_kit import sample

TEAMS: Mapping[str, Sequence[str]] = {
    "billing": ("I was charged twice", "The invoice is wrong", "My card was declined", "I want a refund"),
    "shipping": ("Where is my parcel", "The box arrived late", "The courier lost it", "Change my address"),
    "support": ("The app crashes", "I can't log in", "The screen stays black", "It shows error 7"),
}
QUESTION: dict[str, Any] = {
    "type": "choice",
    "instructions": "Which team?",
    "choices": [{"value": team} for team in TEAMS],
}
TICKETS = [
    {"input": f"{text}{end}", "answer": team} for end in ("!", ".") for team, of in TEAMS.items() for text in of
]


def upload(server: ServerProcess, rows: Sequence[Mapping[str, object]]) -> str:
    content = "".join(f"{json.dumps(row)}\n" for row in rows)
    response = server.client.post("/datasets", files={"file": ("rows.jsonl", content.encode())})
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def evaluate(server: ServerProcess, **body: object) -> str:
    response = server.client.post("/evaluate", json=body)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def findings(server: ServerProcess, job_id: str, seconds: float = 300.0) -> dict[str, Any]:
    succeeded(server, job_id, seconds)
    job: dict[str, Any] = get(server, f"/evaluate/{job_id}")
    return job


def values(job: Mapping[str, Any], metric: str) -> dict[str, float]:
    return {one["adapter"]: one["value"] for one in job["results"] if one["metric"] == metric}


@pytest.fixture(scope="module")
def tiny(
    tiny_trainer: ServerProcess, tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> ServerProcess:
    directory = tmp_path_factory.mktemp("left")
    write(directory, sample(tiny_base.config.shape, 1))
    tiny_trainer.upload("measured", directory)
    return tiny_trainer


@pytest.mark.parametrize("module", [CHILD, WORKER])
def test_killed_evaluation_finds_what_an_undisturbed_one_finds(tiny: ServerProcess, module: str) -> None:
    """Its process is killed as soon as it runs, or its worker with it."""
    body = {"adapters": ["base", "measured", "measured*0.5"], "datasets": [upload(tiny, code_rows())]}
    wait_until(lambda: not processes(tiny, CHILD))
    job_id = evaluate(tiny, **body)
    wait_until(lambda: bool(processes(tiny, CHILD)))
    for process in processes(tiny, module):
        process.kill()
    killed = findings(tiny, job_id)
    assert killed["attempt"] >= 2
    calm = findings(tiny, evaluate(tiny, **body))
    for name in ("results", "differences", "flips"):
        assert killed[name] == calm[name]
    assert len(calm["results"]) == 3 * 3
    assert tiny.client.delete(f"/evaluate/{job_id}").status_code == 204


def test_cancelled_evaluation_frees_its_adapter(tiny: ServerProcess) -> None:
    of_rows = upload(tiny, code_rows())
    job_id = evaluate(tiny, adapters=["measured"], datasets=[of_rows])
    assert tiny.client.post(f"/evaluate/{job_id}/cancel").json()["status"] == "cancelled"
    wait_until(lambda: not processes(tiny, CHILD))
    assert tiny.client.delete(f"/datasets/{of_rows}").status_code == 204


def test_command_prints_a_table(tiny: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "codes.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in code_rows()))
    arguments = ["evaluate", str(path), "-a", "base", "-a", "measured", "--limit", "20"]
    own = {"SMOLORA_URL": tiny.url, "COLUMNS": "200"}
    result = CliRunner().invoke(app, arguments, env=own)
    assert result.exit_code == 0, result.output
    title, *lines = result.stdout.splitlines()
    assert re.split(" {2,}", title.strip()) == [
        *("data set", "metric", "adapter", "value", "95 % interval"),
        *("rows", "difference", "95 % interval", "flips"),
    ]
    assert [line.split()[1:3] for line in lines] == [
        [metric, adapter]
        for metric in ("loss", "token_accuracy", "exact_match")
        for adapter in ("base", "measured")
    ]
    assert "measured measured" in result.stderr
    assert lines[-1].rstrip().endswith("0 gained, 0 lost")
    document = json.loads(CliRunner().invoke(app, [*arguments, "--metric", "loss", "--json"], env=own).stdout)
    assert [one["metric"] for one in document["results"]] == ["loss", "loss"]
    assert f"{document['results'][1]['value']:.4f}" == lines[1].split()[3]
    followed = CliRunner().invoke(app, ["jobs", document["id"], "--follow"], env=own)
    assert followed.exit_code == 0, followed.output
    assert f"{document['results'][1]['value']:.4f}" in followed.stdout
    few = CliRunner().invoke(app, [*arguments[:-1], "19", "--metric", "loss"], env=own)
    assert few.stdout.count("too few rows") == 3, "of both values and of the difference"
    refused = CliRunner().invoke(app, [*arguments, "--metric", "brier"], env=own)
    assert refused.exit_code == 1
    assert "brier fits no row" in refused.stderr


@pytest.mark.real
@pytest.mark.thorough  # on a tiny base: tests/server/jobs/test_evaluate_job.py
def test_real_base_is_measured_as_by_a_training(trainer: ServerProcess) -> None:
    """Loss, accuracy and exact match of the same rows, to the last bit, and a blend of half the adapter."""
    rows = code_rows()
    learnt, held_out = rows[::2], [*rows[:8:2], *rows[1::2]]
    of_held_out = upload(trainer, held_out)
    training = {"max_steps": 40, "max_length": 64}
    body = {"name": "evaluated", "data": learnt, "validation": of_held_out, "lora": {"rank": 8}}
    trained = succeeded(trainer, submit(trainer, **body, training=training, test=of_held_out), 300)
    whole = get(trainer, f"/train/{trained['id']}/report")
    report = whole["evaluation"]
    assert {name: whole["test"][name] for name in ("base", "tuned")} == {
        name: report[name] for name in ("base", "tuned")
    }
    job = findings(
        trainer,
        evaluate(trainer, adapters=["base", "evaluated@1", "evaluated@1*0.5"], datasets=[of_held_out]),
    )
    for metric, name in (("loss", "loss"), ("token_accuracy", "accuracy"), ("exact_match", "exact_match")):
        found = values(job, metric)
        assert (found["base"], found["evaluated@1"]) == (report["base"][name], report["tuned"][name]), metric
    losses = values(job, "loss")
    assert len(set(losses.values())) == 3
    matched = [flip for flip in job["flips"] if flip["to"] == "evaluated@1"]
    assert matched
    assert all(flip["gained"] for flip in matched)
    phrases = {status.phrase for status in HTTPStatus}
    assert {flip["answers"][1].strip() for flip in matched} <= phrases


@pytest.mark.real
@pytest.mark.thorough
def test_decisions_are_measured_as_decide_answers(trainer: ServerProcess) -> None:
    """Accuracy and Brier score by plain formulas on the answers of /decide, with the stored temperature."""
    questions = {"team": QUESTION}
    body = {"name": "tickets", "data": TICKETS, "validation": TICKETS, "questions": questions, "lora": {"rank": 4}}
    training = {"max_steps": 4, "max_length": 128}
    trained = succeeded(trainer, submit(trainer, **body, training=training, test=TICKETS), 300)
    on_test = get(trainer, f"/train/{trained['id']}/report")["decisions"]["team"]
    assert on_test["rows"] == "test"
    adapters = ["base", "tickets@1", "tickets@1*0.5"]
    job = findings(trainer, evaluate(trainer, adapters=adapters, datasets=[upload(trainer, TICKETS)]))
    for adapter in adapters:
        asked = {"adapter": adapter, "input": [row["input"] for row in TICKETS], "questions": [QUESTION]}
        response = trainer.client.post("/decide", json=asked)
        assert response.status_code == 200, response.text
        assert response.json()["calibrated"] is (adapter == "tickets@1")
        briers, rights = [], []
        for row, result in zip(TICKETS, response.json()["results"], strict=True):
            (answer,) = result["answers"]
            rights.append(answer["choice"] == row["answer"])
            briers.append(
                sum((one["probability"] - (one["value"] == row["answer"])) ** 2 for one in answer["probabilities"])
            )
        assert values(job, "accuracy")[adapter] == pytest.approx(sum(rights) / len(TICKETS))
        assert values(job, "brier")[adapter] == pytest.approx(sum(briers) / len(TICKETS), abs=1e-9)
    assert len(set(values(job, "brier").values())) == 3
    assert on_test["tuned"]["brier"]["value"] == pytest.approx(values(job, "brier")["tickets@1"], abs=1e-9)


@pytest.mark.real
@pytest.mark.thorough
def test_json_answers_are_validated_as_by_another_library(trainer: ServerProcess) -> None:
    """A base that hardly answers in JSON, and an adapter that learnt to: by /generate and jsonschema."""
    schema = {
        "type": "object",
        "properties": {"code": {"type": "integer"}, "phrase": {"type": "string", "pattern": "^[A-Z]"}},
        "required": ["code", "phrase"],
        "additionalProperties": False,
    }
    rows = [
        {
            "prompt": f"{status.value} as JSON:",
            "completion": f" {json.dumps({'code': status.value, 'phrase': status.phrase})}",
            "schema": schema,
        }
        for status in HTTPStatus
    ]
    training = {"max_steps": 30, "max_length": 64}
    body = {"name": "coded", "data": rows[::2], "lora": {"rank": 8}, "training": training}
    succeeded(trainer, submit(trainer, **body), 300)
    held_out = rows[1::2]
    adapters, metrics = ["base", "coded@1"], ["json_valid", "exact_match"]
    of_rows = upload(trainer, held_out)
    job = findings(trainer, evaluate(trainer, adapters=adapters, datasets=[of_rows], metrics=metrics))
    validator = jsonschema.Draft202012Validator(schema)

    def is_valid(adapter: str, prompt: object) -> bool:
        asked = {"adapter": adapter, "prompt": prompt, "max_tokens": 100, "temperature": 0}
        answer = trainer.client.post("/generate", json=asked).json()["choices"][0]["text"]
        try:
            return validator.is_valid(json.loads(answer))
        except json.JSONDecodeError:
            return False

    with ThreadPoolExecutor(8) as pool:
        shares = {
            adapter: sum(pool.map(is_valid, [adapter] * len(held_out), [row["prompt"] for row in held_out]))
            / len(held_out)
            for adapter in adapters
        }
    assert values(job, "json_valid") == shares
    assert shares["coded@1"] > 0.5 > shares["base"]
    (valid, _) = job["differences"]
    assert valid["gained"] >= 6
    assert valid["low"] > 0
