"""Errors under /v1: the error object, the status and the headers that OpenAI's client reads."""

import httpx
import pytest
from fastapi import FastAPI

from adapters.errors import Conflict, FieldError, InDoubt, Interrupted, InvalidInput, NotFound, SmoloraError
from server.api.problems import OPENAI
from server.api.routes import MAX_JSON_BYTES
from server.engine.request import GenerationRequest, SequenceOutput
from server.errors import EngineDead, GenerationFailed, QueueFull
from tests.server.api.fakes import Caller, FakeEngine, failing, until
from tests.server.conftest import BASE_NAME, MakeServices, client_of, new_app

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
HELLO = {"model": BASE_NAME, "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}


def error_of(response: httpx.Response) -> dict[str, object]:
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert set(document) == {"error"}
    error: dict[str, object] = document["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(("field", "value"), [("temperature", 3), ("speculation", "on")])
async def test_invalid_field_is_400_with_its_name(client: httpx.AsyncClient, field: str, value: object) -> None:
    response = await client.post(CHAT, json=HELLO | {field: value})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", field, None)
    assert field in str(error["message"])


async def test_nested_field_has_its_path(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "tool", "content": "a"}]
    response = await client.post(CHAT, json=HELLO | {"messages": messages})
    assert (response.status_code, error_of(response)["param"]) == (400, "messages[1].role")


async def test_every_invalid_field_is_named(client: httpx.AsyncClient) -> None:
    """OpenAI's error has one message and no list."""
    fields = ("tools", "functions", "audio", "prediction", "reasoning_effort", "verbosity")
    message = str(error_of(await client.post(CHAT, json=HELLO | dict.fromkeys(fields, "x")))["message"])
    assert [part.partition(":")[0] for part in message.split("; ")] == list(fields)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b'{"model": "\xff"}'])
async def test_body_that_is_no_json_object_is_400(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert (response.status_code, error_of(response)["param"]) == (400, "body")


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_unknown_model_is_404(client: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    body = {"model": "nobody@3", "messages": HELLO["messages"]} if path == CHAT else {"model": "nobody@3"}
    response = await client.post(path, json=body if path == CHAT else body | {"prompt": "a"})
    assert response.status_code == 404
    error = error_of(response)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", "model_not_found")
    assert "nobody@3" in str(error["message"])
    assert engine.requests == []


async def test_malformed_model_is_400(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=HELLO | {"model": "a*1e5"})
    assert (response.status_code, error_of(response)["param"]) == (400, "model")


async def test_unknown_paths_and_methods(client: httpx.AsyncClient) -> None:
    lost = await client.get("/v1/embeddings")
    assert (lost.status_code, error_of(lost)["code"]) == (404, "not_found")
    wrong = await client.get(CHAT)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    error_of(wrong)
    # Other paths keep the native format.
    assert (await client.get("/v2/models")).headers["content-type"] == "application/problem+json"


async def test_missing_key_is_401(make_services: MakeServices) -> None:
    async with client_of(new_app(make_services(api_keys="secret-0123456789"))) as client:
        response = await client.get("/v1/models", headers={"authorization": "Bearer wrong"})
        assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
        assert error_of(response)["type"] == "authentication_error"  # LiteLLM reads the type before the status
        assert "www-authenticate" in response.headers
        assert (
            await client.get("/v1/models", headers={"authorization": "Bearer secret-0123456789"})
        ).status_code == 200


async def test_any_key_is_accepted_if_none_exists(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models", headers={"authorization": "Bearer any"})).status_code == 200


async def test_too_large_body_is_413(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, content=b" " * (MAX_JSON_BYTES + 1))
    assert response.status_code == 413
    error_of(response)


async def test_full_queue_is_429_with_retry_after(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.refusal = QueueFull(retry_after=3.2)
    for stream in (False, True):
        response = await client.post(CHAT, json=HELLO | {"stream": stream})
        assert (response.status_code, response.headers["retry-after"]) == (429, "4")
        error = error_of(response)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")


@pytest.mark.parametrize("state", ["dead", "draining", "loading"])
async def test_engine_that_cannot_serve_is_503(client: httpx.AsyncClient, engine: FakeEngine, state: str) -> None:
    setattr(engine, state, True)
    response = await client.post(CHAT, json=HELLO)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert error_of(response)["type"] == "server_error"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (GenerationFailed("a step failed"), 500),
        (EngineDead(), 503),
        (InvalidInput.of("adapter", "too large"), 400),
    ],
)
async def test_failure_midway_has_its_status(
    client: httpx.AsyncClient, engine: FakeEngine, error: SmoloraError, status: int
) -> None:
    engine.script = failing(2, error)
    response = await client.post(CHAT, json=HELLO)
    assert response.status_code == status
    error_object = error_of(response)
    assert str(error_object["message"]).endswith(str(error).rpartition(": ")[2])
    assert error_object["param"] == ("model" if status == 400 else None)  # OpenAI's name
    assert engine.open == set()


async def test_failure_within_a_stream_is_the_last_event(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = failing(2, GenerationFailed("a step failed"))
    response = await client.post(CHAT, json=HELLO | {"stream": True})
    assert response.status_code == 200
    *_, last = response.text.strip().split("\n\n")
    assert last == ('data: {"error":{"message":"a step failed","type":"server_error","param":null,"code":null}}')
    assert engine.open == set()


async def test_failure_before_the_first_event_is_an_error_response(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = failing(0, GenerationFailed("a step failed"))
    response = await client.post(CHAT, json=HELLO | {"stream": True})
    assert response.status_code == 500
    error_of(response)


async def test_unforeseen_error_reveals_nothing(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    def script(request: GenerationRequest) -> list[SequenceOutput]:
        raise RuntimeError("/home/me said: prompt")

    engine.script = script
    response = await client.post(CHAT, json=HELLO)
    assert response.status_code == 500
    assert "prompt" not in response.text
    error_of(response)


def test_only_transient_errors_are_retried() -> None:
    conflict = OPENAI.of_error(Conflict("it has ended"))
    assert (conflict.status_code, conflict.headers["x-should-retry"]) == (409, "false")
    assert "x-should-retry" not in OPENAI.of_error(NotFound("no such file")).headers
    doubt = OPENAI.of_error(InDoubt())  # a retry could queue a job twice
    assert (doubt.status_code, doubt.headers["x-should-retry"]) == (503, "false")
    assert "x-should-retry" not in OPENAI.of_error(Interrupted()).headers
    deep = OPENAI.of_error(InvalidInput([FieldError(("messages", 3, "content"), "is wrong")]))
    assert b'"param":"messages[3].content"' in bytes(deep.body)


@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_leaves_frees_its_choices(app: FastAPI, engine: FakeEngine, stream: bool) -> None:
    engine.hold_after = 2
    caller = Caller(app, "/v1/completions", {"model": BASE_NAME, "prompt": ["a", "b"], "stream": stream})
    await until(lambda: len(engine.open) == 2)
    caller.hang_up()
    await caller.task
    assert engine.open == set()
    assert len(engine.closed) == 2
