"""POST /decide and /v1/decisions: the engine's requests, the answers, and what is refused before any work."""

import asyncio
import math
import threading
from collections.abc import Iterable, Mapping

import httpx
import pytest
from fastapi import FastAPI

from adapters.catalog.catalog import Catalog
from adapters.errors import SmoloraError
from adapters.library import Library
from server.access.principal import Quota
from server.decisions.prompts import DecisionEncoder
from server.decisions.questions import Question, parse_question
from server.decisions.stored import KEY, StoredDecisions
from server.engine.request import GenerationRequest, SequenceOutput
from server.errors import GenerationFailed, QueueFull
from server.model.text.chat import PromptEncoder
from tests.server.api.access.key_kit import client_with, new_secret
from tests.server.api.fakes import Caller, FakeEngine, failing, scoring, until
from tests.server.api.generate.test_generate import upload
from tests.server.conftest import BASE_NAME, EOS

pytestmark = pytest.mark.anyio

SPAM = {"type": "predicate", "instructions": "Spam?", "name": "spam"}
TEAM = {"type": "choice", "instructions": "", "choices": [{"value": "a"}, {"value": "a b"}, {"value": True}]}
MOOD = {"type": "score", "instructions": "", "levels": [{"label": "low"}, {"label": "high"}]}


@pytest.fixture(autouse=True)
def scores(engine: FakeEngine) -> None:
    engine.script = scoring


@pytest.fixture(scope="module")
def decisions(encoder: PromptEncoder) -> DecisionEncoder:
    return DecisionEncoder(encoder, EOS)


def probabilities(decisions: DecisionEncoder, question: object, temperature: float = 1.0) -> list[float]:
    """Return what the fake engine's scores mean: -0.5 for a first token, -1 for a second and so on."""
    lengths = [len(option) for option in decisions.options(parse_question(question))]
    weights = [math.exp(-0.25 * num * (num + 1) / temperature) for num in lengths]
    return [weight / sum(weights) for weight in weights]


async def store_questions(library: Library, name: str, stored: StoredDecisions) -> None:
    """Publish the next version of an uploaded adapter with the same weights and these questions."""
    catalog: Catalog = library.catalog
    last = catalog.get(name).versions[-1]
    catalog.publish(
        name,
        digest=last.digest,
        rank=last.rank,
        alpha=last.alpha,
        target_modules=last.target_modules,
        parameters=last.parameters,
        bytes=last.bytes,
        config={**last.config, KEY: stored.document()},
    )


async def test_answers_have_every_field(
    client: httpx.AsyncClient, engine: FakeEngine, decisions: DecisionEncoder
) -> None:
    response = await client.post("/decide", json={"input": "Hi", "questions": [SPAM, TEAM, MOOD]})
    assert response.status_code == 200, response.text
    answer = response.json()
    (result,) = answer["results"]
    spam, team, mood = result["answers"]
    of_spam, of_team, of_mood = (probabilities(decisions, question) for question in (SPAM, TEAM, MOOD))
    assert result["index"] == 0
    assert spam == {"type": "predicate", "name": "spam", "probability": pytest.approx(of_spam[0])}
    best = max(range(3), key=lambda index: of_team[index])
    values = ["a", "a b", True]
    assert team["choice"] == values[best]
    assert team["confidence"] == pytest.approx((3 * max(of_team) - 1) / 2)
    assert [one["value"] for one in team["probabilities"]] == values
    assert [one["probability"] for one in team["probabilities"]] == pytest.approx(of_team)
    assert mood["score"] == pytest.approx(of_mood[1])
    assert [(one["label"], one["value"]) for one in mood["probabilities"]] == [("low", 0), ("high", 1)]
    num_prompt = sum(len(request.prompt_token_ids) for request in engine.requests)
    num_options = sum(len(option) for request in engine.requests for option in request.continuations)
    assert answer["calibrated"] is False
    assert answer["warnings"] == []
    assert answer["usage"] == {
        "input_tokens": num_prompt,
        "input_tokens_details": {"cached_tokens": 48, "cache_write_tokens": num_prompt - 48},
        "output_tokens": num_options,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_prompt + num_options,
    }
    assert not engine.open


async def test_openai_gets_the_same_answers(client: httpx.AsyncClient) -> None:
    body = {"model": BASE_NAME, "input": [{"role": "user", "content": "Hi"}], "questions": [SPAM, TEAM]}
    labels = {"prompt_cache_key": "k", "prompt_cache_options": {"ttl": "30m"}, "safety_identifier": "s"}
    response = await client.post("/v1/decisions", json=body | labels)
    assert response.status_code == 200, response.text
    decided = await client.post("/decide", json={"input": "Hi", "questions": [SPAM, TEAM]})
    assert response.json() == {
        "model": BASE_NAME,
        "answers": decided.json()["results"][0]["answers"],
        "usage": decided.json()["usage"],
    }


async def test_each_question_is_one_request_whose_options_end_with_the_end_token(
    client: httpx.AsyncClient, engine: FakeEngine, decisions: DecisionEncoder
) -> None:
    await upload(client, "tweets", 1)
    body = {"adapter": "tweets*0.5", "input": ["One", "Two"], "questions": [SPAM, TEAM]}
    response = await client.post("/decide", json=body)
    assert [result["index"] for result in response.json()["results"]] == [0, 1]
    asked = [(text, parse_question(question)) for text in ("One", "Two") for question in (SPAM, TEAM)]
    assert len(engine.requests) == 4
    assert {request.prompt_token_ids: request.continuations for request in engine.requests} == {
        decisions.prompt(text, question): tuple(decisions.options(question)) for text, question in asked
    }
    assert {option[-1] for request in engine.requests for option in request.continuations} == {EOS}
    assert {
        (request.sampling.max_tokens, request.n, request.adapters[0].weight) for request in engine.requests
    } == {(0, 1, 0.5)}


async def test_stored_questions_and_temperatures_are_used_for_their_own_version(
    client: httpx.AsyncClient, library: Library, decisions: DecisionEncoder
) -> None:
    await upload(client, "triage", 1)
    await upload(client, "other", 2)
    team = parse_question(TEAM | {"name": "team"})
    stored = StoredDecisions((team,), {team.digest: 2.0})
    await store_questions(library, "triage", stored)
    answer = (await client.post("/decide", json={"adapter": "triage", "input": "Hi"})).json()
    (found,) = answer["results"][0]["answers"]
    assert (answer["calibrated"], found["name"]) == (True, "team")
    expected = probabilities(decisions, TEAM, temperature=2.0)
    assert [one["probability"] for one in found["probabilities"]] == pytest.approx(expected)

    async def calibrated(adapter: str, *questions: object) -> bool:
        body = {"adapter": adapter, "input": "Hi", "questions": questions}
        response = await client.post("/decide", json=body)
        assert response.status_code == 200, response.text
        return bool(response.json()["calibrated"])

    assert await calibrated("triage", TEAM)  # an equal question without the name
    assert not await calibrated("triage", TEAM, SPAM)
    assert not await calibrated("triage@1", TEAM)
    assert not await calibrated("triage*0.5", TEAM)
    assert not await calibrated("triage*0.5+other*0.5", TEAM)
    missing = await client.post("/decide", json={"adapter": "triage*0.5+other*0.5", "input": "Hi"})
    assert missing.status_code == 422
    assert "questions: is required: the blend's parts don't store the same ones" in missing.json()["detail"]
    await store_questions(library, "other", stored)
    both = await client.post("/decide", json={"adapter": "triage*0.5+other*0.5", "input": "Hi"})
    assert (both.status_code, both.json()["calibrated"]) == (200, False)


async def test_prompts_of_another_format_are_a_warning(client: httpx.AsyncClient, library: Library) -> None:
    await upload(client, "triage", 1)
    await store_questions(library, "triage", StoredDecisions((parse_question(SPAM),), {}, 0))
    answer = (await client.post("/decide", json={"adapter": "triage", "input": "Hi"})).json()
    warning = "triage@2: trained on prompts of format 0, and this server's is 1"
    assert answer["warnings"] == [warning]
    body = {"model": "triage", "input": "Hi", "questions": [SPAM]}
    response = await client.post("/v1/decisions", json=body)
    assert response.json()["model"] == "triage@2"
    assert response.headers["X-Smolora-Warning"] == warning


BIG = {"type": "choice", "instructions": "", "choices": [{"value": f"v{n}"} for n in range(255)]}
BAD: list[tuple[str, Mapping[str, object]]] = [
    ("input: must be a text, or a list of 1 to 1024 items", {"input": None}),
    ("input: must not be empty", {"input": ""}),
    ("input.1: must not be empty", {"input": ["a", " "]}),
    ("input: has 257 texts, more than 256: send fewer at a time", {"input": ["a"] * 257}),
    ("input.1: must be an object: a message", {"input": [{"role": "user", "content": "a"}, "b"]}),
    ("questions: is required: none are stored with it", {"questions": None}),
    ("questions: must be a list of 1 to 400 questions", {"questions": [SPAM] * 401}),
    (
        "questions.0.choices: must be a list of 2 to 255, not 256",
        {"questions": [{**BIG, "choices": [{"value": str(n)} for n in range(256)]}]},
    ),
    (
        "questions.0.choices: must be a list of 2 to 255, not 1",
        {"questions": [TEAM | {"choices": [{"value": "a"}]}]},
    ),
    (
        "questions.0.choices.1.value: equals that of choices.0: each must be different",
        {"questions": [TEAM | {"choices": [{"value": "a"}] * 2}]},
    ),
    (
        "questions: have 16,575 options over all inputs, more than 16,384: send fewer at a time",
        {"questions": [BIG] * 65},
    ),
    (
        "questions: have 65,280 options over all inputs, more than 16,384: send fewer at a time",
        {"questions": [BIG], "input": ["a"] * 256},
    ),
    ("adapter: ", {"adapter": "a++b"}),
]


@pytest.mark.parametrize(("fault", "fields"), BAD)
async def test_bad_input_is_refused_before_any_work(
    client: httpx.AsyncClient, engine: FakeEngine, fault: str, fields: Mapping[str, object]
) -> None:
    response = await client.post("/decide", json={"input": "Hi", "questions": [SPAM], **fields})
    assert response.status_code == 422, response.text
    assert fault in response.json()["detail"]
    assert not engine.requests


@pytest.mark.parametrize(
    ("fault", "fields"), [(fault, fields) for fault, fields in BAD if fields.get("questions") and len(fields) == 1]
)
async def test_bad_questions_are_refused_in_openais_form_too(
    client: httpx.AsyncClient, engine: FakeEngine, fault: str, fields: Mapping[str, object]
) -> None:
    response = await client.post("/v1/decisions", json={"model": BASE_NAME, "input": "Hi", **fields})
    assert response.status_code == 400, response.text
    assert fault in response.json()["error"]["message"]
    assert not engine.requests


@pytest.mark.parametrize("path", ["/decide", "/v1/decisions"])
async def test_400_questions_of_255_options_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, path: str
) -> None:
    response = await client.post(path, json={"input": "Hi", "questions": [BIG] * 400})
    assert response.status_code == 413
    fault = "the body has 102,802 arrays and objects, and may have 100,000; send fewer questions at a time"
    assert fault in response.text
    assert not engine.requests


async def test_a_prompt_longer_than_the_context_is_refused(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await client.post("/decide", json={"input": ["a", "a " * 500], "questions": [SPAM]})
    assert response.status_code == 422
    assert "input: item 1: with a question it has " in response.json()["detail"]
    assert not engine.requests


async def test_long_questions_are_encoded_in_a_thread(client: httpx.AsyncClient, app: FastAPI) -> None:
    """Otherwise all other requests would wait for it."""
    threads: list[str] = []
    encoder = app.state.services.submissions.encoder.decisions
    encode = encoder.prompt

    def recording(text: str, question: Question) -> tuple[int, ...]:
        threads.append(threading.current_thread().name)
        found: tuple[int, ...] = encode(text, question)
        return found

    encoder.prompt = recording
    for instructions in ("Spam?", "Is it spam? " * 1000):
        body = {"input": "Hi", "questions": [{"type": "predicate", "instructions": instructions}]}
        await client.post("/decide", json=body)
    assert len(threads) == 2
    assert threads[0] == threading.current_thread().name
    assert threads[1] != threads[0]


async def test_an_unknown_adapter_is_named(client: httpx.AsyncClient) -> None:
    response = await client.post("/decide", json={"adapter": "nobody", "input": "Hi", "questions": [SPAM]})
    assert response.status_code == 404
    response = await client.post("/v1/decisions", json={"model": "nobody", "input": "Hi", "questions": [SPAM]})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_400_questions_leave_room_in_the_queue(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    num_open: list[int] = []

    def script(request: GenerationRequest) -> Iterable[SequenceOutput]:
        num_open.append(len(engine.open))
        yield from scoring(request)

    engine.script = script
    response = await client.post("/decide", json={"input": "Hi", "questions": [SPAM] * 400})
    assert response.status_code == 200, response.text
    assert len(response.json()["results"][0]["answers"]) == len(engine.requests) == 400
    assert max(num_open) <= 32


async def test_a_place_that_others_took_is_waited_for(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Only the first request may be refused: nothing has been computed then."""
    refusals = [QueueFull("full")] * 3

    def script(request: GenerationRequest) -> Iterable[SequenceOutput]:
        engine.refusal = refusals.pop() if refusals else None
        asyncio.get_running_loop().call_later(0.02, setattr, engine, "refusal", None)
        yield from scoring(request)

    engine.script = script
    questions = [SPAM] * 40
    response = await client.post("/decide", json={"input": "Hi", "questions": questions})
    assert response.status_code == 200, response.text
    assert not refusals
    engine.refusal = QueueFull("full")
    assert (await client.post("/decide", json={"input": "Hi", "questions": questions})).status_code == 429


async def test_a_client_that_leaves_ends_all_requests(app: FastAPI, engine: FakeEngine) -> None:
    engine.hold_after = 0
    caller = Caller(app, "/decide", {"input": "Hi", "questions": [SPAM] * 100})
    await until(lambda: len(engine.open) == 32)
    caller.hang_up()
    await caller.task
    assert not engine.open
    assert len(engine.requests) == 32


async def test_one_failure_ends_all_requests(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    error: SmoloraError = GenerationFailed("broken")
    engine.script = failing(0, error)
    response = await client.post("/decide", json={"input": "Hi", "questions": [SPAM] * 100})
    assert response.status_code == 500, response.text
    assert not engine.open


async def test_rates_and_usage_count_prompts_and_options(app: FastAPI, engine: FakeEngine) -> None:
    """A common prefix counts once towards the rate: the engine computes it once. Refused calls compute nothing."""
    body = {"input": "word " * 40, "questions": [SPAM, TEAM]}
    async with client_with(app, new_secret(app, quota=Quota(tokens_per_minute=1000))) as client:
        response = await client.post("/decide", json=body)
        assert response.status_code == 200, response.text
        left = int(response.headers["x-ratelimit-remaining-tokens"])
        answer = response.json()["usage"]
        (row,) = (await client.get("/usage")).json()["rows"]
    first, second = (request.prompt_token_ids for request in engine.requests)
    num_shared = next(place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    num_options = sum(len(option) for request in engine.requests for option in request.continuations)
    assert 1000 - left == len(first) + len(second) - num_shared + num_options
    assert (row["requests"], row["prompt_tokens"], row["completion_tokens"], row["cached_tokens"]) == (
        1,
        answer["input_tokens"],
        answer["output_tokens"],
        answer["input_tokens_details"]["cached_tokens"],
    )
    engine.requests.clear()
    async with client_with(app, new_secret(app, quota=Quota(tokens_per_minute=100))) as client:
        assert (await client.post("/decide", json=body)).status_code == 429
    assert not engine.requests


async def test_a_replica_that_ignores_options_fails_the_call(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    """Replicas of the version before this one see a prompt of which nothing is scored."""

    def script(request: GenerationRequest) -> Iterable[SequenceOutput]:
        assert request.scored_from == len(request.prompt_token_ids)
        yield SequenceOutput(request.request_id, 0, "", 0, 0, 0, finish_reason="length")

    engine.script = script
    response = await client.post("/decide", json={"input": "Hi", "questions": [SPAM]})
    assert (response.status_code, response.json()["detail"]) == (
        500,
        "an engine can't score options: upgrade all replicas",
    )
