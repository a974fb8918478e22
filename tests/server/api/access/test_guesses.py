"""Wrong keys are counted by reason and delayed by address, without delaying right keys."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import httpx
import pytest

from server.api import authentication
from server.api.authentication import MAX_SECRETS, MAX_WRONG, Guesses, TooManyGuesses
from tests.server.api.access.key_kit import OPERATORS, access_of, client_with
from tests.server.conftest import MakeServices, client_of, new_app

pytestmark = pytest.mark.anyio


def replace_sleep(monkeypatch: pytest.MonkeyPatch, sleep: Callable[[float], Awaitable[None]]) -> None:
    monkeypatch.setattr(authentication, "asyncio", SimpleNamespace(sleep=sleep))


@pytest.fixture(autouse=True)
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the delays of wrong keys instead of waiting."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    replace_sleep(monkeypatch, sleep)
    return found


async def test_an_address_that_guesses_is_delayed_and_its_right_key_is_not(
    make_services: MakeServices, delays: list[float]
) -> None:
    app = new_app(make_services(api_keys=OPERATORS))
    async with client_of(app) as client, client_with(app, OPERATORS) as operator:
        for number in range(MAX_SECRETS + 5):
            answer = await client.get("/adapters", headers={"Authorization": f"Bearer wrong-{number}"})
            assert answer.status_code == 401
        assert delays == [1.0] * 5
        assert (await operator.get("/adapters")).status_code == 200
        assert (await client.get("/adapters")).status_code == 401, "without a key it guesses nothing"
        assert len(delays) == 5


async def test_single_wrong_key_is_not_delayed_at_first(delays: list[float]) -> None:
    """A client configured with a wrong key isn't guessing."""
    found = Guesses()
    for _ in range(MAX_WRONG):
        await found.wrong("10.0.0.1", "the-same")
    assert delays == []
    await found.wrong("10.0.0.1", "the-same")
    await found.wrong("10.0.0.2", "the-same")
    assert delays == [1.0]


async def test_the_next_minute_begins_at_nothing(delays: list[float]) -> None:
    now = [0.0]
    found = Guesses(lambda: now[0])
    for number in range(MAX_SECRETS + 1):
        await found.wrong("10.0.0.1", f"{number}")
    now[0] = 60.0
    await found.wrong("10.0.0.1", "another")
    assert len(delays) == 1


@pytest.mark.parametrize(
    ("addresses", "delayed"),
    [
        ([f"2001:db8:0:1::{number:x}" for number in range(MAX_SECRETS + 1)], 1),
        ([f"2001:db8:0:{number:x}::1" for number in range(MAX_SECRETS + 1)], 0),
        ([f"::ffff:10.0.0.{number}" for number in range(MAX_SECRETS + 1)], 0),
    ],
    ids=["of one network", "of several", "of IPv4"],
)
async def test_an_ipv6_address_counts_by_its_network(
    addresses: list[str], delayed: int, delays: list[float]
) -> None:
    found = Guesses()
    for number, address in enumerate(addresses):
        await found.wrong(address, f"{number}")
    assert len(delays) == delayed


async def test_memory_is_bounded_by_addresses() -> None:
    found = Guesses()
    for number in range(5000):
        await found.wrong(f"10.0.{number >> 8}.{number & 255}", "x")
    assert len(found) == 4096


async def test_more_than_64_delayed_requests_get_429(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waiting request holds a connection."""
    go = asyncio.Event()

    async def sleep(seconds: float) -> None:
        await go.wait()

    replace_sleep(monkeypatch, sleep)
    found = Guesses()
    for number in range(MAX_SECRETS):
        await found.wrong("10.0.0.1", f"{number}")
    waiting = [asyncio.ensure_future(found.wrong("10.0.0.1", f"w{number}")) for number in range(64)]
    await asyncio.gather(asyncio.wait_for(go.wait(), 0.01), return_exceptions=True)
    with pytest.raises(TooManyGuesses) as refused:
        await found.wrong("10.0.0.1", "one more")
    assert 0 < refused.value.retry_after <= 60
    go.set()
    await asyncio.gather(*waiting)


async def test_wrong_keys_are_counted_by_reason(make_services: MakeServices) -> None:
    app = new_app(make_services(api_keys=OPERATORS))
    keys = access_of(app).keys
    key, secret = keys.create("one", who="test")
    keys.revoke(key.id, who="test")

    def count(text: httpx.Response) -> dict[str, float]:
        lines = (line for line in text.text.splitlines() if line.startswith("smolora_auth_failures_total"))
        return {line.split('"')[1]: float(line.split()[-1]) for line in lines}

    async with client_with(app, OPERATORS) as operator:
        before = count(await operator.get("/metrics"))
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Bearer {secret}"}):
            for _ in range(2):
                async with client_of(app) as client:
                    assert (await client.get("/adapters", headers=headers)).status_code == 401
        app.state.services.metrics._keep_until = float("-inf")
        after = count(await operator.get("/metrics"))
    assert before == {"missing": 0, "unknown": 0, "expired": 0, "revoked": 0}
    assert after == {"missing": 2, "unknown": 2, "expired": 0, "revoked": 2}
