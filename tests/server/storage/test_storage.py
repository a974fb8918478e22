"""The place of bytes is a setting. Without it, no object store's library is imported."""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from adapters.catalog.records import Records
from adapters.store.store import AdapterStore
from server.config import Settings, StorageSettings, load
from server.errors import StartupError
from server.storage.places import Storage

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

STARTS = """
import sys
import server.api.app, server.cli.main, server.operations.doctor, server.serve.startup, server.jobs.run_job
from pathlib import Path
from server.config import StorageSettings
from server.storage.places import Storage
storage = Storage.open(Path(sys.argv[1]), StorageSettings())
storage.adapters(), storage.records()
ours = [name for name in sys.modules if name.startswith(("adapters.", "server.", "obstore"))]
print([name for name in ours if name.startswith(("obstore", "adapters.storage.bucket"))
       or name.endswith("bucket_store")])
"""


def test_by_default_bytes_are_in_home_and_no_bucket_is_imported(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path, StorageSettings())
    assert type(storage.adapters()) is AdapterStore
    assert type(storage.records()) is Records
    assert storage.at(storage.home.datasets("acme")) is None
    command = [sys.executable, "-c", STARTS, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    "url", ["a-bucket", "s3://B/x", "http://host/bucket", "s3://key:secret@bucket/x", "file://x/y"]
)
def test_malformed_urls_are_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(StartupError, match="BYTES_URL") as caught:
        load(Settings, bytes_url=url)
    assert url not in str(caught.value)


def test_a_bucket_needs_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adapters.storage.bucket", None)
    with pytest.raises(StartupError, match=r"pip install -e '\.\[cluster\]'"):
        Storage.open(tmp_path, StorageSettings(bytes_url="s3://some-bucket/x"))


@pytest.mark.cluster
def test_keys_are_paths_below_home(tmp_path: Path, bucket: "Bucket") -> None:
    from server.storage.home import Home

    storage = Storage(Home(tmp_path), bucket)
    for path in (storage.home.datasets("acme"), storage.home.files("default"), storage.home.adapters):
        place = storage.at(path)
        assert place is not None
        place.put("x", b"")
    assert [stored.key for stored in bucket.listed()] == ["adapters/x", "files/x", "projects/acme/datasets/x"]


@pytest.mark.cluster
def test_a_mounted_directory_works_as_a_bucket(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    settings = load(Settings, bytes_url=f"file://{tmp_path}/shared")
    from tests.adapters.samples import sample_adapter

    adapter = sample_adapter()
    a, b = (Storage.open(tmp_path / name, settings).adapters() for name in "ab")
    with a.publishing(adapter, lambda _: True):
        pass
    b.verify(adapter.weights.digest)
    assert b.is_in_bucket
