"""Streamed answers, and clients that disconnect before the end."""

import json

import httpx
import pytest
from fastapi import FastAPI

from adapters.errors import InvalidInput
from server.engine.request import GenerationRequest, SequenceOutput
from server.errors import GenerationFailed
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.fakes import Caller, FakeEngine, failing, piece, until
from tests.server.conftest import BASE_NAME

pytestmark = pytest.mark.anyio


def events(text: str) -> list[tuple[str, str]]:
    """Return (event, data) of each event; the text must contain only events."""
    assert text.endswith("\n\n")
    found = []
    for block in text[:-2].split("\n\n"):
        lines = block.split("\n")
        name = lines.pop(0).removeprefix("event: ") if lines[0].startswith("event: ") else "message"
        assert len(lines) == 1
        assert lines[0].startswith("data: ")
        found.append((name, lines[0].removeprefix("data: ")))
    return found


async def test_pieces_then_an_end_for_each_choice_then_done(client: httpx.AsyncClient) -> None:
    digest = (await client.post("/adapters/tweets", files=as_parts(*peft_files()))).json()["digest"]
    body = {"prompt": "a", "max_tokens": 2, "n": 2, "seed": 9, "stream": True, "adapter": "tweets*0.5"}
    response = await client.post("/generate", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    found = events(response.text)
    assert {name for name, _ in found} == {"message"}
    assert found[-1][1] == "[DONE]"
    sent = [json.loads(data) for _, data in found[:-1]]
    pieces = [event for event in sent if "finish_reason" not in event]
    assert pieces == [
        {"index": 0, "text": "w0 "},
        {"index": 1, "text": "w0 "},
        {"index": 0, "text": "w1 "},
        {"index": 1, "text": "w1 "},
    ]
    last = [event for event in sent if "finish_reason" in event]
    assert [event["index"] for event in last] == [0, 1]
    assert last[1].pop("id").startswith("gen-")
    assert last[1] == {
        "index": 1,
        "finish_reason": "length",
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "cached_tokens": 1},
        "timing": {"queue_ms": 2.0, "ttft_ms": 2.0, "total_ms": 200.0},
        "model": BASE_NAME,
        "adapters": [{"name": "tweets", "version": 1, "digest": digest, "weight": 0.5}],
        "seed": 9,
        "warnings": [],
    }


async def test_line_ends_stay_within_their_event(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    text = "a\n\ndata: [DONE]\r\n日本\u2028🦜\x00"

    def script(request: GenerationRequest) -> list[SequenceOutput]:
        return [SequenceOutput(request.request_id, 0, text, 1, 1, 0, finish_reason="stop")]

    engine.script = script
    response = await client.post("/generate", json={"prompt": "a", "stream": True})
    found = [data for _, data in events(response.text)]
    assert json.loads(found[0]) == {"index": 0, "text": text}
    assert len(found) == 3


async def test_logprobs_come_with_the_text_they_made(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    def script(request: GenerationRequest) -> list[SequenceOutput]:
        held = piece(request, 0, 0)
        silent = SequenceOutput(request.request_id, 0, "", 1, 1, 0, logprobs=held.logprobs)  # half a character
        end = SequenceOutput(request.request_id, 0, "", 1, 3, 0, logprobs=held.logprobs, finish_reason="stop")
        return [silent, piece(request, 0, 1), end]

    engine.script = script
    response = await client.post("/generate", json={"prompt": "a", "stream": True, "logprobs": 1})
    first, last, _ = (data for _, data in events(response.text))
    assert len(json.loads(first)["logprobs"]) == 2
    assert len(json.loads(last)["logprobs"]) == 1


async def test_a_failure_midway_is_an_error_event(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = failing(1, GenerationFailed("a step failed"))
    response = await client.post("/generate", json={"prompt": "secret", "stream": True})
    assert response.status_code == 200
    (_, first), (name, data) = events(response.text)
    assert json.loads(first)["text"] == "w0 "
    assert name == "error"
    assert json.loads(data)["status"] == 500
    assert "secret" not in response.text
    assert engine.open == set()


async def test_adapters_that_overflow_midway_are_named_in_the_error_event(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = failing(1, InvalidInput.of("adapter", "too large"))
    response = await client.post("/generate", json={"prompt": "a", "stream": True})
    name, data = events(response.text)[-1]
    assert name == "error"
    document = json.loads(data)
    assert (document["status"], document["errors"]) == (422, [{"loc": ["adapter"], "message": "too large"}])
    assert 'smolora_requests_total{outcome="invalid"} 1.0' in (await client.get("/metrics")).text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_failure_before_the_first_piece_is_an_ordinary_one(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = failing(0, GenerationFailed("a step failed"))
    response = await client.post("/generate", json={"prompt": "a", "stream": True})
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert engine.open == set()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 2])
async def test_disconnect_frees_the_sequence(app: FastAPI, engine: FakeEngine, stream: bool, after: int) -> None:
    engine.hold_after = after  # after that the engine would send nothing more
    caller = Caller(app, "/generate", {"prompt": "a", "stream": stream})
    await until(lambda: len(engine.open) == 1)
    if stream and after:
        await until(lambda: len(caller.sent) == after + 1)
    caller.hang_up()
    await until(lambda: len(engine.closed) == 1)
    assert engine.open == set()
    await caller.task


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_releases_the_adapter(
    app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    await client.post("/adapters/tweets", files=as_parts(*peft_files()))
    engine.hold_after = 0
    caller = Caller(app, "/generate", {"prompt": "a", "stream": stream, "adapter": "tweets"})
    await until(lambda: len(engine.open) == 1)
    await client.delete("/adapters/tweets")
    directories = list(app.state.services.settings.home.glob("adapters/??/*"))
    assert len(directories) == 1
    caller.hang_up()
    await caller.task
    assert not directories[0].exists()
    assert 'outcome="cancelled"} 1.0' in (await client.get("/metrics")).text


async def test_connected_clients_are_not_cut_off(app: FastAPI, engine: FakeEngine) -> None:
    caller = Caller(app, "/generate", {"prompt": "a", "stream": True, "max_tokens": 5})
    await caller.task
    assert caller.sent[0]["status"] == 200
    assert caller.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    assert len(engine.closed) == 1
