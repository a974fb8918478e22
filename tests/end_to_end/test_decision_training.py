"""A messy table of tickets becomes a classifier in one command, and /decide needs only the input."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server.cli.main import app
from tests.end_to_end.server_process import ServerProcess
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
    train(trainer, tmp_path / "tickets.csv", "--max-steps", "40")
    question = {"type": "choice", "instructions": "Which team?", "choices": [{"value": team} for team in CODES]}
    assert accuracy(trainer, "triage") >= 11 / 12
    assert accuracy(trainer, "base", [question]) <= 8 / 12
