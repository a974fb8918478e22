"""POST /compare: the engine's requests, the answer, and that it is complete or refused."""

import json
import weakref
from collections.abc import Iterable, Mapping

import httpx
import pytest
from fastapi import FastAPI

from adapters.errors import InvalidInput
from server.engine.request import GenerationRequest, Grammar, SampledLogprob, SamplingParams, SequenceOutput
from server.errors import GenerationFailed, QueueFull
from server.model.text.chat import ChatMessage, PromptEncoder
from tests.server.api.fakes import Caller, FakeEngine, FakeStream, failing, scoring, until, words
from tests.server.api.generate.test_generate import upload
from tests.server.conftest import BASE_NAME, MAX_MODEL_LEN

pytestmark = pytest.mark.anyio


async def test_answer_has_every_field(
    client: httpx.AsyncClient, engine: FakeEngine, encoder: PromptEncoder
) -> None:
    engine.script = scoring
    digest = await upload(client, "tweets", 1)
    texts = [" Found", "?"]
    body = {
        "prompt": "Not",
        "adapters": ["base", "tweets*0.5", BASE_NAME],
        "score": texts,
        "max_tokens": 2,
        "n": 2,
        "seed": 3,
    }
    response = await client.post("/compare", json=body)
    assert response.status_code == 200, response.text
    results = response.json()["results"]
    assert [result["adapter"] for result in results] == ["base", "tweets*0.5", BASE_NAME]
    parts = [{"name": "tweets", "version": 1, "digest": digest, "weight": 0.5}]
    assert [result["adapters"] for result in results] == [[], parts, []]
    lengths = [len(encoder.continuation(text)) for text in texts]
    for result in results:
        assert (result["model"], result["seed"], result["logprob"]) == (BASE_NAME, 3, -0.5)
        assert [choice["logprob"] for choice in result["choices"]] == [-0.5, -0.5]
        assert [choice["text"] for choice in result["choices"]] == ["w0 w1 ", "w0 w1 "]
        assert [choice["logprobs"] for choice in result["choices"]] == [None, None]
        assert result["scores"] == [
            {"text": text, "logprob": -0.25 * length * (length + 1), "num_tokens": length, "logprobs": None}
            for text, length in zip(texts, lengths, strict=True)
        ]
    assert not engine.open


async def test_summed_logprobs_are_not_kept(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Nothing limits them without `logprobs`: those of 256 answers of 8,000 tokens would take a gigabyte."""
    alive: list[int] = []

    def script(request: GenerationRequest) -> Iterable[SequenceOutput]:
        alive_logprobs: weakref.WeakSet[SampledLogprob] = weakref.WeakSet()
        for output in words(request):
            alive.append(len(alive_logprobs))
            alive_logprobs.update(output.logprobs)
            yield output

    engine.script = script
    response = await client.post("/compare", json={"prompt": "a", "adapters": ["base"], "max_tokens": 32})
    assert response.json()["results"][0]["logprob"] == -0.25 * 32
    assert max(alive) <= 2, "what is under way"


async def test_scores_of_each_token(client: httpx.AsyncClient, engine: FakeEngine, encoder: PromptEncoder) -> None:
    engine.script = scoring
    body = {"prompt": "Not", "adapters": ["base"], "score": [" Found, again"], "max_tokens": 1, "logprobs": 2}
    response = await client.post("/compare", json=body)
    ((score,),) = [result["scores"] for result in response.json()["results"]]
    assert [entry["logprob"] for entry in score["logprobs"]] == [
        -0.5 * (number + 1) for number in range(len(encoder.continuation(" Found, again")))
    ]
    assert all(
        entry["top"] == [{key: entry[key] for key in ("token", "bytes", "logprob")}] for entry in score["logprobs"]
    )


async def test_requests_that_reach_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine, encoder: PromptEncoder
) -> None:
    engine.script = scoring
    await upload(client, "tweets", 1)
    messages = [{"role": "user", "content": "Hi"}]
    body = {
        "messages": messages,
        "adapters": ["base", "tweets"],
        "score": ["Yes"],
        "regex": "w.*",
        "max_tokens": 8,
    }
    response = await client.post("/compare", json=body)
    assert response.status_code == 200, response.text
    prompt = tuple(encoder.messages([ChatMessage("user", "Hi")]))
    answers = [request for request in engine.requests if request.scored_from is None]
    scores = [request for request in engine.requests if request.scored_from is not None]
    seed = answers[0].sampling.seed
    for request in answers:
        assert request.prompt_token_ids == prompt
        # All share one random stream.
        assert request.sampling == SamplingParams(max_tokens=8, seed=seed, logprobs=1)
        assert request.grammar == Grammar("regex", "w.*")
    for request in scores:
        assert request.prompt_token_ids == prompt + tuple(encoder.continuation("Yes"))
        assert (request.scored_from, request.sampling.max_tokens, request.grammar) == (len(prompt), 0, None)
    assert [request.adapters for request in answers] == [request.adapters for request in scores]
    assert len(set(answers)) == 2


async def test_logprobs_are_returned_if_asked_for(client: httpx.AsyncClient) -> None:
    body = {"prompt": "a", "adapters": ["base"], "max_tokens": 2, "logprobs": 2}
    (result,) = (await client.post("/compare", json=body)).json()["results"]
    assert [len(entry["top"]) for entry in result["choices"][0]["logprobs"]] == [2, 2]
    assert result["scores"] is None


BAD: list[tuple[str, Mapping[str, object]]] = [
    ("adapters", {}),
    ("adapters", {"adapters": []}),
    ("adapters", {"adapters": "base"}),
    ("adapters", {"adapters": ["base"] * 17}),
    ("adapters", {"adapters": ["base", "a++b"]}),
    ("adapters", {"adapters": ["base", ""]}),
    ("adapters", {"adapters": [None]}),
    ("adapter", {"adapters": ["base"], "adapter": "base"}),
    ("stream", {"adapters": ["base"], "stream": "yes"}),
    ("score", {"adapters": ["base"], "score": []}),
    ("score", {"adapters": ["base"], "score": "a"}),
    ("score", {"adapters": ["base"], "score": ["a", ""]}),
    ("score", {"adapters": ["base"], "score": ["a"] * 17}),
    ("score", {"adapters": ["base"], "max_tokens": 1, "score": ["q" * MAX_MODEL_LEN]}),
    ("max_tokens", {"adapters": ["base"], "max_tokens": MAX_MODEL_LEN}),
    ("temperature", {"adapters": ["base"], "temperature": 6}),
    ("stop", {"adapters": ["base"], "regex": "a", "stop": "a"}),
]


@pytest.mark.parametrize(("field", "fields"), BAD)
async def test_invalid_bodies_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, field: str, fields: Mapping[str, object]
) -> None:
    response = await client.post("/compare", json={"prompt": "a", **fields})
    assert response.status_code == 422, response.text
    assert field in {error["loc"][-1] for error in response.json()["errors"]}
    assert not engine.open


async def test_unknown_adapter_is_404_and_pins_nothing(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await client.post("/compare", json={"prompt": "a", "adapters": ["base", "nobody@7"]})
    assert response.status_code == 404
    assert "nobody" in response.json()["detail"]
    assert (len(engine.requests), engine.open) == (1, set())


async def test_queue_that_fills_up_midway_refuses_all(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = engine.submit

    def submit(request: GenerationRequest) -> FakeStream:
        if len(engine.requests) == 3:
            raise QueueFull
        return taken(request)

    monkeypatch.setattr(engine, "submit", submit)
    body = {"prompt": "a", "adapters": ["base"] * 4, "max_tokens": 1}
    response = await client.post("/compare", json=body)
    assert response.status_code == 429
    assert "Retry-After" in response.headers
    assert (len(engine.closed), engine.open) == (3, set())


async def test_one_failure_fails_the_comparison(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = failing(1, GenerationFailed("the engine failed"))
    response = await client.post("/compare", json={"prompt": "a", "adapters": ["base", "base"]})
    assert response.status_code == 500
    assert not engine.open


@pytest.mark.parametrize("overflows", ["answer", "score"])
async def test_adapters_that_overflow_are_named_by_their_item(
    client: httpx.AsyncClient, engine: FakeEngine, overflows: str
) -> None:
    """The engine doesn't know the items, and names the field `adapter`."""
    await upload(client, "tweets", 1)
    fail = failing(0, InvalidInput.of("adapter", "too large"))

    def script(request: GenerationRequest) -> Iterable[SequenceOutput]:
        is_score = request.scored_from is not None
        fails = bool(request.adapters) and is_score == (overflows == "score")
        return fail(request) if fails else scoring(request)

    engine.script = script
    body = {"prompt": "a", "adapters": ["base", "tweets"], "score": ["b"], "max_tokens": 2}
    response = await client.post("/compare", json=body)
    assert response.status_code == 422
    assert response.json()["errors"] == [{"loc": ["adapters"], "message": "item 1: too large"}]
    assert not engine.open


async def test_client_that_leaves_frees_everything(app: FastAPI, engine: FakeEngine) -> None:
    engine.hold_after = 1
    caller = Caller(app, "/compare", {"prompt": "a", "adapters": ["base"] * 3, "score": ["b"]})
    await until(lambda: len(engine.open) == 6)
    caller.hang_up()
    await caller.task
    assert not engine.open


async def streamed(client: httpx.AsyncClient, body: Mapping[str, object]) -> list[dict[str, object]]:
    response = await client.post("/compare", json={"prompt": "Not", "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_stream_has_every_answer_and_its_reference(
    client: httpx.AsyncClient, engine: FakeEngine, encoder: PromptEncoder
) -> None:
    engine.script = scoring
    await upload(client, "tweets", 1)
    body = {"adapters": ["base", "tweets"], "max_tokens": 2, "logprobs": 3, "seed": 5, "reference": "base"}
    events = await streamed(client, body)
    for result in (0, 1):
        found = [event for event in events if event["result"] == result]
        assert "".join(str(event.get("text", "")) for event in found) == "w0 w1 "
        (last,) = [event for event in found if "finish_reason" in event]
        assert (last["finish_reason"], last["seed"]) == ("length", 5)
        tokens = [token for event in found for token in event.get("logprobs", [])]  # type: ignore[attr-defined]
        assert [(token["token"], len(token["top"])) for token in tokens] == [("w0 ", 3), ("w1 ", 3)]
    assert [event["result"] for event in events if "reference" in event] == [1]
    (scores,) = [event["reference"] for event in events if "reference" in event]
    assert isinstance(scores, list)
    assert [token["logprob"] for token in scores] == [-0.5, -1]
    scored = engine.requests[-1]
    assert scored.prompt_token_ids == (*encoder.prompt("Not"), 100, 101)
    assert scored.adapters == ()
    assert not engine.open


async def test_stream_without_logprobs_has_text_alone(client: httpx.AsyncClient) -> None:
    events = await streamed(client, {"adapters": ["base"], "max_tokens": 1})
    assert len(events) == 1
    assert not {"logprobs", "reference"} & set(events[0])


async def test_a_full_queue_leaves_out_the_reference(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await upload(client, "tweets", 1)
    submit = engine.submit

    def refusing(request: GenerationRequest) -> FakeStream:
        if request.scored_from is not None:
            raise QueueFull(retry_after=1)
        return submit(request)

    monkeypatch.setattr(engine, "submit", refusing)
    body = {"adapters": ["tweets"], "max_tokens": 1, "logprobs": 1, "reference": "base"}
    assert (await streamed(client, body))[-1] == {"result": 0, "index": 0, "reference": None}


async def test_failure_ends_the_stream(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = failing(2, GenerationFailed("broke"))
    body = {"prompt": "a", "adapters": ["base"], "stream": True}
    response = await client.post("/compare", json=body)
    assert "event: error" in response.text
    assert not engine.open


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"reference": "base"}, "reference"),
        ({"reference": "base", "stream": True}, "reference"),
        ({"reference": "a+", "stream": True, "logprobs": 1}, "reference"),
        ({"score": ["a"], "stream": True}, "score"),
    ],
)
async def test_fields_of_a_stream_are_checked(
    client: httpx.AsyncClient, fields: dict[str, object], name: str
) -> None:
    response = await client.post("/compare", json={"prompt": "a", "adapters": ["base"], **fields})
    assert response.status_code == 422
    assert [error["loc"] for error in response.json()["errors"]] == [[name]]
