"""Interrupted moves can be repeated, and non-empty destinations are refused."""

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from server.access.keys import Keys
from server.access.principal import OPERATOR
from server.database import agree, connect
from server.errors import StartupError
from server.operations.doctor import examine
from server.storage.home import RESTORING, Home
from server.storage.places import Storage
from server.training.datasets import ROWS, DatasetStore
from tests.kits.postgres import CLUSTER, Postgres
from tests.server.api.adapters.registry import Registry, write_files
from tests.server.operations.test_backup import contents

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

pytestmark = CLUSTER


class CutOff(BaseException):
    """Raised instead of a kill."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Make a@1, b@1, mix@1 = a+b, a key and a data set."""
    files = tmp_path / "files"
    files.mkdir()
    write_files(files)
    registry = Registry(tmp_path / "home", files)
    registry.do({"do": "upload", "name": "a", "seed": 0})
    registry.do({"do": "upload", "name": "b", "seed": 2})
    registry.do({"do": "compose", "name": "mix", "expression": "a+b"})
    registry.close()
    place = Home(tmp_path / "home")
    engine = connect(place.path)
    Keys(engine, place.keyed).create("one", who=OPERATOR, project="acme")
    engine.dispose()
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b'{"text": "a"}\n')
    for project in ("default", "acme"):
        with rows.open("rb") as file:
            DatasetStore(place.datasets(project)).put(file, "rows.jsonl")
    return place.path


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    url = postgres.migrated()
    yield url
    postgres.drop(url)


def cut_off_at(bucket: "Bucket", number: int) -> "Bucket":
    """Return the bucket, with a request of that number, from 0, that ends the process."""
    from adapters.storage.bucket import Bucket

    left = [number]

    class Failing(Bucket):
        def under(self, prefix: str) -> "Bucket":
            return Failing(self._store, self._patience, f"{self._prefix}{prefix}/")

        def _ask(self, question: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise CutOff
            return super()._ask(question)

    return Failing(bucket._store, bucket._patience, bucket._prefix)


def test_an_interrupted_move_can_be_repeated(home: Path, tmp_path: Path, url: str, bucket: "Bucket") -> None:
    from server.operations.move import to_cluster, to_home

    before, target = contents(home), Storage(Home(tmp_path / "api"), bucket, url="s3://b")
    is_done, messages = False, list[str]()
    for number in range(0, 300, 13):
        try:
            to_cluster(home, url, Storage(target.home, cut_off_at(bucket, number), url="s3://b"))
            break
        except CutOff:
            engine = connect(tmp_path / "api", url=url)
            try:
                agree(engine, target.place)
                is_done = number > 0  # the rows are moved: the next server's start completes the rest
            except StartupError as error:
                messages.append(str(error))
            finally:
                engine.dispose()
            if number == 0:
                continue
            if is_done:
                break
    assert number > 13
    assert messages
    assert all("smolora move is at work" in line for line in messages)
    assert {name: content for name, content in contents(home).items() if name in before} == before
    with pytest.raises(StartupError, match="isn't empty"):
        to_cluster(home, url, target)

    back = tmp_path / "back"
    for number in range(0, 200, 7):
        try:
            to_home(back, url, Storage(target.home, cut_off_at(bucket, number), url="s3://b"))
            break
        except CutOff:
            assert not list(back.glob(f"{RESTORING}*"))
    assert number > 7
    assert examine(back).is_sound
    assert contents(back) == before
    shutil.rmtree(back)


def test_rows_that_take_long_to_compare_do_not_time_out(
    home: Path, tmp_path: Path, url: str, bucket: "Bucket", monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL ends a session that is idle within a transaction, as it would be while millions of rows are
    read."""
    from server.database import postgres, rows
    from server.operations import move as module
    from server.operations.move import to_cluster

    def slowly(connection: sa.Connection, tables: Sequence[sa.Table]) -> "dict[str, rows.Content]":
        if connection.dialect.name == "sqlite":
            time.sleep(4)
        return rows.contents(connection, tables)

    target = Storage(Home(tmp_path / "api"), bucket, url="s3://b")
    to_cluster(home, url, target)
    monkeypatch.setattr(postgres, "_SETTINGS", "SET idle_in_transaction_session_timeout = '2s'")
    monkeypatch.setattr(module, "contents", slowly)
    module.to_home(tmp_path / "back", url, target)
    assert examine(tmp_path / "back").is_sound


def test_a_damaged_upload_is_moved_as_it_is(home: Path, tmp_path: Path, url: str, bucket: "Bucket") -> None:
    """It is reported, and can be repaired afterwards."""
    from server.operations.move import to_cluster, to_home

    target = Storage(Home(tmp_path / "api"), bucket, url="s3://b")
    to_cluster(home, url, target)
    (key,) = (stored.key for stored in bucket.listed("projects/acme/datasets/") if stored.key.endswith(ROWS))
    bucket.put(key, b"{}")
    moved = to_home(tmp_path / "back", url, target)
    (message,) = moved.damaged
    assert message.startswith("projects/acme/datasets/ds-")
    assert "no longer match" in message
    assert [finding.about for finding in examine(tmp_path / "back").findings] == [message.split(":")[0]]


def test_places_in_use_and_places_that_are_not_empty_are_refused(
    home: Path, tmp_path: Path, url: str, bucket: "Bucket"
) -> None:
    from server.operations.move import to_cluster, to_home

    target = Storage(Home(tmp_path / "api"), bucket, url="s3://b")
    bucket.put("something", b"")
    with pytest.raises(StartupError, match="s3://b isn't empty, it has something"):
        to_cluster(home, url, target)
    bucket.delete(["something"])
    engine = connect(home)
    with pytest.raises(StartupError, match="is using"):
        to_cluster(home, url, target)
    engine.dispose()
    engine = connect(tmp_path / "api", url=url)
    with engine.connect(), pytest.raises(StartupError, match="stop all of them first"):
        to_cluster(home, url, target)
    engine.dispose()
    (digest,) = (path for path in sorted(home.glob("adapters/*/*/adapter_model.safetensors"))[:1])
    whole = digest.read_bytes()
    digest.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StartupError, match="smolora doctor names"):
        to_cluster(home, url, target)
    digest.write_bytes(whole)
    to_cluster(home, url, target)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(StartupError, match="isn't empty"):
        to_home(tmp_path / "full", url, target)
    with pytest.raises(StartupError, match="are in s3://b, and not in s3://other"):
        to_home(tmp_path / "new", url, Storage(target.home, bucket.under("other"), url="s3://other"))
    assert not (tmp_path / "new").exists()
