"""POST /v1/completions on a fake engine: prompts in all forms, several at once, and the older logprobs."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from server.engine.request import GenerationRequest, SamplingParams, SequenceOutput
from server.errors import QueueFull
from server.model.text.chat import PromptEncoder
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.fakes import Caller, FakeEngine, FakeStream, until, words
from tests.server.conftest import BASE_NAME, MAX_MODEL_LEN, MakeServices, client_of, new_app

pytestmark = pytest.mark.anyio

PATH = "/v1/completions"


async def ask(client: httpx.AsyncClient, **fields: object) -> dict[str, Any]:
    response = await client.post(PATH, json={"model": BASE_NAME, "prompt": "a", "max_tokens": 2, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def refusal(client: httpx.AsyncClient, **fields: object) -> dict[str, Any]:
    response = await client.post(PATH, json={"model": BASE_NAME, "prompt": "a", "max_tokens": 2, **fields})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


async def test_answer_has_every_field(client: httpx.AsyncClient, encoder: PromptEncoder) -> None:
    answer = await ask(client)
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    num_prompt = len(encoder.prompt("a"))
    assert answer == {
        "object": "text_completion",
        "model": BASE_NAME,
        "choices": [{"text": "w0 w1 ", "index": 0, "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": 2,
            "total_tokens": num_prompt + 2,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_defaults_are_openais(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(client, max_tokens=None)
    (request,) = engine.requests
    assert request.sampling == SamplingParams(16, temperature=1.0, seed=request.sampling.seed)


async def test_prompts_may_be_texts_or_tokens(
    client: httpx.AsyncClient, engine: FakeEngine, encoder: PromptEncoder
) -> None:
    a, b = tuple(encoder.prompt("a")), tuple(encoder.prompt("bc"))
    for prompt, expected in [
        ("a", [a]),
        (["a"], [a]),
        (["a", "bc"], [a, b]),
        ([3, 4, 5], [(3, 4, 5)]),
        ([[3, 4], [5]], [(3, 4), (5,)]),
        (["a", [5]], [a, (5,)]),
    ]:
        engine.requests.clear()
        answer = await ask(client, prompt=prompt)
        assert [request.prompt_token_ids for request in engine.requests] == expected
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], None, 5, {"a": 1}, [1.5], [-1], [True], ["a"] * 129, [["a"]], [1, "a"]]
)
async def test_invalid_prompts_are_refused(client: httpx.AsyncClient, engine: FakeEngine, prompt: object) -> None:
    assert (await refusal(client, prompt=prompt))["param"] == "prompt"
    assert engine.requests == []


async def test_tokens_beyond_the_vocabulary_are_refused(client: httpx.AsyncClient, encoder: PromptEncoder) -> None:
    """They would fail the whole step, and with it other requests."""
    num = encoder.num_tokens
    assert (await ask(client, prompt=[num - 1]))["usage"]["prompt_tokens"] == 1
    assert (await refusal(client, prompt=[0, num]))["param"] == "prompt"
    assert (await refusal(client, prompt=[[1], [0, num]]))["param"] == "prompt"


async def test_choices_are_numbered_through_all_prompts(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await ask(client, prompt=[[1], [2]], n=2, seed=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [request.n for request in engine.requests] == [2, 2]
    assert {request.sampling.seed for request in engine.requests} == {3}
    assert answer["usage"]["completion_tokens"] == 8
    assert engine.open == set()


async def test_repeated_prompts_have_different_seeds(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """A token's noise is a hash of seed, choice and position, so one seed would give equal answers."""
    await ask(client, prompt=["a"] * 4)
    assert len({request.sampling.seed for request in engine.requests}) == 4
    assert len({replace(request.sampling, seed=0) for request in engine.requests}) == 1


class NarrowEngine(FakeEngine):
    """An engine that takes one request at a time."""

    def submit(self, request: GenerationRequest) -> FakeStream:
        if self.open:
            raise QueueFull(retry_after=1)
        return super().submit(request)


async def test_all_prompts_are_refused_if_one_is(make_services: MakeServices) -> None:
    engine = NarrowEngine()
    async with client_of(new_app(replace(make_services(), engine=engine))) as client:
        response = await client.post(PATH, json={"model": BASE_NAME, "prompt": ["a", "b"]})
        assert response.status_code == 429
        assert len(engine.requests) == len(engine.closed) == 1
        assert engine.open == set()
        error = await refusal(client, prompt=["a", [1] * MAX_MODEL_LEN])
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
        assert len(engine.requests) == 1


async def test_too_many_prompts_for_an_empty_queue_are_invalid(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    """A 429 would be retried in vain."""
    engine.max_in_flight = 6
    await ask(client, prompt=["a"] * 3, n=2)
    await ask(client, n=7)  # an idle engine takes a single oversized request
    engine.requests.clear()
    error = await refusal(client, prompt=["a"] * 4, n=2)
    assert error["param"] == "prompt"
    assert "8 sequences" in error["message"]
    body = {"prompt": "a", "adapters": ["base"] * 3, "n": 2, "score": ["b"], "max_tokens": 1}
    assert [fault["loc"] for fault in (await client.post("/compare", json=body)).json()["errors"]] == [
        ["adapters"]
    ]
    assert engine.requests == []


@pytest.mark.parametrize(
    ("name", "value"), [("echo", 1), ("suffix", "end"), ("best_of", 3), ("logprobs", 21), ("messages", [])]
)
async def test_unsupported_fields_are_refused_by_name(client: httpx.AsyncClient, name: str, value: object) -> None:
    assert (await refusal(client, **{name: value}))["param"] == name


async def test_values_that_disable_unsupported_fields_are_accepted(client: httpx.AsyncClient) -> None:
    await ask(client, echo=None, suffix=None, best_of=2, n=2)


async def test_logprobs_are_parallel_lists(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await ask(client, logprobs=2)
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["w0 ", "w1 "],
        "token_logprobs": [-0.25, -0.25],
        # the fake's alternatives have the chosen token's text, so the chosen one's value replaces theirs
        "top_logprobs": [{"w0 ": -0.25}, {"w1 ": -0.25}],
        "text_offset": [0, 3],
    }
    answer = await ask(client, logprobs=0)
    assert engine.requests[1].sampling.logprobs == 1
    assert answer["choices"][0]["logprobs"]["top_logprobs"] is None
    assert answer["choices"][0]["logprobs"]["tokens"] == ["w0 ", "w1 "]


async def test_stream_of_several_prompts(client: httpx.AsyncClient) -> None:
    body = {
        "model": BASE_NAME,
        "prompt": ["a", "b"],
        "max_tokens": 3,
        "logprobs": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    *events, done, rest = (await client.post(PATH, json=body)).text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    *received, last = [json.loads(event.removeprefix("data: ")) for event in events]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 6)
    assert all(chunk["usage"] is None for chunk in received)
    assert {chunk["object"] for chunk in received} == {"text_completion"}
    assert len({chunk["id"] for chunk in received}) == 1
    for index in range(2):
        own = [choice for chunk in received for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == "w0 w1 w2 "
        assert [choice["finish_reason"] for choice in own] == [None, None, "length"]
        assert [choice["logprobs"]["text_offset"] for choice in own] == [[0], [3], [6]]


async def test_all_prompts_use_one_version(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/adapters/tweets", files=as_parts(*peft_files(1)))
    answer = await ask(client, model="tweets", prompt=["a", "b"])
    assert answer["model"] == "tweets@1"
    first, second = engine.requests
    assert first.adapters == second.adapters != ()


async def test_unread_outputs_of_several_prompts_stay_in_their_streams(app: FastAPI, engine: FakeEngine) -> None:
    """If the client stops reading, outputs wait in the streams, which are bounded."""
    taken: list[SequenceOutput] = []

    def counting(request: GenerationRequest) -> Iterator[SequenceOutput]:
        for output in words(request):
            taken.append(output)
            yield output

    class Slow(Caller):
        async def _send(self, message: Message) -> None:
            await super()._send(message)
            if len(self.sent) > 2:
                await asyncio.Event().wait()

    engine.script = counting
    before = asyncio.all_tasks()
    body = {"model": BASE_NAME, "prompt": ["a", "b"], "max_tokens": MAX_MODEL_LEN - 2, "stream": True}
    caller = Slow(app, PATH, body)
    await until(lambda: len(caller.sent) > 2)
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(taken) < 20
    caller.hang_up()
    await caller.task
    await until(lambda: asyncio.all_tasks() <= before | {caller.task})
    assert engine.open == set()
