"""A small share of `tests.stress.structured_output`, and structured answers under an adapter, on the real base."""

import json

import jsonschema
import pytest

from tests.end_to_end.server_process import ServerProcess
from tests.kits.grammars import BOUNDED
from tests.stress.structured_output import HOSTILE, REFUSED_WITHIN, ask, pace

pytestmark = pytest.mark.real


def test_answers_that_stop_are_valid(server: ServerProcess) -> None:
    answers = ask(server, len(BOUNDED))
    assert not answers.faults
    assert answers.ends["stop"] == len(BOUNDED)


def test_hostile_grammars_are_refused_during_streams(server: ServerProcess) -> None:
    """Each grammar is refused in time. The command measures the streams' pace on an otherwise idle machine."""
    for _ in range(10):  # other processes may use the machine for seconds
        found = pace(server, 1.0, num_streams=4)
        assert set(found.statuses) == {422}
        assert len(found.refused_after) >= len(HOSTILE)
        if max(found.refused_after) < REFUSED_WITHIN:
            break
    assert max(found.refused_after) < REFUSED_WITHIN


def test_compare_equals_many_generates(server: ServerProcess) -> None:
    """The answers equal those of single requests; a text's score is the sum of its tokens' log-probabilities."""
    expressions = ["base", "left", "left*0.5+right*-0.5"]
    text = server.text("The weather is", max_tokens=6)
    body = {
        "prompt": "The weather is",
        "adapters": expressions,
        "temperature": 0,
        "max_tokens": 6,
        "score": [text],
    }
    response = server.client.post("/compare", json=body)
    assert response.status_code == 200, response.text
    results = response.json()["results"]
    for expression, result in zip(expressions, results, strict=True):
        alone = server.generate("The weather is", adapter=expression, max_tokens=6, logprobs=1)
        assert result["choices"][0]["text"] == alone["choices"][0]["text"]
        total = sum(entry["logprob"] for entry in alone["choices"][0]["logprobs"])
        assert result["logprob"] == pytest.approx(total, abs=1e-3)
    base = results[0]
    assert base["scores"][0]["num_tokens"] == 6
    assert base["scores"][0]["logprob"] == pytest.approx(base["logprob"], abs=1e-3)
    assert base["scores"][0]["logprob"] > max(result["scores"][0]["logprob"] for result in results[1:])


def test_structure_under_an_adapter(server: ServerProcess) -> None:
    schema = BOUNDED["label"]
    form = {"type": "json_schema", "json_schema": {"name": "label", "schema": schema}}
    text = server.text("I love it.", adapter="left", response_format=form)
    jsonschema.validate(json.loads(text), schema)
    assert text == json.dumps(json.loads(text), separators=(",", ":"))
