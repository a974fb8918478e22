"""Decisions of real servers: probabilities next to transformers and PEFT in fp32, and OpenAI's client."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from openai.types.decision_create_params import Question as OpenAIQuestion

from server.decisions.prompts import prompt_text
from server.decisions.questions import parse_question
from tests.end_to_end.peft_reference import Reference
from tests.end_to_end.server_process import PATIENCE, ServerProcess

pytestmark = [pytest.mark.real, pytest.mark.thorough]

EXACT, MAX, MEAN = 1e-4, 0.05, 0.002
"""Bounds on |Δp|: in fp32, and in the default type. An undecided probability, such as 0.66 on the untrained base,
moves by up to 0.03 if keys, values and operands are rounded to 16 bits, and by 0.07 in transformers in bf16."""
MAX_MODEL_LEN = 4096


def choice(*values: str | bool, instructions: str = "Which team should answer?") -> dict[str, Any]:
    return {"type": "choice", "instructions": instructions, "choices": [{"value": value} for value in values]}


SPAM: dict[str, Any] = {"type": "predicate", "instructions": "Is the message about money?"}
ONE_TOKEN = choice("billing", "shipping")
MANY_TOKENS = choice("accounts receivable and invoices", "parcels, returns and refunds", "the warehouse")
PREFIXES = choice("billing", "billing team", "billing team leader", "bill")
TYPED = choice(True, "true", False, "yes")
MOOD: dict[str, Any] = {
    "type": "score",
    "instructions": "How angry is the customer?",
    "levels": [{"label": "calm"}, {"label": "annoyed", "description": "complains"}, {"label": "furious"}],
}
EVERY_TYPE = [SPAM, ONE_TOKEN, MANY_TOKENS, PREFIXES, TYPED, MOOD]
LARGE = choice(*(f"{'abcdefgh'[n % 8]}{n // 8}" for n in range(255)), instructions="Which shelf?")
INPUTS = [
    "My card was charged twice for one order, and nobody answers my mails!",
    "Where is my parcel? It should have come on Monday.",
    "Thank you, everything works again.",
    "Shelf a7 is empty: where are the blue ones?",
]
ADAPTERS = ["base", "right", "left*0.5+right*0.4"]


@pytest.fixture(scope="module")
def servers(
    base_dir: Path, left: Path, right: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, ServerProcess]]:
    """Servers in fp32 and in the default type."""
    started: dict[str, ServerProcess] = {}
    try:
        for dtype in ("fp32", "auto"):
            home = tmp_path_factory.mktemp(dtype)
            server = ServerProcess(home, model=base_dir, dtype=dtype, max_model_len=MAX_MODEL_LEN)
            started[dtype] = server
            server.upload("left", left)
            server.upload("right", right)
        yield started
    finally:
        for server in started.values():
            server.close()


def decide(server: ServerProcess, **body: object) -> dict[str, Any]:
    response = server.client.post("/decide", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def distribution(answer: Mapping[str, Any]) -> list[float]:
    if answer["type"] == "predicate":
        return [answer["probability"], 1 - answer["probability"]]
    return [one["probability"] for one in answer["probabilities"]]


def expected(reference: Reference, text: str, asked: Mapping[str, object]) -> list[float]:
    """Return transformers' probabilities. The prompt and the options are encoded by its own tokenizer."""
    question, tokenizer = parse_question(asked), reference.tokenizer
    turns = [{"role": "user", "content": prompt_text(text, question)}]
    rendered = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    options = [[*tokenizer.encode(option.text), tokenizer.eos_token_id] for option in question.options]
    scores = reference.scores(tokenizer.encode(rendered), options)
    return torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()


def applied(reference: Reference, adapter: str, left: Path, right: Path) -> AbstractContextManager[None]:
    if adapter == "base":
        return nullcontext()
    return reference.adapter(right) if adapter == "right" else reference.blend([(left, 0.5), (right, 0.4)])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_probabilities_equal_transformers_and_peft(
    servers: dict[str, ServerProcess], reference: Reference, left: Path, right: Path, adapter: str
) -> None:
    cases: list[tuple[Sequence[str], list[dict[str, Any]]]] = [(INPUTS, EVERY_TYPE), (INPUTS[-1:], [LARGE])]
    found: dict[str, list[list[float]]] = {dtype: [] for dtype in servers}
    for dtype, server in servers.items():
        for inputs, questions in cases:
            answer = decide(server, adapter=adapter, input=inputs, questions=questions)
            found[dtype] += [distribution(one) for result in answer["results"] for one in result["answers"]]
    with applied(reference, adapter, left, right):
        references = [
            expected(reference, text, q) for inputs, questions in cases for text in inputs for q in questions
        ]
    assert len(references) == len(INPUTS) * len(EVERY_TYPE) + 1
    for dtype, of_dtype in found.items():
        off = [
            abs(p - q)
            for mine, theirs in zip(of_dtype, references, strict=True)
            for p, q in zip(mine, theirs, strict=True)
        ]
        if dtype == "fp32":
            assert max(off) <= EXACT
        else:
            assert max(off) <= MAX
            assert sum(off) / len(off) <= MEAN


def test_openais_client_gets_the_answers_of_decide(servers: dict[str, ServerProcess]) -> None:
    server = servers["auto"]
    questions: list[OpenAIQuestion] = [
        {"type": "predicate", "instructions": SPAM["instructions"], "name": "money"},
        {
            "type": "choice",
            "instructions": "",
            "choices": [{"value": True}, {"value": "true", "description": "d"}],
        },
        {
            "type": "score",
            "instructions": MOOD["instructions"],
            "levels": [{"label": "calm"}, {"label": "furious"}],
        },
    ]
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", timeout=PATIENCE, max_retries=0) as client:
        decision = client.decisions.create(
            model="right",
            input=[{"role": "user", "type": "message", "content": [{"type": "input_text", "text": INPUTS[0]}]}],
            questions=questions,
            prompt_cache_key="k",
        )
    answer = decide(server, adapter="right", input=INPUTS[0], questions=questions)
    assert decision.model == "right@1"
    assert [one.model_dump() for one in decision.answers] == answer["results"][0]["answers"]
    money, typed, mood = decision.answers
    assert money.type == "predicate"
    assert money.name == "money"
    assert typed.type == "choice"
    assert [one.value for one in typed.probabilities] == [True, "true"]
    assert mood.type == "score"
    assert mood.score == pytest.approx(mood.probabilities[1].probability)
    assert decision.usage.total_tokens == decision.usage.input_tokens + decision.usage.output_tokens


def test_answers_do_not_depend_on_other_requests(servers: dict[str, ServerProcess]) -> None:
    """In the default type, too: alone, in large batches and with cached prefixes, the bits are the same."""
    server = servers["auto"]
    body = {"adapter": "left*0.5+right*0.4", "questions": EVERY_TYPE}
    alone = [decide(server, input=text, **body)["results"][0]["answers"] for text in INPUTS]
    with ThreadPoolExecutor(4) as threads:
        others = [
            threads.submit(server.generate, "Once upon a time", adapter=adapter, max_tokens=40, temperature=1)
            for adapter in ("base", "left", "right")
        ]
        among = threads.submit(decide, server, input=INPUTS, **body).result()
        for other in others:
            other.result()
    assert [result["answers"] for result in among["results"]] == alone


def test_a_further_question_finds_the_input_in_the_prefix_cache(servers: dict[str, ServerProcess]) -> None:
    text = "The heating in room 4 doesn't work. " * 40
    asked = [SPAM | {"instructions": f"Is it about number {n}?"} for n in range(10)]
    usage = decide(servers["auto"], input=text, questions=asked)["usage"]
    num_prompt = usage["input_tokens"] / 10
    num_computed = usage["input_tokens_details"]["cache_write_tokens"]
    assert num_computed - num_prompt <= 9 * (16 + 45)  # a block's rest, and the question with its options
    again = decide(servers["auto"], input=text, questions=asked)["usage"]
    assert again["input_tokens_details"]["cache_write_tokens"] <= 10 * 16
    assert (usage["output_tokens"], again["output_tokens"]) == (40, 40)  # yes, no and their end tokens
