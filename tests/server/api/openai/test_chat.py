"""POST /v1/chat/completions on a fake engine: the requests it gets, and the form of the answers."""

import json
from typing import Any

import httpx
import pytest

from adapters.lora import AdapterRef
from server.api.openai.schemas import WARNING
from server.engine.request import Grammar, SamplingParams
from server.model.text.chat import ChatMessage, PromptEncoder
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.fakes import FakeEngine
from tests.server.conftest import BASE_NAME, MAX_MODEL_LEN

pytestmark = pytest.mark.anyio

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}]
HELLO = {"model": BASE_NAME, "messages": MESSAGES, "max_tokens": 2}


async def ask(client: httpx.AsyncClient, **fields: object) -> dict[str, Any]:
    response = await client.post(PATH, json={**HELLO, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def refusal(client: httpx.AsyncClient, **fields: object) -> dict[str, Any]:
    response = await client.post(PATH, json={**HELLO, **fields})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


async def chunks(client: httpx.AsyncClient, **fields: object) -> list[dict[str, Any]]:
    body = {**HELLO, "stream": True, **fields}
    response = await client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def encoded(encoder: PromptEncoder, *turns: tuple[str, str]) -> tuple[int, ...]:
    return tuple(encoder.messages([ChatMessage(role, content) for role, content in turns]))


async def test_answer_has_every_field(
    client: httpx.AsyncClient, engine: FakeEngine, encoder: PromptEncoder
) -> None:
    answer = await ask(client, max_tokens=3, seed=5)
    ids = encoded(encoder, ("system", "b"), ("user", "a"))
    assert engine.requests[0].prompt_token_ids == ids
    assert answer.pop("id").startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "chat.completion",
        "model": BASE_NAME,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "w0 w1 w2 ", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": len(ids),
            "completion_tokens": 3,
            "total_tokens": len(ids) + 3,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_defaults_are_openais(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(client)
    await ask(client, temperature=None, top_p=None, n=None, seed=None, stop=None, logit_bias=None, stream=None)
    first, second = engine.requests
    assert first.sampling == SamplingParams(max_tokens=2, temperature=1.0, top_p=1.0, seed=first.sampling.seed)
    assert (first.n, first.adapters, first.grammar) == (1, (), None)
    assert first.sampling.seed != second.sampling.seed
    assert second.sampling == SamplingParams(2, temperature=1.0, seed=second.sampling.seed)


async def test_every_field_reaches_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(
        client,
        temperature=0.5,
        top_p=0.25,
        n=2,
        seed=7,
        stop=["x", "yy"],
        presence_penalty=-1,
        frequency_penalty=1.5,
        logit_bias={"5": -100, "12": 2.5},
        logprobs=True,
        top_logprobs=3,
        top_k=9,
        min_p=0.1,
        repetition_penalty=1.2,
        ignore_eos=True,
        speculation="off",
        user="me",
    )
    (request,) = engine.requests
    assert request.n == 2
    assert request.sampling == SamplingParams(
        max_tokens=2,
        temperature=0.5,
        top_p=0.25,
        top_k=9,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-1.0,
        frequency_penalty=1.5,
        logit_bias=((5, -100.0), (12, 2.5)),
        seed=7,
        stop=("x", "yy"),
        logprobs=3,
        ignore_eos=True,
        speculates=False,
    )


async def test_limits_of_openais_ranges_are_accepted(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(client, top_p=0, seed=-1)
    (request,) = engine.requests
    assert (request.sampling.temperature, request.sampling.top_p) == (0.0, 1.0)  # greedy
    assert request.sampling.seed == (1 << 63) - 1


async def test_max_tokens_and_its_newer_name(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(client, max_tokens=None, max_completion_tokens=3)
    await ask(client, max_tokens=3, max_completion_tokens=3)
    await ask(client, max_tokens=None)
    assert [request.sampling.max_tokens for request in engine.requests[:2]] == [3, 3]
    last = engine.requests[2]  # the rest of the context
    assert last.sampling.max_tokens == MAX_MODEL_LEN - len(last.prompt_token_ids)
    assert (await refusal(client, max_tokens=3, max_completion_tokens=4))["param"] == "max_tokens"
    error = await refusal(client, max_tokens=None, max_completion_tokens=MAX_MODEL_LEN)
    assert (error["param"], error["code"]) == ("max_completion_tokens", "context_length_exceeded")
    long = [{"role": "user", "content": "a b" * MAX_MODEL_LEN}]
    error = await refusal(client, messages=long, max_tokens=None)
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    # LiteLLM and others recognize the error by these words
    assert f"this model's maximum context length is {MAX_MODEL_LEN} tokens" in str(error["message"])


async def test_text_parts_and_returned_messages_are_accepted(
    client: httpx.AsyncClient, engine: FakeEngine, encoder: PromptEncoder
) -> None:
    messages = [
        {"role": "developer", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "c"}]},
        {"role": "assistant", "content": "d", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "e"},
    ]
    await ask(client, messages=messages)
    turns = (("system", "b"), ("user", "a c"), ("assistant", "d"), ("user", "e"))
    assert engine.requests[0].prompt_token_ids == encoded(encoder, *turns)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
        {"role": "user", "content": [{"type": "text", "text": 1}]},
        {"role": "user", "content": []},
        {"role": "user"},
        {"role": "tool", "content": "a", "tool_call_id": "1"},
        {"role": "user", "content": "a", "name": 3},
        {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]},
    ],
)
async def test_invalid_messages_are_refused(client: httpx.AsyncClient, message: object) -> None:
    assert str((await refusal(client, messages=[message]))["param"]).startswith("messages[0].")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content", "content": "a"}),
        ("web_search_options", {}),
        ("reasoning_effort", "low"),
        ("verbosity", "low"),
        ("service_tier", "flex"),
        ("moderation", {"model": "m"}),
        ("prompt_cache_retention", "24h"),
    ],
)
async def test_unsupported_fields_are_refused_by_name(
    client: httpx.AsyncClient, engine: FakeEngine, name: str, value: object
) -> None:
    error = await refusal(client, **{name: value})
    assert error["param"] == name
    instead = " (for JSON by a schema, give response_format)" if name in ("tools", "functions") else ""
    assert error["message"] == f"{name}: is not supported here: leave it out{instead}"
    assert engine.requests == []
    await ask(client, **{name: None})


async def test_values_that_disable_unsupported_fields_are_accepted(client: httpx.AsyncClient) -> None:
    off = {"tools": [], "tool_choice": "none", "modalities": ["text"], "service_tier": "auto", "store": False}
    response = await client.post(PATH, json=HELLO | off)
    assert response.status_code == 200
    assert WARNING not in response.headers


LABELS = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "safety_identifier": "me",
    "prompt_cache_key": "mine",
    "tool_choice": "auto",
    "parallel_tool_calls": True,
}


@pytest.mark.parametrize("stream", [False, True])
async def test_labels_are_accepted_and_named_in_a_header(
    client: httpx.AsyncClient, engine: FakeEngine, encoder: PromptEncoder, stream: bool
) -> None:
    messages = [
        {"role": "user", "content": "a", "name": "me"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "b"},
    ]
    body = HELLO | LABELS | {"messages": messages, "stream": stream}
    body |= {"stream_options": {"include_obfuscation": True}} if stream else {}
    response = await client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    pads = ["stream_options.include_obfuscation"] if stream else []
    named = [*LABELS, *pads, "messages[].name", "messages[].content: null"]
    assert response.headers[WARNING] == f"these change nothing: {', '.join(named)}"
    turns = (("user", "a"), ("assistant", ""), ("user", "b"))
    assert engine.requests[0].prompt_token_ids == encoded(encoder, *turns)


async def test_labels_of_completions(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"model": BASE_NAME, "prompt": "a", "user": "me"})
    assert response.headers[WARNING] == "these change nothing: user"


@pytest.mark.parametrize(
    ("name", "value"), [("tool_choice", "required"), ("metadata", {"a": 1}), ("store", "yes"), ("user", 3)]
)
async def test_labels_of_a_wrong_kind_are_refused(client: httpx.AsyncClient, name: str, value: object) -> None:
    assert str((await refusal(client, **{name: value}))["param"]).startswith(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.1),
        ("temperature", "1"),
        ("top_p", 1.1),
        ("n", 0),
        ("n", 17),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("seed", 1 << 63),
        ("stop", ["a"] * 17),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("max_tokens", 0),
        ("top_logprobs", 2),
        ("stream_options", {"include_usage": True}),
        ("n_choices", 1),
    ],
)
async def test_invalid_fields_are_refused(client: httpx.AsyncClient, name: str, value: object) -> None:
    assert (await refusal(client, **{name: value}))["param"] == name


async def test_logprobs_have_alternatives(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await ask(client, logprobs=True, top_logprobs=2, n=2)
    token = {"token": "w1 ", "bytes": list(b"w1 "), "logprob": -0.25}
    for choice in answer["choices"]:
        assert choice["logprobs"]["refusal"] is None
        first, second = choice["logprobs"]["content"]
        assert second == {**token, "top_logprobs": [token, {**token, "logprob": -1.25}]}
        assert first["token"] == "w0 "
    answer = await ask(client, logprobs=True)
    assert engine.requests[1].sampling.logprobs == 1
    assert answer["choices"][0]["logprobs"]["content"][1] == {**token, "top_logprobs": []}
    # 0 and false disable them, too
    assert (await ask(client, logprobs=False))["choices"][0]["logprobs"] is None


async def test_stream_has_role_text_and_end(client: httpx.AsyncClient) -> None:
    received = await chunks(client)
    heads = [{key: chunk[key] for key in ("id", "object", "created", "model")} for chunk in received]
    assert all(head == heads[0] for head in heads)
    assert heads[0]["object"] == "chat.completion.chunk"
    assert heads[0]["id"].startswith("chatcmpl-")
    assert all("usage" not in chunk for chunk in received)
    assert [chunk["choices"] for chunk in received] == [
        [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        for delta, reason in [
            ({"role": "assistant", "content": "", "refusal": None}, None),
            ({"content": "w0 "}, None),
            ({"content": "w1 "}, None),
            ({}, "length"),
        ]
    ]


async def test_stream_of_two_choices_with_usage_and_logprobs(client: httpx.AsyncClient) -> None:
    *received, last = await chunks(client, n=2, logprobs=True, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 4
    assert all(chunk["usage"] is None for chunk in received)
    for index in range(2):
        own = [choice for chunk in received for choice in chunk["choices"] if choice["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == "w0 w1 "
        tokens = [
            entry["token"] for choice in own if choice["logprobs"] for entry in choice["logprobs"]["content"]
        ]
        assert tokens == ["w0 ", "w1 "]
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["length"]


async def test_answer_names_the_versions(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    digests = {}
    for name, seed in (("tweets", 1), ("movies", 2)):
        posted = await client.post(f"/adapters/{name}", files=as_parts(*peft_files(seed)))
        digests[name] = posted.json()["digest"]
    assert (await ask(client, model="tweets"))["model"] == "tweets@1"
    answer = await ask(client, model="tweets*0.7 + movies@1*-0.3")
    assert answer["model"] == "tweets@1*0.7+movies@1*-0.3"
    refs = [AdapterRef(digests["tweets"], 0.7), AdapterRef(digests["movies"], -0.3)]
    assert engine.requests[1].adapters == tuple(sorted(refs))
    await client.post("/compositions/both", json={"expression": "tweets*0.5+movies"})
    assert (await ask(client, model="both*0.5"))["model"] == "tweets@1*0.25+movies@1*0.5"
    assert (await ask(client, model="base"))["model"] == BASE_NAME
    assert {chunk["model"] for chunk in await chunks(client, model="movies@1")} == {"movies@1"}


async def test_response_formats_become_grammars(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    schema = {"type": "object", "properties": {"é": {"type": "integer"}}}
    await ask(client, response_format={"type": "text"})
    await ask(client, response_format={"type": "json_object"})
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
    await ask(client, response_format=form)
    text, any_object, own = (request.grammar for request in engine.requests)
    assert text is None
    assert any_object == Grammar("json_schema", '{"type":"object"}')
    assert own is not None
    assert (own.kind, json.loads(own.source)) == ("json_schema", schema)


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"type": "grammar"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "text", "json_schema": {"name": "a", "schema": {}}}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema"),
        (
            {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
            "response_format.json_schema.name",
        ),
    ],
)
async def test_invalid_response_formats_are_refused(client: httpx.AsyncClient, form: object, param: str) -> None:
    assert (await refusal(client, response_format=form))["param"] == param


async def test_grammar_refuses_stop_strings(client: httpx.AsyncClient) -> None:
    form = {"type": "json_object"}
    assert (await refusal(client, response_format=form, stop="x"))["param"] == "stop"
    assert (await refusal(client, response_format=form, ignore_eos=True))["param"] == "ignore_eos"
