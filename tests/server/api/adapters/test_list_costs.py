"""The cost of lists is proportional to their length, however much is stored: statements and rows are counted."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from adapters.catalog.catalog import Catalog, NewVersion, publish_in
from adapters.expression import parse
from server.database import FILE_NAME, connect
from tests.server.conftest import BASE_DIGEST, BASE_NAME

pytestmark = pytest.mark.anyio

NUM_VERSIONS = 2000
NAMES = [f"a{number}" for number in range(8)]
EACH = NUM_VERSIONS // len(NAMES)
SHOWN = 100  # versions of an adapter


class Reads:
    """The statements that were run; running them again counts their rows."""

    def __init__(self, database: sa.Engine) -> None:
        self._database = database
        self._statements: list[tuple[str, tuple[object, ...]]] = []

    def add(
        self, connection: object, cursor: object, statement: str, parameters: tuple[object, ...], *_: object
    ) -> None:
        self._statements.append((statement, parameters))

    @property
    def num_statements(self) -> int:
        return len(self._statements)

    def num_rows(self) -> int:
        found = 0
        with self._database.connect() as connection:
            for statement, parameters in list(self._statements):
                found += len(connection.exec_driver_sql(statement, parameters).all())
        return found


@contextmanager
def reads(database: sa.Engine) -> Iterator[Reads]:
    """Count reads during the block."""
    counted = Reads(database)
    sa.event.listen(database, "before_cursor_execute", counted.add)
    try:
        yield counted
    finally:
        sa.event.remove(database, "before_cursor_execute", counted.add)


@pytest.fixture(scope="module")
def new_database(new_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a database of 2,000 versions of eight adapters, and a composition of two; each test has a copy."""
    home = tmp_path_factory.mktemp("many")
    shutil.copy(new_database, home)
    database = connect(home)
    with database.begin() as connection:
        for number in range(NUM_VERSIONS):
            new = NewVersion(
                name=NAMES[number % len(NAMES)],
                digest=f"{number:064x}",
                rank=8,
                alpha=16.0,
                target_modules=("q_proj",),
                parameters=1,
                bytes=1,
                base_model=BASE_NAME,
                base_digest=BASE_DIGEST,
                config={"lora": {"rank": 8}},
            )
            publish_in(connection, new)
    Catalog(database).compose("mix", parse("a0*0.5+a1"))
    database.dispose()
    return home / FILE_NAME


async def test_models(client: httpx.AsyncClient, database: sa.Engine) -> None:
    await client.get("/v1/models/none")  # keys are read at the first request
    with reads(database) as counted:
        answer = (await client.get("/v1/models")).json()
    assert [model["id"] for model in answer["data"]] == [BASE_NAME, *NAMES, "mix"]
    assert (counted.num_statements, counted.num_rows()) == (1, len(NAMES) + 1)


async def test_model_date_is_its_versions(client: httpx.AsyncClient, database: sa.Engine) -> None:
    with database.begin() as connection:
        for version, date in ((1, "2024-01-02 00:00:00"), (EACH, "2024-03-04 00:00:00")):
            text = "UPDATE adapter_versions SET created_at = :date WHERE name = 'a0' AND version = :version"
            connection.execute(sa.text(text), {"date": f"{date}.000000", "version": version})

    async def created() -> set[int]:
        listed = (await client.get("/v1/models")).json()["data"]
        (one,) = [model["created"] for model in listed if model["id"] == "a0"]
        return {one, (await client.get("/v1/models/a0")).json()["created"]}

    assert await created() == {1_709_510_400}
    await client.put("/adapters/a0/aliases/latest", json={"version": 1})
    assert await created() == {1_704_153_600}


async def test_pages_read_only_their_adapters(client: httpx.AsyncClient, database: sa.Engine) -> None:
    await client.get("/adapters/none")  # keys are read at the first request
    with reads(database) as counted:
        answer = (await client.get("/adapters?limit=2")).json()
    assert [adapter["name"] for adapter in answer["adapters"]] == ["a0", "a1"]
    assert answer["next"] == "a1"
    assert counted.num_rows() <= 2 * (SHOWN + 1) + 2
    with reads(database) as counted:
        answer = (await client.get("/adapters?limit=2&after=a6")).json()
    assert ([adapter["name"] for adapter in answer["adapters"]], answer["next"]) == (["a7", "mix"], None)
    assert counted.num_rows() <= SHOWN + 1 + 4


@pytest.mark.parametrize("path", ["/adapters/a0/1", "/v1/models/a0", "/v1/models/mix", "/adapters?name=nobody"])
async def test_single_objects_read_few_rows(client: httpx.AsyncClient, database: sa.Engine, path: str) -> None:
    with reads(database) as counted:
        assert (await client.get(path)).status_code == 200
    assert counted.num_rows() <= 5


async def test_deleting_one_version_does_not_read_the_others(
    client: httpx.AsyncClient, database: sa.Engine
) -> None:
    with reads(database) as counted:
        assert (await client.delete("/adapters/a3/5")).status_code == 204
    assert counted.num_statements < 30
