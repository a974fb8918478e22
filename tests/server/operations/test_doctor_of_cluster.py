"""`smolora doctor` for a database on a PostgreSQL server, and bytes in an object store."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

pytest.importorskip("obstore", reason="needs the extra cluster")

from adapters.catalog.catalog import Catalog
from adapters.names import Viewpoint
from adapters.peft.files import CONFIG_NAME, WEIGHTS_NAME
from adapters.sql import reader_of
from adapters.store.bucket_store import BucketAdapterStore
from adapters.store.store import SIDECAR_NAME
from server.cli.main import app
from server.database import agree, connect
from server.errors import StartupError
from server.operations.doctor import examine, rebuild
from server.operations.move import to_cluster
from server.storage.home import Home
from server.storage.places import Storage
from server.training.datasets import ROWS, DatasetStore
from tests.adapters.samples import sample_adapter
from tests.kits.postgres import CLUSTER, Postgres
from tests.server.api.adapters.registry import Registry, digest_of, write_files

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

pytestmark = CLUSTER


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    url = postgres.migrated()
    yield url
    postgres.drop(url)


@pytest.fixture
def storage(
    tmp_path: Path, url: str, bucket: "Bucket", bytes_url: str, monkeypatch: pytest.MonkeyPatch
) -> Storage:
    """Make a cluster with a@1, a@2, b@1, mix@1 = a@1*0.5+b@1, and a data set. Settings name it."""
    files = tmp_path / "files"
    files.mkdir()
    write_files(files)
    registry = Registry(tmp_path / "home", files)
    for name, seed in (("a", 0), ("a", 1), ("b", 2)):
        registry.do({"do": "upload", "name": name, "seed": seed})
    registry.do({"do": "compose", "name": "mix", "expression": "a@1*0.5+b"})
    registry.do({"do": "point", "name": "a", "alias": "latest", "version": 1})
    registry.close()
    (rows := tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n')
    with rows.open("rb") as file:
        DatasetStore(tmp_path / "home" / "datasets").put(file, "rows.jsonl")
    made = Storage(Home(tmp_path / "api"), bucket, url=bytes_url)
    to_cluster(tmp_path / "home", url, made)
    monkeypatch.setenv("SMOLORA_DATABASE_URL", url)
    monkeypatch.setenv("SMOLORA_BYTES_URL", bytes_url)
    monkeypatch.setenv("SMOLORA_HOME", str(tmp_path / "api"))
    return made


def found(storage: Storage, url: str) -> dict[str, str]:
    return {f.about: f.message for f in examine(storage.home.path, storage.bucket, url).findings}


def doctor(*arguments: str) -> tuple[int, str]:
    """Return the exit code and the output, or the message of the StartupError that ends the command."""
    result = CliRunner().invoke(app, ["doctor", *arguments])
    is_refused = isinstance(result.exception, StartupError)
    return result.exit_code, str(result.exception) if is_refused else result.output


def key_of(bucket: "Bucket", seed: int, name: str) -> str:
    keys = bucket.keys(f"adapters/bytes/{digest_of(seed)}/")
    (key,) = (key for key in keys if key.endswith(f"/{name}"))
    return key


def run(url: str, home: Path, *statements: str) -> None:
    engine = connect(home, url=url)
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


def test_a_sound_cluster_has_no_findings(storage: Storage) -> None:
    code, output = doctor()
    first, last = output.splitlines()
    assert first.startswith("database: PostgreSQL 1")
    assert last == "sound: 4 versions, 3 stored adapters, 1 upload checked"
    assert code == 0
    code, output = doctor("--json")
    assert (code, json.loads(output)["is_sound"]) == (0, True)


def test_damaged_and_missing_objects_are_found(storage: Storage, url: str, bucket: "Bucket") -> None:
    weights = bytearray(bucket.get(key := key_of(bucket, 0, WEIGHTS_NAME)))
    weights[-1] ^= 1
    bucket.put(key, bytes(weights))
    bucket.delete([key_of(bucket, 1, CONFIG_NAME)])
    bucket.delete(bucket.keys(f"adapters/bytes/{digest_of(2)}/"))
    (rows,) = (key for key in bucket.keys("datasets/") if key.endswith(ROWS))
    bucket.put(rows, b"{}")
    messages = found(storage, url)
    assert messages.keys() == {"a@1", "a@2", "b@1", "/".join(rows.split("/")[:2])}
    assert "no longer matches its digest" in messages["a@1"]
    assert "incomplete" in messages["a@2"]
    assert "missing" in messages["b@1"]
    code, output = doctor()
    assert code == 1
    assert "4 findings" in output


def test_records_that_differ_from_rows_are_found_and_repaired(
    storage: Storage, url: str, bucket: "Bucket"
) -> None:
    names = "adapters/names"
    bucket.put(f"{names}/b/1.json", b"{")
    bucket.delete([f"{names}/a/1.json"])
    assert found(storage, url).keys() == {"a@1", "b@1", "adapters/names/b/1.json"}
    code, output = doctor()
    assert code == 1
    assert "run smolora doctor --rebuild" in output
    code, output = doctor("--rebuild")
    assert code == 0, output
    assert output.startswith("the database is sound: it was kept")
    assert output.endswith("sound: 4 versions, 3 stored adapters, 1 upload checked\n")


def test_a_record_without_a_row_is_found_and_published_again(storage: Storage, url: str) -> None:
    """As after a dump was restored that is older than the version."""
    names = "name = 'a' AND version = 2"
    run(
        url,
        storage.home.path,
        f"DELETE FROM adapter_versions WHERE {names}",
        "UPDATE adapters SET next_version = 2",
    )
    messages = found(storage, url)
    assert messages.keys() == {"a@2", f"adapters/{digest_of(1)[:2]}/{digest_of(1)}"}
    assert "isn't in the database" in messages["a@2"]
    code, output = doctor("--rebuild")
    assert code == 0, output
    assert "the database didn't know a@2: published again" in output


def test_leftovers_are_found_and_removed_by_a_rebuild_and_sweeps(
    storage: Storage, url: str, bucket: "Bucket"
) -> None:
    store = BucketAdapterStore(storage.home.adapters, bucket.under("adapters"), grace=-1.0)
    orphan = sample_adapter(9)
    digest = orphan.weights.digest
    with store.publishing(orphan, lambda _: True):  # a publisher is about to name it
        assert found(storage, url) == {}
    bucket.put(half := f"adapters/bytes/{digest_of(0)}/left/{CONFIG_NAME}", b"{}")
    messages = found(storage, url)
    assert messages.keys() == {f"adapters/{digest[:2]}/{digest}", half.rpartition("/")[0]}
    code, output = doctor("--rebuild")
    assert code == 0, output
    engine = connect(storage.home.path, url=url)
    catalog = Catalog(engine, of=Viewpoint(sees_all=True))
    for _ in range(2):  # doubts become tombstones, and these expire
        store.sweep(catalog.in_use)
    engine.dispose()
    assert bucket.keys(f"adapters/bytes/{digest}/") == bucket.keys(half.rpartition("/")[0]) == []
    assert len(bucket.keys(f"adapters/bytes/{digest_of(0)}/")) == 3
    assert found(storage, url) == {}


def test_a_wanted_copy_with_a_tombstone_is_no_finding(storage: Storage, url: str, bucket: "Bucket") -> None:
    """A sweep keeps it, and servers load it."""
    _, digest, copy, _ = key_of(bucket, 0, SIDECAR_NAME).removeprefix("adapters/").split("/")
    bucket.put(tombstone := f"adapters/tombstones/{digest}/{copy}", b"")
    assert found(storage, url) == {}
    weights = bytearray(bucket.get(key := key_of(bucket, 0, WEIGHTS_NAME)))
    weights[-1] ^= 1
    bucket.put(key, bytes(weights))
    assert found(storage, url).keys() == {"a@1"}, "it is verified as others are"
    bucket.delete([tombstone])


def test_a_damaged_copy_next_to_an_intact_one_is_found(storage: Storage, url: str, bucket: "Bucket") -> None:
    for name in (WEIGHTS_NAME, CONFIG_NAME, SIDECAR_NAME):
        key = key_of(bucket, 0, name)
        _, digest, _, _ = key.removeprefix("adapters/").split("/")
        content = bucket.get(key)
        if name == WEIGHTS_NAME:
            content = content[:-1] + bytes([content[-1] ^ 1])
        bucket.put(f"adapters/bytes/{digest}/other/{name}", content)
    assert found(storage, url).keys() == {"a@1"}


def test_tables_without_columns_and_rows_without_parents_are_found(
    storage: Storage, url: str, bucket: "Bucket"
) -> None:
    home = storage.home.path
    run(
        url,
        home,
        "SET LOCAL session_replication_role = replica",  # constraints are off, as while some dumps are restored
        "DELETE FROM adapter_versions WHERE name = 'b'",
    )
    messages = found(storage, url)
    assert "refer to what adapter_versions doesn't have" in messages["database"]
    run(url, home, "ALTER TABLE usage DROP COLUMN requests", "DROP TABLE job_events")
    lines = [f.message for f in examine(home, bucket, url).findings if f.about == "database"]
    assert lines == ["the table usage has no column requests", "has no table job_events"]
    code, output = doctor()
    assert code == 1
    assert "--rebuild" not in output


def tables(url: str) -> list[str]:
    raw = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    try:
        return sa.inspect(raw).get_table_names()
    finally:
        raw.dispose()


def test_a_lost_database_is_rebuilt(storage: Storage, postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLORA_DATABASE_URL", fresh := postgres.url(postgres.new()))
    code, output = doctor()
    assert code == 1
    assert "no server has used this database yet" in output
    assert tables(fresh) == [], "it changed nothing"
    code, output = doctor("--rebuild")
    assert code == 0, output
    lines = output.splitlines()
    assert lines[0] == "published again from the directories: a@1, a@2, b@1, mix@1"
    assert lines[-1] == "sound: 4 versions, 3 stored adapters, 1 upload checked"
    postgres.drop(fresh)


def test_another_place_or_a_running_server_is_refused(
    storage: Storage, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = connect(storage.home.path, url=url)
    with reader_of(engine).connect() as connection:  # as a running server
        connection.exec_driver_sql("SELECT 1")
        code, output = doctor("--rebuild")
        assert code == 1
        assert "stop all of them first" in output
        assert doctor()[0] == 0
    engine.dispose()
    assert storage.url is not None
    monkeypatch.setenv("SMOLORA_BYTES_URL", f"{storage.url}-other")
    code, output = doctor()
    assert code == 1
    assert "give all servers and workers on it the same place" in output


def test_a_rebuild_publishes_a_version_whose_only_copy_has_a_tombstone(
    storage: Storage, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep keeps such a copy as long as the catalog wants it."""
    store = storage.adapters()
    assert isinstance(store, BucketAdapterStore)
    store._deletions.bury(store._copies.whole(digest_of(2)))
    monkeypatch.setenv("SMOLORA_DATABASE_URL", postgres.url(postgres.new()))
    code, output = doctor("--rebuild")
    assert code == 0, output
    assert output.splitlines()[0] == "published again from the directories: a@1, a@2, b@1, mix@1"


def test_a_home_with_postgresql_is_checked_without_records(
    url: str, postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "home")
    engine = connect(home.path, url=url)
    home.adapters.mkdir(parents=True, exist_ok=True)
    agree(engine, Storage(home).place)
    with (store := Storage(home).adapters()).publishing(adapter := sample_adapter(0), lambda _: True) as num_bytes:
        version = Catalog(engine).publish(
            "a",
            digest=adapter.weights.digest,
            rank=adapter.config.rank,
            alpha=adapter.config.alpha,
            target_modules=adapter.weights.target_modules,
            parameters=adapter.weights.num_parameters,
            bytes=num_bytes,
        )
    engine.dispose()
    monkeypatch.setenv("SMOLORA_DATABASE_URL", url)
    monkeypatch.setenv("SMOLORA_HOME", str(home.path))
    assert doctor()[1].endswith("sound: 1 version, 1 stored adapter, 0 uploads checked\n")
    store.discard(version.digest)
    assert examine(home.path, url=url).findings[0].about == "a@1"
    monkeypatch.setenv("SMOLORA_DATABASE_URL", fresh := postgres.url(postgres.new()))
    code, output = doctor("--rebuild")
    assert code == 1
    assert "pg_restore" in output
    assert tables(fresh) == [], "pg_restore needs an empty database"


def test_an_examination_changes_no_object(storage: Storage, url: str, bucket: "Bucket") -> None:
    before = bucket.listed()
    assert examine(storage.home.path, bucket, url).is_sound
    assert bucket.listed() == before
    assert rebuild(storage.home.path, bucket, url).recovered.lines() == ()
    assert [replace(stored, modified=before[0].modified) for stored in bucket.listed()] == [
        replace(stored, modified=before[0].modified) for stored in before
    ]
