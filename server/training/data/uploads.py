"""All data sets and files that a HOME, or its bucket, has: read whole, and compared with their digests."""

from collections.abc import Iterator

from adapters.errors import NotFound
from server.storage import Storage
from server.training.data.datasets import CorruptDataset, DatasetStore
from server.training.data.files import CorruptFile, FileStore


def checked_uploads(storage: Storage) -> Iterator[tuple[str, str | None]]:
    """Where each is, from HOME, and what is wrong with it, and mends it; None: nothing is."""
    home = storage.home
    for project in storage.projects():
        datasets, files = home.datasets(project), home.files(project)
        for root, store, remedy in (
            (datasets, DatasetStore(datasets, bucket=storage.at(datasets)), "delete it, or upload the same rows"),
            (files, FileStore(files, bucket=storage.at(files)), "delete it"),
        ):
            for upload in sorted(store.ids()):
                place = (root / upload).relative_to(home.path).as_posix()
                try:
                    store.verify(upload)
                except NotFound:  # it was deleted just now
                    continue
                except (CorruptDataset, CorruptFile) as error:
                    yield place, f"{error}: {remedy}" if store.has(upload) else None
                else:
                    yield place, None
