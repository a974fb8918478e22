"""A finished run step by step, as the CSV that OpenAI's clients read from a job's result file.

What is not measured at a step is left empty; accuracy in training isn't measured at all.
"""

import csv
import io
from collections.abc import Sequence

from server.training.loop.evaluate import Evaluation

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")

Curve = Sequence[tuple[int, float]]
"""(optimizer steps done, nats per counted token), in order."""


def step_metrics_csv(train: Curve, held_out: Curve, step: int, tuned: Evaluation | None) -> bytes:
    """A line for each step of `train`; `tuned` is what the weights that were kept, those of `step`, are worth."""
    losses = dict(held_out)
    accuracies: dict[int, float] = {}
    if tuned is not None:
        losses[step] = tuned.loss
        accuracies[step] = tuned.accuracy
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for number, loss in train:
        writer.writerow((number, loss, "", losses.get(number, ""), accuracies.get(number, "")))
    return text.getvalue().encode()
