"""Long work is divided into pieces on the event loop, or runs elsewhere."""

import asyncio
from collections.abc import Callable

import httpx
import pytest

from server.api import generate
from server.api.openai import logprobs
from server.engine.request import TokenLogprob
from tests.server.api.fakes import FakeEngine, scoring

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "user", "content": "a"}]
MANY_LOGPROBS: list[tuple[str, dict[str, object]]] = [
    ("/generate", {"prompt": "a", "logprobs": 1, "max_tokens": 48, "n": 2}),
    ("/compare", {"prompt": "a", "adapters": ["base"], "score": ["a " * 44], "logprobs": 1, "max_tokens": 1}),
    ("/v1/chat/completions", {"model": "base", "messages": MESSAGES, "logprobs": True, "max_tokens": 24, "n": 2}),
]


@pytest.mark.parametrize(("path", "body"), MANY_LOGPROBS)
async def test_formatting_many_logprobs_lets_others_run(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, object],
) -> None:
    """Formatting 8,000 tokens with 20 alternatives each takes almost a second."""
    turn = 0
    turns: set[int] = set()

    async def count() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    def noting(make: Callable[[TokenLogprob], object]) -> Callable[[TokenLogprob], object]:
        def noted(token: TokenLogprob) -> object:
            turns.add(turn)
            return make(token)

        return noted

    monkeypatch.setattr(generate, "_token", noting(generate._token))
    monkeypatch.setattr(logprobs, "_token", noting(logprobs._token))
    monkeypatch.setattr(generate, "_AT_ONCE", 8, raising=False)
    engine.script = scoring
    counting = asyncio.create_task(count())
    response = await client.post(path, json=body)
    counting.cancel()
    assert response.status_code == 200, response.text
    assert len(turns) > 5
