"""Authentication: reading keys blocks no other request, and requests that can never succeed are refused as
such."""

from pathlib import Path

import pytest
import sqlalchemy as sa
from anyio import fail_after, to_thread

from server.access.keys import KeyRing, Keys
from server.access.principal import OPERATOR, Principal, Quota
from server.access.projects import Projects
from server.access.rates import MemoryRates
from server.errors import RateLimited

pytestmark = pytest.mark.anyio


async def test_keys_are_read_while_all_threads_are_at_work(database: sa.Engine, tmp_path: Path) -> None:
    """Writers that wait for each other, or for an object store, may occupy all threads for most of a minute."""
    keys, number = Keys(database, tmp_path / "keyed"), [0]
    ring = KeyRing(keys, Projects(database), lambda: number[0])
    await ring.refresh()
    _, secret = keys.create("one", who=OPERATOR)
    number[0] = 1
    limiter = to_thread.current_default_thread_limiter()
    others = [object() for _ in range(int(limiter.available_tokens))]
    for other in others:
        limiter.acquire_on_behalf_of_nowait(other)
    try:
        with fail_after(10):
            assert await ring.principal(secret) is not None
    finally:
        for other in others:
            limiter.release_on_behalf_of(other)


@pytest.mark.parametrize(("of_key", "of_project"), [(1000, 500), (500, 1000)])
async def test_requests_beyond_any_rate_are_not_retryable(of_key: int, of_project: int) -> None:
    """Otherwise OpenAI's client would retry twice in vain."""
    rates = MemoryRates()
    quotas = Quota(tokens_per_minute=of_key), Quota(tokens_per_minute=of_project)
    who = Principal("acme", "key-1", frozenset(), quotas[0], project_quota=quotas[1])
    await rates.take(who, "tokens", 300)
    with pytest.raises(RateLimited, match="has 500 a minute: ask for less") as refused:
        await rates.take(who, "tokens", 800)
    assert refused.value.headers["x-should-retry"] == "false"
    await rates.take(who, "tokens", 200)
