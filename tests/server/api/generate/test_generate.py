"""POST /generate: answers, adapters by name, and pins while they are used."""

import asyncio
import json

import httpx
import pytest

from adapters.errors import CorruptAdapter, InvalidInput, SmoloraError
from adapters.lora import AdapterRef
from adapters.store.store import AdapterStore
from server.engine.request import SamplingParams
from server.errors import EngineDead, GenerationFailed, QueueFull
from server.model.text.chat import ChatMessage, PromptEncoder
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.fakes import FakeEngine, failing, piece, until
from tests.server.conftest import BASE_NAME

pytestmark = pytest.mark.anyio


async def upload(client: httpx.AsyncClient, name: str, seed: int) -> str:
    """Publish an adapter and return its digest."""
    response = await client.post(f"/adapters/{name}", files=as_parts(*peft_files(seed)))
    assert response.status_code == 201, response.text
    digest: str = response.json()["digest"]
    return digest


async def test_answer_has_every_field(client: httpx.AsyncClient, encoder: PromptEncoder) -> None:
    response = await client.post("/generate", json={"prompt": "Not Found", "max_tokens": 3, "seed": 5})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert answer.pop("id").startswith("gen-")
    assert answer == {
        "model": BASE_NAME,
        "adapters": [],
        "seed": 5,
        "warnings": [],
        "choices": [{"index": 0, "text": "w0 w1 w2 ", "finish_reason": "length", "logprobs": None}],
        "usage": {
            "prompt_tokens": len(encoder.prompt("Not Found")),
            "completion_tokens": 3,
            "cached_tokens": 0,
        },
        "timing": {"queue_ms": 1.0, "ttft_ms": 2.0, "total_ms": 100.0},
    }
    assert response.content == json.dumps(response.json(), separators=(",", ":")).encode()  # compact


async def test_defaults_reach_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine, encoder: PromptEncoder
) -> None:
    await client.post("/generate", json={"prompt": "a", "max_tokens": 1})
    await client.post("/generate", json={"prompt": "a", "max_tokens": 1})
    first, second = engine.requests
    assert first.prompt_token_ids == tuple(encoder.prompt("a"))
    assert first.sampling == SamplingParams(max_tokens=1, seed=first.sampling.seed)
    assert (first.adapters, first.n) == ((), 1)
    assert first.sampling.seed != second.sampling.seed  # random, out of 2**63
    assert first.request_id != second.request_id


async def test_every_field_reaches_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {
        "prompt": "a",
        "max_tokens": 2,
        "temperature": 1,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "seed": 2**63 - 1,
        "stop": ["\n", "END"],
        "n": 2,
        "logprobs": 3,
        "stop_token_ids": [5, 7],
        "min_tokens": 1,
        "ignore_eos": True,
        "speculation": "off",
    }
    assert (await client.post("/generate", json=body)).status_code == 200
    assert engine.requests[0].n == 2
    assert engine.requests[0].sampling == SamplingParams(
        max_tokens=2,
        temperature=1.0,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        repetition_penalty=1.2,
        seed=2**63 - 1,
        stop=("\n", "END"),
        logprobs=3,
        stop_token_ids=(5, 7),
        min_tokens=1,
        ignore_eos=True,
        speculates=False,
    )


async def test_single_stop_string_becomes_a_list(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/generate", json={"prompt": "a", "stop": "END", "max_tokens": 1})
    assert engine.requests[0].sampling.stop == ("END",)


async def test_choices_and_logprobs(client: httpx.AsyncClient) -> None:
    body = {"prompt": "a", "max_tokens": 2, "n": 3, "logprobs": 2}
    answer = (await client.post("/generate", json=body)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["choices"][2]["logprobs"] == [
        {
            "token": f"w{number} ",
            "bytes": list(f"w{number} ".encode()),
            "logprob": -0.25,
            "top": [
                {"token": f"w{number} ", "bytes": list(f"w{number} ".encode()), "logprob": -0.25 - rank}
                for rank in range(2)
            ],
        }
        for number in range(2)
    ]
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["usage"]["cached_tokens"] == 0
    assert answer["timing"] == {"queue_ms": 1.0, "ttft_ms": 2.0, "total_ms": 300.0}


async def test_messages_go_through_the_template(
    client: httpx.AsyncClient, engine: FakeEngine, encoder: PromptEncoder
) -> None:
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "a"}]
    response = await client.post("/generate", json={"messages": messages, "max_tokens": 1})
    assert response.status_code == 200
    expected = encoder.messages([ChatMessage("system", ""), ChatMessage("user", "a")])
    assert engine.requests[0].prompt_token_ids == tuple(expected)


@pytest.mark.parametrize("adapter", [None, "base", BASE_NAME])
async def test_names_of_the_base(client: httpx.AsyncClient, engine: FakeEngine, adapter: str | None) -> None:
    response = await client.post("/generate", json={"prompt": "a", "max_tokens": 1, "adapter": adapter})
    assert response.json()["adapters"] == []
    assert engine.requests[0].adapters == ()


async def test_expression_becomes_digests(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    first, second = await upload(client, "tweets", 1), await upload(client, "tweets", 2)
    movies = await upload(client, "movies", 3)
    body = {"prompt": "a", "max_tokens": 1, "adapter": "tweets*0.7 + movies@1*-0.3+tweets@1+tweets@2*0.1"}
    answer = (await client.post("/generate", json=body)).json()
    assert answer["adapters"] == [
        {"name": "tweets", "version": 2, "digest": second, "weight": 0.7},
        {"name": "movies", "version": 1, "digest": movies, "weight": -0.3},
        {"name": "tweets", "version": 1, "digest": first, "weight": 1.0},
        {"name": "tweets", "version": 2, "digest": second, "weight": 0.1},
    ]
    refs = [AdapterRef(second, 0.8), AdapterRef(movies, -0.3), AdapterRef(first, 1.0)]
    assert engine.requests[0].adapters == tuple(sorted(refs))


async def test_adapters_as_a_list(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    digest = await upload(client, "tweets", 1)
    parts = [{"name": "tweets", "version": 1, "weight": 0.5}, {"name": "tweets", "alias": "latest"}]
    answer = (await client.post("/generate", json={"prompt": "a", "max_tokens": 1, "adapters": parts})).json()
    assert [part["weight"] for part in answer["adapters"]] == [0.5, 1.0]
    assert engine.requests[0].adapters == (AdapterRef(digest, 1.5),)


async def test_weights_that_cancel_leave_the_base(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await upload(client, "tweets", 1)
    body = {"prompt": "a", "max_tokens": 1, "adapter": "tweets*0.5+tweets*-0.5"}
    answer = (await client.post("/generate", json=body)).json()
    assert len(answer["adapters"]) == 2
    assert engine.requests[0].adapters == ()


@pytest.mark.parametrize("adapter", ["nobody", "tweets@2", "tweets@prod", "tweets+nobody", "tweets@" + "9" * 30])
async def test_unknown_adapters_are_404(client: httpx.AsyncClient, engine: FakeEngine, adapter: str) -> None:
    await upload(client, "tweets", 1)
    response = await client.post("/generate", json={"prompt": "a", "max_tokens": 1, "adapter": adapter})
    assert response.status_code == 404
    assert adapter.removeprefix("tweets+") in response.json()["detail"]
    assert engine.requests == []


async def test_bytes_are_pinned_while_a_request_runs(
    client: httpx.AsyncClient, engine: FakeEngine, store: AdapterStore
) -> None:
    digest = await upload(client, "tweets", 1)
    engine.hold_after = 2
    body = {"prompt": "a", "max_tokens": 4, "adapter": "tweets"}
    running = asyncio.create_task(client.post("/generate", json=body))
    await until(lambda: len(engine.open) == 1)
    assert (await client.delete("/adapters/tweets")).status_code == 204
    assert store.load(digest).max_rank == 2  # its bytes still exist
    assert (await client.post("/generate", json=body)).status_code == 404
    engine.held.set()
    assert (await running).json()["choices"][0]["text"] == "w0 w1 w2 w3 "
    with pytest.raises(CorruptAdapter):
        store.load(digest)


async def test_refused_request_pins_nothing(
    client: httpx.AsyncClient, engine: FakeEngine, store: AdapterStore
) -> None:
    digest = await upload(client, "tweets", 1)
    engine.refusal = QueueFull(retry_after=3.2)
    response = await client.post("/generate", json={"prompt": "a", "adapter": "tweets", "max_tokens": 1})
    assert (response.status_code, response.headers["retry-after"]) == (429, "4")
    await client.delete("/adapters/tweets")
    with pytest.raises(CorruptAdapter):
        store.load(digest)


@pytest.mark.parametrize("state", ["dead", "draining", "loading"])
async def test_engine_that_cannot_serve_is_503(client: httpx.AsyncClient, engine: FakeEngine, state: str) -> None:
    setattr(engine, state, True)
    for stream in (False, True):
        response = await client.post("/generate", json={"prompt": "a", "max_tokens": 1, "stream": stream})
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
    assert 'smolora_requests_total{outcome="refused"} 2.0' in (await client.get("/metrics")).text


@pytest.mark.parametrize(
    ("error", "status", "outcome"),
    [
        (GenerationFailed("a step failed"), 500, "failed"),
        (EngineDead(), 503, "failed"),
        (InvalidInput.of("adapter", "larger than the memory"), 422, "invalid"),
    ],
)
async def test_failure_midway_is_a_problem(
    client: httpx.AsyncClient, engine: FakeEngine, error: SmoloraError, status: int, outcome: str
) -> None:
    engine.script = failing(2, error)
    response = await client.post("/generate", json={"prompt": "a", "max_tokens": 4})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert engine.open == set()
    assert f'smolora_requests_total{{outcome="{outcome}"}} 1.0' in (await client.get("/metrics")).text


async def test_early_end_of_the_outputs_is_a_failure(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [piece(request, 0, 0)]
    assert (await client.post("/generate", json={"prompt": "a", "max_tokens": 4})).status_code == 500
