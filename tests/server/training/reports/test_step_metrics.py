"""The CSV of a run's steps."""

import csv
import io

from server.training.evaluate import Evaluation
from server.training.report import step_metrics_csv


def read(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode())))


def test_measurements_are_at_their_steps() -> None:
    tuned = Evaluation(loss=0.25, accuracy=0.875, num_rows=2, num_tokens=8)
    rows = read(step_metrics_csv([(1, 3.5), (2, 2.0), (3, 0.1)], [(1, 3.0), (3, 0.5)], 3, tuned))
    assert [list(row.values()) for row in rows] == [
        ["1", "3.5", "", "3.0", ""],
        ["2", "2.0", "", "", ""],
        ["3", "0.1", "", "0.25", "0.875"],
    ]
    assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]


def test_nothing_held_out() -> None:
    rows = read(step_metrics_csv([(1, 1 / 3)], [], 1, None))
    assert float(rows[0]["train_loss"]) == 1 / 3
    assert rows[0]["valid_loss"] == rows[0]["valid_mean_token_accuracy"] == ""
