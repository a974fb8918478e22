"""POST /tokenize, POST /detokenize and GET /tokenizer_info: what vLLM's clients send and read."""

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.access.principal import Quota
from server.model.text.chat import ChatMessage, PromptEncoder
from tests.server.api.access.key_kit import client_with, new_secret
from tests.server.api.fakes import FakeEngine
from tests.server.conftest import BASE_NAME, MAX_MODEL_LEN, shared_tokenizer

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TURNS = [ChatMessage("user", "Hi"), ChatMessage("assistant", "Hello")]


async def tokenize(client: httpx.AsyncClient, **body: object) -> dict[str, Any]:
    response = await client.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_a_prompts_tokens_are_those_that_generate_uses(
    client: httpx.AsyncClient, engine: FakeEngine, encoder: PromptEncoder
) -> None:
    for prompt in ("Not Found", "x<|im_end|>y", "é"):
        answer = await tokenize(client, prompt=prompt, model="anything")
        await client.post("/generate", json={"prompt": prompt, "max_tokens": 1})
        tokens = list(engine.requests[-1].prompt_token_ids)
        assert answer == {"count": len(tokens), "max_model_len": MAX_MODEL_LEN, "tokens": tokens}


async def test_rendered_templates_have_special_tokens(client: httpx.AsyncClient) -> None:
    """This is how a harness looks up the ids of special tokens."""
    end = shared_tokenizer().special_tokens["eos_token"]
    answer = await tokenize(client, prompt=end, add_special_tokens=False)
    assert answer["tokens"] == [shared_tokenizer().eos_token_id]
    assert (await tokenize(client, prompt=end))["count"] > 1


async def test_conversations(client: httpx.AsyncClient, encoder: PromptEncoder) -> None:
    user = MESSAGES[:1]
    assert (await tokenize(client, messages=user))["tokens"] == list(encoder.messages(TURNS[:1]))
    whole = await tokenize(client, messages=MESSAGES, add_generation_prompt=False)
    assert whole["tokens"] == list(encoder.messages(TURNS, "whole"))
    more = {"continue_final_message": True, "add_generation_prompt": False}
    assert (await tokenize(client, messages=MESSAGES, **more))["tokens"] == list(encoder.messages(TURNS, "open"))


async def test_names_of_tokens(client: httpx.AsyncClient) -> None:
    answer = await tokenize(client, prompt="Not Found", return_token_strs=True)
    assert len(answer["token_strs"]) == answer["count"]
    assert shared_tokenizer().vocabulary[answer["token_strs"][-1]] == answer["tokens"][-1]


async def test_tokens_and_texts_are_inverse(client: httpx.AsyncClient) -> None:
    for prompt in ("Not Found", "Ünïcödé 日本語 🦜", "x<|im_end|>y\n"):
        for is_rendered in (False, True):
            tokens = (await tokenize(client, prompt=prompt, add_special_tokens=not is_rendered))["tokens"]
            response = await client.post("/detokenize", json={"model": BASE_NAME, "tokens": tokens})
            assert response.json() == {"prompt": prompt}
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_a_tokenizers_description(client: httpx.AsyncClient) -> None:
    info = (await client.get("/tokenizer_info")).json()
    assert info["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert info["eos_token"] == shared_tokenizer().special_tokens["eos_token"]
    template = shared_tokenizer().chat_template
    assert template is not None
    assert info["chat_template"] == template.source
    assert info["model_max_length"] == MAX_MODEL_LEN


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        ("/tokenize", "prompt", {}),
        ("/tokenize", "messages", {"prompt": "a", "messages": MESSAGES}),
        ("/tokenize", "prompt", {"prompt": ""}),
        ("/tokenize", "continue_final_message", {"prompt": "a", "continue_final_message": True}),
        ("/tokenize", "continue_final_message", {"messages": MESSAGES[:1], "continue_final_message": True}),
        (
            "/tokenize",
            "add_generation_prompt",
            {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
        ),
        ("/tokenize", "chat_template", {"messages": MESSAGES, "chat_template": "x"}),
        ("/detokenize", "tokens", {}),
        ("/detokenize", "tokens", {"tokens": [10**9]}),
        ("/detokenize", "tokens", {"tokens": [-1]}),
        ("/detokenize", "tokens", {"tokens": [True]}),
    ],
)
async def test_bad_fields_are_named(
    client: httpx.AsyncClient, path: str, field: str, body: dict[str, object]
) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 422, response.text
    assert field in [error["loc"][-1] for error in response.json()["errors"]]


async def test_long_prompts_are_counted(client: httpx.AsyncClient) -> None:
    """A prompt that is too long for an answer still has a number of tokens, within bounds."""
    answer = await tokenize(client, prompt="a b c d " * 150)
    assert answer["count"] > MAX_MODEL_LEN
    response = await client.post("/tokenize", json={"prompt": "a" * 1_000_000})
    assert response.status_code == 422
    assert [error["loc"] for error in response.json()["errors"]] == [["prompt"]]


async def test_tokens_are_charged(app: FastAPI, client: httpx.AsyncClient) -> None:
    async with client_with(app, new_secret(app, quota=Quota(tokens_per_minute=20))) as user:
        response = await user.post("/detokenize", json={"tokens": [7] * 15})
        assert response.headers["x-ratelimit-remaining-tokens"] == "5"
        assert (await user.post("/detokenize", json={"tokens": [7] * 6})).status_code == 429
        assert (await user.post("/tokenize", json={"prompt": "a b c d e f g h"})).status_code == 200
        assert (await user.post("/tokenize", json={"prompt": "a"})).status_code == 429
