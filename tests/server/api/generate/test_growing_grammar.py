"""A grammar that passes the checks but becomes too complex in the middle: each kind of answer names the bad field.

Over HTTP with the tiny base and the real grammar library.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.kits.grammars import growing
from tests.kits.tiny import tiny_tokenizer
from tests.server.running import running

MESSAGE = "became too complex to follow: make it simpler"
REGEX = growing().source
SCHEMA = {"type": "string", "pattern": f"^{REGEX}$"}
FORM = {"type": "json_schema", "json_schema": {"name": "growing", "schema": SCHEMA}}
NO_END = {str(token_id): -100 for token, token_id in tiny_tokenizer().get_vocab().items() if "d" in token}
BODY = {"max_tokens": 400, "temperature": 1.0, "seed": 1, "logit_bias": NO_END}
FORMS = [
    ({"regex": REGEX}, ["regex"]),
    ({"response_format": FORM}, ["response_format", "json_schema", "schema"]),
]


@pytest.fixture(scope="module")
def url(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("home"), tiny_base_dir) as server:
        yield server.url


def problem(loc: list[str]) -> dict[str, Any]:
    return {
        "type": "about:blank",
        "title": "Unprocessable Entity",
        "status": 422,
        "detail": f"{'.'.join(loc)}: {MESSAGE}",
        "errors": [{"loc": loc, "message": MESSAGE}],
    }


@pytest.mark.parametrize(("fields", "loc"), FORMS)
@pytest.mark.parametrize("n", [1, 3])
def test_answer_names_the_field(url: str, fields: dict[str, object], loc: list[str], n: int) -> None:
    response = httpx.post(f"{url}/generate", json={"prompt": "a", "n": n, **BODY, **fields}, timeout=60)
    assert response.status_code == 422, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json() == problem(loc)


@pytest.mark.parametrize(("fields", "loc"), FORMS)
def test_stream_ends_with_the_error(url: str, fields: dict[str, object], loc: list[str]) -> None:
    """Earlier text stays. The last event is the error, and no other event looks like an end."""
    body = {"prompt": "a", "stream": True, **BODY, **fields}
    response = httpx.post(f"{url}/generate", json=body, timeout=60)
    assert response.status_code == 200
    *pieces, last = response.text.removesuffix("\n\n").split("\n\n")
    assert "".join(json.loads(piece.removeprefix("data: "))["text"] for piece in pieces).count("z") == 60
    event, _, data = last.partition("\n")
    assert event == "event: error"
    assert json.loads(data.removeprefix("data: ")) == problem(loc)


def test_comparison_names_the_field(url: str) -> None:
    body = {"prompt": "a", "adapters": ["base"], "regex": REGEX, **BODY}
    response = httpx.post(f"{url}/compare", json=body, timeout=60)
    assert response.status_code == 422
    assert response.json() == problem(["regex"])


def test_openais_answer_and_stream_name_the_field(url: str) -> None:
    asked: dict[str, Any] = {
        "model": "base",
        "messages": [{"role": "user", "content": "a"}],
        "response_format": FORM,
        **BODY,
    }
    pieces = []

    def listen(client: openai.OpenAI) -> None:
        for chunk in client.chat.completions.create(stream=True, **asked):
            assert chunk.choices[0].finish_reason is None
            pieces.append(chunk.choices[0].delta.content or "")

    with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match=MESSAGE) as refused:
            client.chat.completions.create(**asked)
        assert refused.value.param == "response_format.json_schema.schema"
        with pytest.raises(openai.APIError, match=MESSAGE) as broken_off:
            listen(client)
    assert broken_off.value.param == "response_format.json_schema.schema"
    assert broken_off.value.type == "invalid_request_error"
    assert "".join(pieces).count("z") == 60


def test_next_answer_is_unaffected(url: str) -> None:
    body = {"prompt": "a", "regex": REGEX, **BODY}
    for _ in range(2):
        assert httpx.post(f"{url}/generate", json=body, timeout=60).status_code == 422
        answer = httpx.post(f"{url}/generate", json={**body, "logit_bias": None}, timeout=60)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["text"].startswith("z" * 60)
        assert choice["text"].endswith("d")
