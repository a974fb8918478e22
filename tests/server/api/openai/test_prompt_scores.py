"""Scores of prompts on a fake engine: `echo` with `logprobs`, and vLLM's `prompt_logprobs`."""

import json
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.access.principal import Quota
from server.api import generation
from server.api.accounts import keep_now
from server.engine.request import GenerationRequest, SampledLogprob, SequenceOutput, TokenLogprob
from server.model.text.chat import ChatMessage, PromptEncoder
from tests.server.api.access.key_kit import access_of, client_with, new_secret
from tests.server.api.fakes import FakeEngine, scoring
from tests.server.conftest import BASE_NAME, MAX_MODEL_LEN, shared_tokenizer

pytestmark = pytest.mark.anyio

PATH = "/v1/completions"
CHAT = {"model": BASE_NAME, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(autouse=True)
def script(engine: FakeEngine) -> None:
    engine.script = scoring


async def post(client: httpx.AsyncClient, body: dict[str, object], path: str = PATH) -> httpx.Response:
    return await client.post(path, json={"model": BASE_NAME, **body} if path == PATH else body)


async def choices(client: httpx.AsyncClient, **body: object) -> list[dict[str, Any]]:
    response = await post(client, body)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["choices"]
    return found


def scores(num_tokens: int) -> list[float | None]:
    """Return the fake engine's scores of a prompt."""
    return [None, *(-0.5 * number for number in range(1, num_tokens))]


async def test_echo_lists_the_prompt_and_the_answer(
    client: httpx.AsyncClient, engine: FakeEngine, encoder: PromptEncoder
) -> None:
    """The first entry is null, since no token comes before it."""
    ids = list(encoder.prompt("Not Found"))
    for prompt in ("Not Found", ids, ["Not Found"], [ids]):
        engine.requests.clear()
        (choice,) = await choices(client, prompt=prompt, echo=True, logprobs=1, max_tokens=2)
        assert choice["text"] == "Not Foundw0 w1 "
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"] == [*scores(len(ids)), -0.25, -0.25]
        assert logprobs["top_logprobs"][0] is None
        assert [dict(top) for top in logprobs["top_logprobs"][-2:]] == [{"w0 ": -0.25}, {"w1 ": -0.25}]
        assert all(isinstance(top, dict) for top in logprobs["top_logprobs"][1:])
        first = shared_tokenizer().decode(ids[:1])
        assert (logprobs["tokens"][0], logprobs["text_offset"][:2]) == (first, [0, len(first)])
        assert {len(entries) for entries in logprobs.values()} == {len(ids) + 2}
        (request,) = engine.requests
        assert (request.scored_from, request.sampling.logprobs) == (1, 1)


async def test_echo_without_an_answer(
    client: httpx.AsyncClient, engine: FakeEngine, encoder: PromptEncoder
) -> None:
    num = len(encoder.prompt("Not Found"))
    (choice,) = await choices(client, prompt="Not Found", echo=True, logprobs=0, max_tokens=0)
    assert (choice["text"], choice["finish_reason"]) == ("Not Found", "length")
    assert choice["logprobs"]["token_logprobs"] == scores(num)
    assert choice["logprobs"]["top_logprobs"] is None
    (choice,) = await choices(client, prompt=[7], echo=True, logprobs=2, max_tokens=0)
    assert choice["logprobs"]["token_logprobs"] == [None]
    assert choice["logprobs"]["top_logprobs"] == [None]
    full = [1 + number % 50 for number in range(MAX_MODEL_LEN)]
    (choice,) = await choices(client, prompt=full, echo=True, logprobs=0, max_tokens=0)
    assert choice["logprobs"]["token_logprobs"] == scores(MAX_MODEL_LEN)


async def test_echo_of_texts_alone_scores_nothing(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    (first, *_, last) = await choices(client, prompt=["a", "b"], echo=True, n=2, max_tokens=1)
    assert (first["text"], last["text"], last["logprobs"]) == ("aw0 ", "bw0 ", None)
    assert {request.scored_from for request in engine.requests} == {None}


async def test_special_tokens_are_echoed_as_entries_alone(client: httpx.AsyncClient) -> None:
    """As in answers, the text has none. Their entries have their names."""
    end = shared_tokenizer().special_tokens["eos_token"]
    end_id = shared_tokenizer().backend.token_to_id(end)
    assert end_id is not None
    ids = [end_id, *shared_tokenizer().encode("Hi")]
    (choice,) = await choices(client, prompt=ids, echo=True, logprobs=0, max_tokens=0)
    assert choice["text"] == "Hi"
    assert (choice["logprobs"]["tokens"][0], choice["logprobs"]["text_offset"][:2]) == (end, [0, 0])


async def test_echo_keeps_the_end_tokens_entry(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Harnesses that ask for one more token drop the last entry, whatever it is."""
    end = TokenLogprob(2, "<|im_end|>", (), -0.75)

    def ends(request: GenerationRequest) -> Iterable[SequenceOutput]:
        (first,) = scoring(request)
        *of_prompt, _ = first.logprobs
        logprobs = (*of_prompt, SampledLogprob(end, (end,)))
        yield SequenceOutput(request.request_id, 0, "", 1, 1, 0, logprobs, first.scores, "stop")

    engine.script = ends
    (choice,) = await choices(client, prompt=[7, 8], echo=True, logprobs=1, max_tokens=1)
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.75]
    (choice,) = await choices(client, prompt=[7, 8], prompt_logprobs=1, logprobs=1, max_tokens=1)
    assert choice["logprobs"]["token_logprobs"] == []


async def test_streamed_echo(client: httpx.AsyncClient, encoder: PromptEncoder) -> None:
    num = len(encoder.prompt("Not Found"))
    response = await post(
        client, {"prompt": "Not Found", "echo": True, "logprobs": 0, "max_tokens": 2, "stream": True}
    )
    *events, _, _ = response.text.split("\n\n")
    found = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in found) == "Not Foundw0 w1 "
    listed = [entry for choice in found for entry in choice["logprobs"]["token_logprobs"]]
    assert listed == [*scores(num), -0.25, -0.25]
    offsets = [choice["logprobs"]["text_offset"] for choice in found]
    assert offsets[-1] == [offsets[0][-1] + len("w0 ")]


async def test_prompt_logprobs_have_vllms_form(
    client: httpx.AsyncClient, engine: FakeEngine, encoder: PromptEncoder
) -> None:
    for number in (0, 1):
        body = {"prompt": [7, 8, 9], "max_tokens": 1, "prompt_logprobs": number}
        (choice,) = await choices(client, **body)
        assert choice["logprobs"] is None
        assert choice["prompt_logprobs"] == [
            None,
            {"0": {"logprob": -0.5, "rank": 1, "decoded_token": "t0"}},
            {"0": {"logprob": -1.0, "rank": 1, "decoded_token": "t1"}},
        ]
    answer = (await post(client, {**CHAT, "max_tokens": 1, "prompt_logprobs": 1}, "/v1/chat/completions")).json()
    assert len(answer["prompt_logprobs"]) == len(encoder.messages([ChatMessage("user", "Hi")]))
    assert "prompt_logprobs" not in answer["choices"][0]


async def test_ranks_of_the_likeliest_tokens(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """The prompt's own token comes first. Its rank is null if it isn't among the tokens that were asked for."""

    def scored(request: GenerationRequest) -> Iterable[SequenceOutput]:
        tokens = [TokenLogprob(number, f"t{number}", (116,), -float(number)) for number in range(10)]
        entry = SampledLogprob(tokens[5], tuple(tokens[: request.sampling.logprobs]))
        yield SequenceOutput(request.request_id, 0, "", 0, 0, 0, (entry,), (-5.0,), "length")

    engine.script = scored
    (choice,) = await choices(client, prompt=[7, 5], max_tokens=0, prompt_logprobs=2)
    ranks = {token_id: entry["rank"] for token_id, entry in choice["prompt_logprobs"][1].items()}
    assert list(ranks.items()) == [("5", None), ("0", 1), ("1", 2)]


async def test_scores_in_our_own_form(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body: dict[str, object] = {"prompt": "Not Found", "max_tokens": 1, "prompt_logprobs": 0, "logprobs": 2}
    answer = (await post(client, body, "/generate")).json()
    assert answer["prompt_logprobs"][0] is None
    assert answer["prompt_logprobs"][1] == {"token": "t0", "bytes": [116], "logprob": -0.5, "top": []}
    (entry,) = answer["choices"][0]["logprobs"]
    assert len(entry["top"]) == 2
    answer = (await post(client, {"prompt": "Not", "prompt_logprobs": 3, "max_tokens": 0}, "/generate")).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["logprobs"]) == ("", None)
    assert answer["usage"]["completion_tokens"] == 0
    assert "prompt_logprobs" not in (await post(client, {"prompt": "a", "max_tokens": 1}, "/generate")).json()


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 0, "logprobs": 1}),
        ("n", {"n": 2, "echo": True, "logprobs": 0}),
        ("n", {"n": 2, "prompt_logprobs": 1}),
        ("prompt_logprobs", {"stream": True, "prompt_logprobs": 1}),
        ("prompt_logprobs", {"prompt_logprobs": 21}),
        ("echo", {"echo": 1}),
        ("min_tokens", {"echo": True, "max_tokens": 0, "min_tokens": 1}),
    ],
)
async def test_impossible_scores_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, param: str, body: dict[str, object]
) -> None:
    response = await post(client, {"prompt": "a", "max_tokens": 2, **body})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert engine.requests == []


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("logprobs", {"echo": True, "logprobs": 20, "max_tokens": 0}),
        ("logprobs", {"echo": True, "logprobs": 20, "max_tokens": 1, "stream": True}),
        ("prompt_logprobs", {"prompt_logprobs": 20}),
    ],
)
async def test_too_many_scores_are_refused(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    param: str,
    body: dict[str, object],
) -> None:
    """In a stream, too: all scores of a prompt are in one event."""
    monkeypatch.setattr(generation, "MAX_LOGPROBS", 1500)
    response = await post(client, {"prompt": [[7] * 50] * 2, "max_tokens": 2, **body})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert engine.requests == []


async def test_scores_are_charged_and_booked(app: FastAPI, client: httpx.AsyncClient) -> None:
    """They count once: the tokens of all prompts, and one request for all."""
    secret = new_secret(app, quota=Quota(tokens_per_minute=30))
    async with client_with(app, secret) as user:
        body = {"prompt": [[7, 8, 9], [7, 8]], "echo": True, "logprobs": 1, "max_tokens": 0}
        response = await post(user, body)
        assert response.headers["x-ratelimit-remaining-tokens"] == "25"
        await keep_now(access_of(app))
        (row,) = (await user.get("/usage", params={"by": "key"})).json()["rows"]
        assert (row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (1, 5, 0)
        refused = await post(user, {"prompt": [1] * 26, "echo": True, "logprobs": 0, "max_tokens": 0})
        assert refused.status_code == 429


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
async def test_the_last_turn_is_continued(
    client: httpx.AsyncClient, engine: FakeEngine, encoder: PromptEncoder, path: str
) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    model = {"model": BASE_NAME} if path.startswith("/v1") else {}
    body = {**model, "messages": messages, "max_tokens": 1, "continue_final_message": True}
    assert (await client.post(path, json=body)).status_code == 200
    turns = [ChatMessage("user", "Hi"), ChatMessage("assistant", "Hello")]
    assert engine.requests[-1].prompt_token_ids == tuple(encoder.messages(turns, "open"))
    refused = await client.post(path, json={**body, "messages": messages[:1]})
    assert refused.status_code in (400, 422)
    assert "continue_final_message" in refused.text


async def test_vllms_flag_must_agree_with_the_continuation(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for given, continues, status in (
        (False, True, 200),
        (True, True, 400),
        (True, False, 200),
        (False, False, 400),
    ):
        body = {"add_generation_prompt": given, "continue_final_message": continues, "max_tokens": 1}
        response = await post(client, {**CHAT, "messages": messages, **body}, "/v1/chat/completions")
        assert response.status_code == status, response.text
