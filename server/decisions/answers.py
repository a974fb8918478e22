"""Answers: probabilities from the options' log-probabilities, and the JSON of each type of question."""

import math
from collections.abc import Sequence

from server.decisions.questions import Question


def probabilities(scores: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Return softmax(score / temperature) over the options. `scores` are log-probabilities in nats.

    If the temperature is 1, the model's own preferences are unchanged; a higher one makes them more equal.
    """
    largest = max(scores)
    weights = [math.exp((score - largest) / temperature) for score in scores]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def confidence(distribution: Sequence[float]) -> float:
    """Return how concentrated a distribution over k options is: (k · max p - 1) / (k - 1), from 0 to 1."""
    num = len(distribution)
    return max(0.0, (num * max(distribution) - 1) / (num - 1))


def answer(question: Question, distribution: Sequence[float]) -> dict[str, object]:
    """Return the answer to a question as JSON, given its options' probabilities."""
    found: dict[str, object] = {"type": question.type, "name": question.name}
    if question.type == "predicate":
        return found | {"probability": distribution[0]}
    pairs = list(zip(question.options, distribution, strict=True))
    found["confidence"] = confidence(distribution)
    if question.type == "choice":
        found["choice"] = max(pairs, key=lambda pair: pair[1])[0].value
        found["probabilities"] = [{"value": option.value, "probability": p} for option, p in pairs]
    else:
        found["score"] = math.fsum(value * p for value, p in enumerate(distribution))
        found["probabilities"] = [
            {"label": option.value, "value": value, "probability": p} for value, (option, p) in enumerate(pairs)
        ]
    return found
