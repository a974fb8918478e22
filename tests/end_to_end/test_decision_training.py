"""A messy table of tickets becomes a classifier in one command, and /decide needs only the input."""

import io
import json
import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server.cli.main import app
from server.decisions.answers import probabilities
from server.decisions.calibration import fit_temperature, folds_of
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import get, submit, succeeded
from tests.server.cli.test_cli_labels import TEAMS, messy_tickets

pytestmark = pytest.mark.real

CODES = ("K7", "M2", "T4")
"""Labels that nobody can guess from the texts."""
NEW = {f"A question about {TEAMS[n % 3]} and number {n}": CODES[n % 3] for n in range(300, 312)}


def smolora(server: ServerProcess, *arguments: str) -> Result:
    result = CliRunner().invoke(app, arguments, env={"SMOLORA_URL": server.url, "COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return result


def train(server: ServerProcess, table: Path, *options: str) -> Result:
    messy_tickets(table, CODES)
    return smolora(server, "train", str(table), "--name", "triage", "--text", "body", "--label", "team", *options)


def accuracy(server: ServerProcess, adapter: str, questions: object = None) -> float:
    """Return the share of new tickets whose likeliest label is right."""
    body = {"adapter": adapter, "input": list(NEW), "questions": questions}
    response = server.client.post("/decide", json=body)
    assert response.status_code == 200, response.text
    answers = [result["answers"][0] for result in response.json()["results"]]
    num_right = sum(answer["choice"] == team for answer, team in zip(answers, NEW.values(), strict=True))
    return float(num_right / len(NEW))


def card_of(server: ServerProcess, name: str) -> str:
    """Return the README.md that is downloaded with the first version."""
    response = server.client.get(f"/adapters/{name}/1/download")
    assert response.status_code == 200, response.text
    with zipfile.ZipFile(io.BytesIO(response.content)) as files:
        return files.read("README.md").decode()


def test_a_version_stores_its_question(tiny_trainer: ServerProcess, tmp_path: Path) -> None:
    result = train(tiny_trainer, tmp_path / "tickets.csv", "--max-steps", "2", "--instructions", "Who answers?")
    assert "6 records without a team left out" in result.output
    config = tiny_trainer.client.get("/adapters/triage/1").json()["config"]
    question = {"type": "choice", "instructions": "Who answers?", "choices": [{"value": team} for team in CODES]}
    assert config["decisions"] == {
        "format": 1,
        "questions": {"team": question | {"name": "team"}},
        "temperatures": {},
    }
    (decided,) = json.loads(smolora(tiny_trainer, "decide", "Where is it?", "-a", "triage", "--json").stdout)[
        "results"
    ]
    assert [one["value"] for one in decided["answers"][0]["probabilities"]] == list(CODES)
    lines = smolora(tiny_trainer, "decide", "Where is it?", "-a", "triage").stdout.splitlines()
    assert lines[0].split() == ["question", "answer", "probability"]
    assert lines[1].startswith("team")
    assert sum(float(line.split()[-1]) for line in lines[1:]) == pytest.approx(1, abs=2e-3)


@pytest.mark.thorough
def test_a_table_of_tickets_becomes_a_classifier(trainer: ServerProcess, tmp_path: Path) -> None:
    result = train(trainer, tmp_path / "tickets.csv", "--max-steps", "40")
    card = card_of(trainer, "triage")
    assert "## Decisions: team" in card
    (summary,) = (line for line in card.splitlines() if line.startswith("Right on "))
    found = re.match(r"Right on (\d+) of (\d+) held-out rows .*: expect (\d+)% to (\d+)% right answers", summary)
    assert found is not None, summary
    num_right, num_rows, low, high = map(int, found.groups())
    assert low < 100 * num_right / num_rows <= high
    assert "More held-out rows would narrow this. Don't trust its probabilities" in summary  # a tenth is 12 rows
    assert " ".join(summary.split()) in " ".join(result.output.split())
    question = {"type": "choice", "instructions": "Which team?", "choices": [{"value": team} for team in CODES]}
    assert accuracy(trainer, "triage") >= 11 / 12
    assert accuracy(trainer, "base", [question]) <= 8 / 12


TEAM = {"type": "choice", "instructions": "Which team?", "choices": [{"value": code} for code in CODES]}


def noisy_rows(first: int, count: int) -> list[dict[str, object]]:
    """Return tickets. Every sixth has another team's label."""
    return [
        {"input": f"Ticket {n} about {TEAMS[n % 3]}", "answer": CODES[(n + (n % 6 == 0)) % 3]}
        for n in range(first, first + count)
    ]


def logs_of(server: ServerProcess, adapter: str, rows: Sequence[dict[str, object]]) -> list[list[float]]:
    """Return the logarithms of the probabilities that /decide answers, by row and option."""
    body = {"adapter": adapter, "input": [row["input"] for row in rows], "questions": [TEAM]}
    response = server.client.post("/decide", json=body)
    assert response.status_code == 200, response.text
    answers = [result["answers"][0] for result in response.json()["results"]]
    return [[math.log(one["probability"]) for one in answer["probabilities"]] for answer in answers]


def figures(logs: Sequence[Sequence[float]], answers: Sequence[int], num_bins: int) -> dict[str, float]:
    """Return the report's figures by plain formulas."""
    rows = [probabilities(row) for row in logs]
    chosen = [max(range(3), key=row.__getitem__) for row in rows]
    f1, used = 0.0, set(chosen) | set(answers)
    for option in used:
        hits = sum(one == two == option for one, two in zip(chosen, answers, strict=True))
        f1 += 2 * hits / (chosen.count(option) + list(answers).count(option)) / len(used)
    gaps = [0.0] * num_bins
    for row, one, two in zip(rows, chosen, answers, strict=True):
        gaps[min(int(max(row) * num_bins), num_bins - 1)] += max(row) - (one == two)
    return {
        "accuracy": sum(one == two for one, two in zip(chosen, answers, strict=True)) / len(rows),
        "macro_f1": f1,
        "brier": sum(
            (p - (option == two)) ** 2
            for row, two in zip(rows, answers, strict=True)
            for option, p in enumerate(row)
        )
        / len(rows),
        "calibration_error": sum(map(abs, gaps)) / len(rows),
    }


@pytest.mark.thorough
def test_the_report_has_the_figures_of_decides_answers(trainer: ServerProcess) -> None:
    rows = noisy_rows(1000, 80)
    job_id = submit(
        trainer,
        name="noisy",
        data=noisy_rows(0, 90),
        validation=rows,
        questions={"team": TEAM},
        training={"max_steps": 30},
        publish_if="improves_base",
        publish_metric="brier",
    )
    succeeded(trainer, job_id, seconds=600)
    report = get(trainer, f"/train/{job_id}/report")
    found, answers = report["decisions"]["team"], [CODES.index(str(row["answer"])) for row in rows]
    assert found["num_rows"] == 80
    stored = get(trainer, "/adapters/noisy/1")["config"]["decisions"]["temperatures"]
    (temperature,) = stored.values()
    assert found["temperature"] == temperature
    # p is softmax(score / T), so T log p is the scores up to a constant
    scores = [[temperature * log for log in row] for row in logs_of(trainer, "noisy@1", rows)]
    base = logs_of(trainer, "base", rows)
    for name, logs in (("tuned", scores), ("base", base)):
        uncalibrated = figures(logs, answers, num_bins=8)
        assert {one: found[name]["uncalibrated"][one]["value"] for one in ("brier", "calibration_error")} == (
            pytest.approx({one: uncalibrated[one] for one in ("brier", "calibration_error")}, abs=0.01)
        )
        crossed, folds = [], folds_of(80)
        for number, row in enumerate(logs):
            others = [n for n in range(80) if folds[n] != folds[number]]
            fitted = fit_temperature([logs[n] for n in others], [answers[n] for n in others])
            crossed.append([score / fitted for score in row])
        expected = figures(crossed, answers, num_bins=8)
        assert {one: found[name][one]["value"] for one in expected} == pytest.approx(expected, abs=0.02)
    assert 0.7 < found["tuned"]["accuracy"]["value"] < 0.95  # every sixth label is wrong
    assert report["comparisons"]["base"]["metric"] == "brier"
    assert report["comparisons"]["base"]["tuned"] == pytest.approx(found["tuned"]["brier"]["value"])
    assert report["comparisons"]["base"]["verdict"] == "better"
    card = card_of(trainer, "noisy")
    assert found["summary"].split(" (")[0] in card
    assert f"| brier | {found['base']['brier']['value']:.3f} " in card
