"""Labelled tables for `smolora train --text --label`: messy CSV files, and what is refused."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli.labels import TableError, read_labelled
from server.cli.main import app

TEAMS = ("billing", "shipping", "returns, exchanges")


def messy_tickets(path: Path, labels: Sequence[str] = TEAMS) -> int:
    """Write a table of 150 tickets as offices export them, each about one of `TEAMS`, whose label is in `labels`.

    Return how many different labelled tickets it has.
    """
    rng = random.Random(0)
    lines = ['\ufeff id ,"body", team ,notes']
    kept = set()
    for n in range(150):
        team, code = TEAMS[n % 3], labels[n % 3]
        body = (
            f'Ticket {n}: "urgent", please call,\nor write about {team}' if n % 4 else f"Ticket {n} about {team}"
        )
        if n % 10 == 9:  # a repeated record
            body, code = "My invoice is wrong", labels[0]
        label = "" if n % 25 == 24 else f" {code} " if n % 7 == 0 else code
        if label.strip():
            kept.add((body, code))
        quoted = ['"' + field.replace('"', '""') + '"' for field in (str(n), body, label, rng.choice(["", "x"]))]
        lines.append(",".join(quoted))
        if n % 30 == 0:
            lines.append("")
    path.write_text("\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    return len(kept)


def test_a_messy_table_of_150_tickets(tmp_path: Path) -> None:
    """It has a byte order mark, CRLF, quotes, commas, line breaks, blank lines, missing labels and duplicates."""
    num_kept = messy_tickets(tmp_path / "tickets.csv")
    found = read_labelled(tmp_path / "tickets.csv", "body", "team")
    assert len(found.pairs) == num_kept
    assert found.question("Which team?") == {
        "type": "choice",
        "instructions": "Which team?",
        "choices": [{"value": "billing"}, {"value": "returns, exchanges"}, {"value": "shipping"}],
    }
    assert found.notes == [
        "6 records without a team left out",
        f"{144 - num_kept} records left out that repeat another",
    ]
    found.write(tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[1] == {
        "input": 'Ticket 1: "urgent", please call,\nor write about shipping',
        "answer": "shipping",
    }


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ("body,team\n", "no record has both a body and a team"),
        ("body,teams\na,b\n", "there is no column team: did you mean teams?"),
        ("x,y\na,b\n", "there is no column body; the columns are x, y"),
        ("body,team,team\na,b,c\n", "the first line names the column team twice"),
        ("body,team\na,b,c\n", "the record that ends in line 2 has 3 columns, and the first line 2"),
        ('body,team\n"a,b\n', "line 2 is not CSV: unexpected end of data"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path: Path, table: str, fault: str) -> None:
    (tmp_path / "a.csv").write_text(table, encoding="utf-8")
    with pytest.raises(TableError) as caught:
        read_labelled(tmp_path / "a.csv", "body", "team")
    assert str(caught.value) == fault


def test_rows_that_are_no_table_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    with pytest.raises(TableError, match="--text and --label are only for CSV files: leave them out"):
        read_labelled(tmp_path / "a.jsonl", "prompt", "completion")


def test_a_table_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("body,team\nÄrger,a\n".encode("latin-1"))
    with pytest.raises(TableError, match="it is not UTF-8: save it as CSV UTF-8"):
        read_labelled(tmp_path / "a.csv", "body", "team")


@pytest.mark.parametrize(("num_labels", "found"), [(1, "1 label: 0"), (256, "256 labels")])
def test_a_choice_has_2_to_255_labels(tmp_path: Path, num_labels: int, found: str) -> None:
    lines = [f"text {n},{n}" for n in range(num_labels)]
    (tmp_path / "a.csv").write_text("\n".join(["body,team", *lines]), encoding="utf-8")
    with pytest.raises(TableError, match=f"the label's column has {found}, and a choice has 2 to 255"):
        read_labelled(tmp_path / "a.csv", "body", "team").question("")


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ("text,team\na,x\nb,y\n", "there is no column body; the columns are text, team"),
        ("body,team\na,x\nb,x\n", "the label's column has 1 label: x, and a choice has 2 to 255"),
        ("body,team\n,x\n", "no record has both a body and a team"),
    ],
)
def test_train_refuses_a_table_before_it_asks_the_server(tmp_path: Path, table: str, fault: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(table, encoding="utf-8")
    arguments = ["train", str(path), "--name", "triage", "--text", "body", "--label", "team"]
    nowhere = {"SMOLORA_URL": "http://127.0.0.1:9", "COLUMNS": "200"}
    result = CliRunner().invoke(app, arguments, env=nowhere)
    assert result.exit_code == 2
    assert fault in result.output


def test_labels_that_occur_once_or_contradict_each_other_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("body,team\na,x\nb,x\na,X\n,x\nc,y\n", encoding="utf-8")
    assert read_labelled(tmp_path / "a.csv", "body", "team").notes == [
        "1 record without a body left out",
        "1 text has several labels: a classifier can't learn which is right",
        "labels that occur once are hardly learnt: X, y",
        "labels that differ only in case count as different: X, x",
    ]
