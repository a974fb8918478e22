"""Two servers of one database count together."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
import sqlalchemy as sa

from adapters.errors import Unavailable
from server.access.principal import EVERYBODY, Principal, Quota
from server.database import connect
from server.errors import RateLimited
from tests.kits.postgres import CLUSTER, Postgres

if TYPE_CHECKING:
    from server.access.database_rates import DatabaseRates

pytestmark = CLUSTER

WHO = Principal("acme", "key-1", frozenset({"generate"}), Quota(10, 1000), Quota(15))


@pytest.fixture
def engine(postgres: Postgres, tmp_path: Path) -> Iterator[sa.Engine]:
    url = postgres.migrated()
    engine = connect(tmp_path, url=url)
    yield engine
    engine.dispose()
    postgres.drop(url)


@pytest.fixture
def servers(engine: sa.Engine) -> "list[DatabaseRates]":
    from server.access.database_rates import DatabaseRates

    return [DatabaseRates(engine) for _ in range(2)]


def taken(rates: "DatabaseRates", who: Principal, times: int) -> int:
    """Return the number of requests admitted."""

    refused: list[RateLimited] = []

    async def run() -> None:
        for _ in range(times):
            try:
                await rates.take(who, "requests")
            except RateLimited as error:
                refused.append(error)

    anyio.run(run)
    assert all(0 < error.retry_after <= 60 for error in refused)
    assert all(error.headers["x-ratelimit-remaining-requests"] == "0" for error in refused)
    return times - len(refused)


def test_a_key_has_its_limit_once(servers: "list[DatabaseRates]") -> None:
    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(lambda rates: taken(rates, WHO, 20), servers)) == 10
    assert taken(servers[0], replace(WHO, key_id="key-2"), 20) == 5, "what the project's keys have left together"
    assert taken(servers[1], EVERYBODY, 3) == 3, "who has no limit"


def test_refused_requests_do_not_count(servers: "list[DatabaseRates]") -> None:
    async def run() -> None:
        first, second = servers
        await first.take(WHO, "tokens", 900)
        for amount, message in ((101, "too few are left"), (1001, "ask for less")):
            with pytest.raises(RateLimited, match=message):
                await second.take(WHO, "tokens", amount)
        assert second.headers(WHO)["x-ratelimit-remaining-tokens"] == "100"
        await second.take(WHO, "tokens", 100)
        assert second.headers(WHO)["x-ratelimit-remaining-tokens"] == "0"
        assert first.headers(WHO)["x-ratelimit-limit-requests"] == "10"

    anyio.run(run)


def test_excess_charges_count_for_all_servers(servers: "list[DatabaseRates]") -> None:
    async def run() -> None:
        first, second = servers
        await first.take(WHO, "tokens", 0)
        await first.charge(WHO, "tokens", 1500)
        assert first.headers(WHO)["x-ratelimit-remaining-tokens"] == "0"
        with pytest.raises(RateLimited, match="too few are left"):
            await second.take(WHO, "tokens", 0)

    anyio.run(run)


def test_a_window_ends(engine: sa.Engine, servers: "list[DatabaseRates]") -> None:
    assert taken(servers[0], WHO, 11) == 10
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE rate_windows SET until = until - 60")
    assert taken(servers[1], WHO, 11) == 10


def test_a_window_ends_though_the_clock_is_set_back(engine: sa.Engine, servers: "list[DatabaseRates]") -> None:
    assert taken(servers[0], WHO, 11) == 10
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE rate_windows SET until = until + 3600")
    assert taken(servers[1], WHO, 11) == 10


def test_every_admitted_request_is_counted(own_postgres: Postgres, tmp_path: Path) -> None:
    from server.access.database_rates import DatabaseRates

    engine = connect(tmp_path, url=own_postgres.migrated(), patience=0.0)
    rates = DatabaseRates(engine)
    own_postgres.kill()
    with pytest.raises(Unavailable):
        anyio.run(rates.take, WHO, "requests")
    engine.dispose()
    own_postgres.start()
