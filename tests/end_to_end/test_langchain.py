"""LangChain's decisions, unchanged, get the answers of /decide."""

import asyncio
import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
from openai import BadRequestError

from tests.end_to_end.server_process import PATIENCE, ServerProcess

if find_spec("langchain_openai") is None:
    pytest.skip("needs langchain-openai: make client-tests", allow_module_level=True)

from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai.decisions import Choice, Level, OpenAIDecisions, Predicate, Score

if TYPE_CHECKING:
    from langchain_openai.decisions import DecisionResponse

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore:.*is in beta"),
]

TEXT = "My card was charged twice for one order, and nobody answers my mails!"
QUESTIONS = {
    "money": Predicate(instructions="Is the message about money?"),
    "team": Choice(instructions="Which team?", choices={"billing": "cards and invoices", "shipping": None}),
    "typed": Choice(instructions="Is it urgent?", choices={True: None, "true": "as a word", False: None}),
    "mood": Score(instructions="How angry?", levels=["calm", Level(label="furious", description="shouts")]),
}
PLAIN = [
    {"type": "predicate", "name": "money", "instructions": "Is the message about money?"},
    {
        "type": "choice",
        "name": "team",
        "instructions": "Which team?",
        "choices": [{"value": "billing", "description": "cards and invoices"}, {"value": "shipping"}],
    },
    {
        "type": "choice",
        "name": "typed",
        "instructions": "Is it urgent?",
        "choices": [{"value": True}, {"value": "true", "description": "as a word"}, {"value": False}],
    },
    {
        "type": "score",
        "name": "mood",
        "instructions": "How angry?",
        "levels": [{"label": "calm"}, {"label": "furious", "description": "shouts"}],
    },
]
"""The same questions, for /decide."""


def decisions(server: ServerProcess) -> OpenAIDecisions:
    return OpenAIDecisions(
        model="right", base_url=f"{server.url}/v1", api_key="any", timeout=PATIENCE, max_retries=0
    )


def decided(server: ServerProcess, text: object) -> Mapping[str, Mapping[str, Any]]:
    """Return the answers of /decide by the questions' names."""
    response = server.client.post("/decide", json={"adapter": "right", "input": text, "questions": PLAIN})
    assert response.status_code == 200, response.text
    return {answer["name"]: answer for answer in response.json()["results"][0]["answers"]}


def assert_equal(found: "DecisionResponse", expected: Mapping[str, Mapping[str, Any]]) -> None:
    assert set(found.answers) == set(QUESTIONS)
    assert found.predicates["money"].probability == expected["money"]["probability"]
    for name in ("team", "typed"):
        answer, plain = found.choices[name], expected[name]
        assert (answer.choice, answer.confidence) == (plain["choice"], plain["confidence"])
        assert answer.probabilities == {one["value"]: one["probability"] for one in plain["probabilities"]}
    mood, plain = found.scores["mood"], expected["mood"]
    assert (mood.score, mood.confidence) == (plain["score"], plain["confidence"])
    assert mood.legend == {0: "calm", 1: "furious"}
    assert mood.probabilities == {one["value"]: one["probability"] for one in plain["probabilities"]}


def test_all_types_of_questions_are_answered_as_by_decide(server: ServerProcess) -> None:
    found = decisions(server).invoke({"input": TEXT, "questions": QUESTIONS})
    assert found.model == "right@1"
    assert found.request_id
    assert found.usage.input_tokens
    assert found.usage.output_tokens
    assert_equal(found, decided(server, TEXT))


def test_messages_and_objects_are_read_as_text(server: ServerProcess) -> None:
    """LangChain sends human messages as they are, and anything else as JSON in one message."""
    client = decisions(server)
    human = client.invoke({"input": [HumanMessage(TEXT)], "questions": QUESTIONS})
    assert_equal(human, decided(server, TEXT))
    dialogue = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Sorry!"}]
    mixed = client.invoke({"input": [HumanMessage(TEXT), AIMessage("Sorry!")], "questions": QUESTIONS})
    assert_equal(mixed, decided(server, json.dumps(dialogue)))
    state = client.invoke({"input": {"ticket": 7, "text": TEXT}, "questions": QUESTIONS})
    assert_equal(state, decided(server, json.dumps({"ticket": 7, "text": TEXT})))


def test_the_asynchronous_client_gets_the_same(server: ServerProcess) -> None:
    found = asyncio.run(decisions(server).ainvoke({"input": TEXT, "questions": QUESTIONS}))
    assert_equal(found, decided(server, TEXT))


def test_a_faulty_question_is_named(server: ServerProcess) -> None:
    with pytest.raises(BadRequestError, match=r"questions.0.choices: must be a list of 2 to 255, not 1"):
        decisions(server).invoke(
            {"input": TEXT, "questions": {"one": Choice(instructions="Which?", choices={"a": None})}}
        )
