"""Probabilities and answers, next to torch's softmax."""

import pytest
import torch

from server.decisions.answers import answer, confidence, probabilities
from server.decisions.questions import parse_question


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_probabilities_are_the_softmax_of_scores_over_temperature(temperature: float) -> None:
    scores = [-3.0, -1.5, -800.0, -2.0]
    expected = torch.softmax(torch.tensor(scores, dtype=torch.float64) / temperature, 0).tolist()
    assert probabilities(scores, temperature) == pytest.approx(expected, abs=1e-15)
    assert probabilities([-5000.0, -5000.0]) == [0.5, 0.5]


def test_confidence_is_0_if_all_are_equal_and_1_if_one_is_certain() -> None:
    assert confidence([0.25] * 4) == 0
    assert confidence([0.0, 1.0, 0.0]) == 1
    assert confidence([0.75, 0.25]) == 0.5


def test_each_type_has_its_answer() -> None:
    spam = parse_question({"type": "predicate", "instructions": "", "name": "spam"})
    assert answer(spam, [0.9, 0.1]) == {"type": "predicate", "name": "spam", "probability": 0.9}
    choice = parse_question({"type": "choice", "instructions": "", "choices": [{"value": True}, {"value": "a"}]})
    assert answer(choice, [0.25, 0.75]) == {
        "type": "choice",
        "name": None,
        "choice": "a",
        "confidence": 0.5,
        "probabilities": [{"value": True, "probability": 0.25}, {"value": "a", "probability": 0.75}],
    }
    levels = [{"label": "low"}, {"label": "mid"}, {"label": "high"}]
    score = parse_question({"type": "score", "instructions": "", "levels": levels})
    assert answer(score, [0.5, 0.25, 0.25]) == {
        "type": "score",
        "name": None,
        "score": 0.75,
        "confidence": 0.25,
        "probabilities": [
            {"label": "low", "value": 0, "probability": 0.5},
            {"label": "mid", "value": 1, "probability": 0.25},
            {"label": "high", "value": 2, "probability": 0.25},
        ],
    }
