"""Held-out decisions of one question, and scores of their options."""

import math
from collections.abc import Sequence

from server.decisions.questions import parse_question
from server.decisions.stored import StoredDecisions
from server.training.encoding import Asked, Example, Examples
from server.training.evaluate import Evaluation
from server.training.job_data import DataFacts, JobData

QUESTION = parse_question(
    {
        "type": "choice",
        "instructions": "Which team?",
        "name": "team",
        "choices": [{"value": "billing"}, {"value": "shipping"}, {"value": "sales"}],
    }
)


def decision_data(answers: Sequence[int]) -> JobData:
    """Return a job's data, whose held-out rows have these answers."""
    examples = Examples([Example((1, 2), (False, True))])
    return JobData(
        *(examples, examples, [], DataFacts("d", 1, 2, 1, 0), "b"),
        decisions=StoredDecisions((QUESTION,)),
        asked=[Asked((n,), QUESTION.digest, answer) for n, answer in enumerate(answers)],
    )


def decision_evaluation(scores: Sequence[tuple[float, ...]]) -> Evaluation:
    return Evaluation(0.5, 0.5, len(scores), len(scores), option_scores=tuple(scores))


def sharp_scores(num_rows: int) -> list[tuple[float, ...]]:
    """Return scores whose probabilities are too certain: four of five are right if row n has the answer n % 3."""
    return [
        tuple(6.0 * (k == (n if n % 5 else n + 1) % 3) + math.sin(7 * n + k) for k in range(3))
        for n in range(num_rows)
    ]
