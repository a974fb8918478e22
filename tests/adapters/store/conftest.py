"""A store of each kind, and the adapter that its tests put."""

from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.store.store import AdapterStore
from tests.adapters.samples import sample_adapter
from tests.kits.buckets import EITHER

ADAPTER = sample_adapter()
DIGEST = ADAPTER.weights.digest

OpenStore = Callable[[], AdapterStore]


@pytest.fixture(params=EITHER)
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    """Open the store under `tmp_path`, as each process does: a directory, or one machine's cache of a bucket."""
    if request.param == "directory":
        return lambda: AdapterStore(tmp_path / "adapters")
    bucket = request.getfixturevalue("bucket")
    from adapters.store.bucket_store import BucketAdapterStore

    return lambda: BucketAdapterStore(tmp_path / "adapters", bucket.under("adapters"))


@pytest.fixture
def store(open_store: OpenStore) -> AdapterStore:
    return open_store()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return the folder of `ADAPTER`."""
    return tmp_path / "adapters" / DIGEST[:2] / DIGEST
