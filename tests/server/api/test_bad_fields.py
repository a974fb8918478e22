"""Every field of POST /generate that can't be honoured is a 422 that names it."""

import json
import time

import httpx
import pytest

from adapters.errors import InvalidInput
from server.api import generation
from server.api.problems import MAX_ERRORS
from server.model.text.chat import PromptEncoder
from tests.server.api.fakes import FakeEngine, scoring
from tests.server.conftest import BASE_NAME, MAX_MODEL_LEN

pytestmark = pytest.mark.anyio

BAD: list[tuple[str, object]] = [
    ("prompt", ""),
    ("prompt", 5),
    ("prompt", ["a"]),
    ("messages", []),
    ("messages", "hi"),
    ("messages", {}),
    ("messages", [{"role": "user", "content": "x"}] * 1025),
    ("role", [{"role": "robot", "content": "x"}]),
    ("role", [{"content": "x"}]),
    ("content", [{"role": "user"}]),
    ("content", [{"role": "user", "content": None}]),
    ("name", [{"role": "user", "content": "x", "name": "y"}]),
    ("adapter", ""),
    ("adapter", 3),
    ("adapter", "a b"),
    ("adapter", "a*"),
    ("adapter", "a*1e3"),
    ("adapter", "a*101"),
    ("adapter", "a*nan"),
    ("adapter", "base*0.5"),
    ("adapter", "a@0"),
    ("adapter", "+".join(["a"] * 17)),
    ("adapter", "a" * 65),
    ("adapter", "a" * 5000),
    ("adapters", []),
    ("adapters", "a"),
    ("adapters", [{"name": "a"}] * 17),
    ("name", [{"weight": 1}]),
    ("name", [{"name": "base"}]),
    ("name", [{"name": "-a"}]),
    ("name", [{"name": ""}]),
    ("version", [{"name": "a", "version": 0}]),
    ("version", [{"name": "a", "version": "1"}]),
    ("version", [{"name": "a", "version": 1.5}]),
    ("alias", [{"name": "a", "alias": ""}]),
    ("alias", [{"name": "a", "alias": "b", "version": 1}]),
    ("weight", [{"name": "a", "weight": 100.5}]),
    ("weight", [{"name": "a", "weight": float("nan")}]),
    ("weight", [{"name": "a", "weight": None}]),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 1.5),
    ("max_tokens", "8"),
    ("max_tokens", True),
    ("max_tokens", None),
    ("max_tokens", MAX_MODEL_LEN),
    ("max_tokens", 10**30),
    ("temperature", -0.1),
    ("temperature", 5.1),
    ("temperature", "1"),
    ("temperature", True),
    ("temperature", None),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", 10**400),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_p", float("-inf")),
    ("top_k", -1),
    ("top_k", 1.0),
    ("top_k", 2**63),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("speculation", "on"),
    ("speculation", True),
    ("speculation", None),
    ("repetition_penalty", 0),
    ("repetition_penalty", 1e-300),
    ("repetition_penalty", 10.5),
    ("repetition_penalty", float("nan")),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", "1"),
    ("seed", 1.0),
    ("stop", ""),
    ("stop", 5),
    ("stop", [""]),
    ("stop", ["a", 5]),
    ("stop", ["x" * 257]),
    ("stop", ["a"] * 17),
    ("stop", [["a"]]),
    ("n", 0),
    ("n", 17),
    ("n", 1.0),
    ("logprobs", -1),
    ("logprobs", 21),
    ("logprobs", True),
    ("prompt_logprobs", -1),
    ("prompt_logprobs", 21),
    ("prompt_logprobs", True),
    ("min_tokens", -1),
    ("min_tokens", 65),
    ("min_tokens", None),
    ("stop_token_ids", 3),
    ("stop_token_ids", [1] * 1025),
    ("continue_final_message", True),
    ("continue_final_message", 1),
    ("ignore_eos", "yes"),
    ("ignore_eos", 1),
    ("stream", "true"),
    ("stream", 0),
    ("best_of", 2),
    ("", 2),
]
WITHIN = {
    "role": "messages",
    "content": "messages",
    "weight": "adapters",
    "version": "adapters",
    "alias": "adapters",
}


def body_with(field: str, value: object) -> dict[str, object]:
    outer = WITHIN.get(field, field)
    if field == "name":
        outer = "messages" if "role" in str(value) else "adapters"
    return {outer: value} if outer in ("prompt", "messages") else {"prompt": "a", outer: value}


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda part: repr(part)[:40])
async def test_a_bad_field_is_named(
    client: httpx.AsyncClient, engine: FakeEngine, field: str, value: object
) -> None:
    content = json.dumps(body_with(field, value))  # it writes NaN and Infinity
    response = await client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 422, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert set(problem) == {"type", "title", "status", "detail", "errors"}
    assert problem["status"] == 422
    assert field in [error["loc"][-1] for error in problem["errors"]]
    assert all(error["message"] for error in problem["errors"])
    assert len(response.content) < 5000
    assert engine.requests == []


@pytest.mark.parametrize("value", [0, 0.7, 1, 5, 2.5e-1])
async def test_integers_are_numbers(client: httpx.AsyncClient, engine: FakeEngine, value: float) -> None:
    assert (await client.post("/generate", json={"prompt": "a", "temperature": value})).status_code == 200
    assert engine.requests[0].sampling.temperature == value


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}])
async def test_exactly_one_prompt(client: httpx.AsyncClient, body: dict[str, object]) -> None:
    response = await client.post("/generate", json=body)
    assert [error["loc"] for error in response.json()["errors"]] == [["prompt"], ["messages"]]


async def test_adapter_or_adapters(client: httpx.AsyncClient) -> None:
    response = await client.post("/generate", json={"prompt": "a", "adapter": "x", "adapters": [{"name": "x"}]})
    assert [error["loc"] for error in response.json()["errors"]] == [["adapter"], ["adapters"]]


async def test_every_bad_field_is_named_at_once(client: httpx.AsyncClient) -> None:
    body = {"prompt": "", "top_p": 2, "n": "x", "stop": [""], "bogus": 1}
    errors = (await client.post("/generate", json=body)).json()["errors"]
    assert {error["loc"][-1] for error in errors} == set(body)


async def test_the_longest_prompt_that_fits(client: httpx.AsyncClient, encoder: PromptEncoder) -> None:
    prompt = "Not Found " * 5
    length = len(encoder.prompt(prompt))
    fits = {"prompt": prompt, "max_tokens": MAX_MODEL_LEN - length}
    assert (await client.post("/generate", json=fits)).status_code == 200
    response = await client.post("/generate", json={**fits, "max_tokens": MAX_MODEL_LEN - length + 1})
    assert [error["loc"] for error in response.json()["errors"]] == [["max_tokens"]]


@pytest.mark.parametrize("length", [3000, 200_000])
async def test_a_prompt_that_never_fits_is_named_too(client: httpx.AsyncClient, length: int) -> None:
    for body, field in (
        ({"prompt": "ab " * (length // 3)}, "prompt"),
        ({"messages": [{"role": "user", "content": "ab " * (length // 3)}]}, "messages"),
    ):
        response = await client.post("/generate", json={**body, "max_tokens": 1})
        assert response.status_code == 422
        assert [error["loc"][-1] for error in response.json()["errors"]] == [field, "max_tokens"]
        assert "ab ab" not in response.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"prompt": "a"} x',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a\\udc00b"}',
        b'{"a":' * 5000,
        b"\xef\xbb\xbf{}",
    ],
    ids=repr,
)
async def test_body_that_is_no_json_object_is_named(client: httpx.AsyncClient, content: bytes) -> None:
    response = await client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert [error["loc"] for error in response.json()["errors"]] == [["body"]]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_json_must_say_that_it_is(client: httpx.AsyncClient, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    response = await client.post("/generate", content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["body"]
    assert "application/json" in response.text


async def test_refusals_quote_no_body(client: httpx.AsyncClient) -> None:
    secret = "xyzzy"
    body = {
        "prompt": 5,
        "messages": [{"role": secret, "content": {"a": secret}}],
        "stop": [secret * 100],
        "seed": secret,
        "adapters": [{"name": secret, "weight": secret}],
    }
    response = await client.post("/generate", json=body)
    assert response.status_code == 422
    assert secret not in response.text


async def test_an_answer_to_thousands_of_bad_fields_is_short(client: httpx.AsyncClient) -> None:
    response = await client.post("/generate", json={f"field{number}" + "x" * 500: 1 for number in range(2000)})
    assert response.status_code == 422
    assert len(response.content) < 5000


async def test_many_bad_fields_are_counted_not_listed(client: httpx.AsyncClient) -> None:
    response = await client.post("/generate", json={"prompt": "a", **{f"field_{i}": 1 for i in range(100)}})
    problem = response.json()
    assert response.status_code == 422
    assert len(problem["errors"]) == MAX_ERRORS + 1
    assert problem["errors"][-1]["message"] == f"and {100 - MAX_ERRORS} more"
    assert problem["detail"].endswith("; field_2: no such field; and 97 more")


@pytest.mark.parametrize(
    "alike",
    [
        {"logit_bias": {f"{'0' * 64}{number}": 1000 for number in range(200)}},
        {"messages": [{"role": "user", "content": "a", **{f"{'x' * 64}{number}": 1 for number in range(200)}}]},
    ],
    ids=["biases", "unknown names"],
)
async def test_equal_messages_do_not_hide_other_errors(
    client: httpx.AsyncClient, alike: dict[str, object]
) -> None:
    (field,) = alike
    errors = (await client.post("/generate", json={**alike, "seed": -1, "speculation": "on"})).json()["errors"]
    assert sorted(error["loc"][0] for error in errors) == sorted([field, "seed", "speculation"])


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"stop": [""] * 300_000}, "stop"),
        ({"stop": [0] * 300_000}, "stop"),
        ({"logit_bias": {str(number): 1000 for number in range(99_000)}}, "body"),
        ({f"f{number}": 1 for number in range(99_000)}, "body"),
        ({"messages": [{"role": "user", "content": "x", **{f"f{n}": 1 for n in range(99_000)}}]}, "messages"),
        ({"messages": [{} for _ in range(99_000)]}, "messages"),
        ({f"{'x' * 64}{number:036}": 1 for number in range(10_000)}, "x" * 64),
    ],
    ids=["empty stops", "numbers as stops", "biases", "fields", "fields of a message", "messages", "long names"],
)
async def test_a_megabyte_of_faults_takes_no_seconds(
    client: httpx.AsyncClient, fields: dict[str, object], where: str
) -> None:
    content = json.dumps({"prompt": "a", **fields}).encode()
    before = time.thread_time()
    response = await client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert time.thread_time() - before < 1
    assert response.status_code == 422
    assert where in [error["loc"][0] for error in response.json()["errors"]]
    assert len(response.content) < 5000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": "a", "max_tokens" * 200_000: 1}),
        ("/train", {"name": "a", "data": [{"text": "a"}], "lora": {"target_modules": ["q_proj" * 333_333]}}),
    ],
)
async def test_a_name_of_a_megabyte_is_like_none(
    client: httpx.AsyncClient, path: str, body: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comparing it with the existing names would block the event loop."""
    compared: list[object] = []
    monkeypatch.setattr("difflib.SequenceMatcher.set_seq2", lambda matcher, name: compared.append(name))
    response = await client.post(path, json=body)
    assert response.status_code == 422
    assert "did you mean" not in response.text
    assert compared == []


@pytest.mark.parametrize(
    ("path", "body", "num_entries"),
    [
        ("/generate", {"prompt": "a", "n": 4, "max_tokens": 5, "logprobs": 2}, 60),
        ("/compare", {"prompt": "a", "adapters": ["base"] * 3, "max_tokens": 5, "logprobs": 2}, 45),
        ("/compare", {"prompt": "a", "adapters": ["base"], "max_tokens": 1, "score": ["a"], "logprobs": 2}, 6),
        ("/v1/completions", {"model": BASE_NAME, "prompt": ["a", "b"], "max_tokens": 5, "logprobs": 2}, 30),
        (
            "/v1/chat/completions",
            {
                "model": BASE_NAME,
                "messages": [{"role": "user", "content": "a"}],
                "max_tokens": 5,
                "logprobs": True,
                "top_logprobs": 2,
            },
            15,
        ),
    ],
)
async def test_an_answer_has_so_many_logprobs_and_no_more(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, object],
    num_entries: int,
) -> None:
    engine.script = scoring
    monkeypatch.setattr(generation, "MAX_LOGPROBS", num_entries)
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    monkeypatch.setattr(generation, "MAX_LOGPROBS", num_entries - 1)
    response = await client.post(path, json=body)
    assert response.status_code in (400, 422)
    assert "tokens with 2 alternatives each" in response.text
    if path != "/compare":
        assert (await client.post(path, json={**body, "stream": True})).status_code == 200


async def test_a_chat_without_a_bound_is_as_long_as_its_logprobs_allow(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "MAX_LOGPROBS", 2 * 3 * 4)
    body = {
        "model": BASE_NAME,
        "messages": [{"role": "user", "content": "a"}],
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
    }
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert engine.requests[-1].sampling.max_tokens == 4


def test_one_choice_of_the_longest_context_may_have_all_logprobs() -> None:
    generation.check_logprobs(8192, 20)
    with pytest.raises(InvalidInput, match="ask for fewer"):
        generation.check_logprobs(2 * 8192, 20)
