"""Where adapters, data sets, files and jobs' folders are stored.

They are in HOME only, or in a bucket that several machines use. With a bucket, each machine has a HOME as cache.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.catalog.records import Records
from adapters.storage.blobs import Blobs, Directory
from server.config import BucketSettings, StorageSettings
from server.errors import StartupError, Unavailable
from server.storage.home import PLACES, PROJECTS, Home

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket
    from adapters.store.store import AdapterStore


@dataclass(frozen=True)
class Storage:
    """A HOME, and the bucket if there is one. The keys in the bucket are paths below HOME."""

    home: Home
    bucket: "Bucket | None" = None
    cache_bytes: int | None = None
    url: str | None = None  # of the bucket

    @classmethod
    def open(cls, home: Path, settings: StorageSettings, *, check: bool = True) -> "Storage":
        """Open the storage that the settings name. The bucket's library is imported only if they name a bucket.

        Raise StartupError if the bucket can't be opened or, with `check`, written to.
        """
        if settings.bytes_url is None:
            return cls(Home(home))
        where = "SMOLORA_BYTES_URL"
        try:
            from adapters.storage.bucket import Bucket
        except ImportError:
            install = ".venv/bin/pip install -e '.[cluster]' in smolora's folder"
            raise StartupError(f"{where}: needs the extra `cluster`: {install}") from None
        try:
            bucket = Bucket.open(settings.bytes_url, allow_http=BucketSettings().allow_http)
            if check:
                bucket.now()  # writes, reads and removes
        except ValueError as error:
            raise StartupError(f"{where}: {error}") from None
        except Unavailable:
            raise StartupError(
                f"{where}: can't write there; check the address and AWS_ENDPOINT_URL, AWS_REGION, "
                "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and AWS_ALLOW_HTTP for http"
            ) from None
        return cls(Home(home), bucket, settings.bytes_cache, settings.bytes_url)

    @property
    def place(self) -> "Place":
        """The HOME or bucket that has the stored bytes, for a check by `server.database.agree`."""
        if self.bucket is None:
            return Place(Directory(self.home.path), is_home=True, url=str(self.home.path.absolute()))
        return Place(self.bucket, is_home=False, url=self.url or "")

    def adapters(self, grace: float = 0.0) -> "AdapterStore":
        """Open the store of the adapters' bytes.

        A bucket keeps deleted bytes for another `grace` seconds, and at least an hour. The caller's requests
        must be shorter.
        """
        if self.bucket is None:
            from adapters.store.store import AdapterStore  # imports torch, which a worker doesn't need

            return AdapterStore(self.home.adapters)
        from adapters.store.bucket_store import GRACE, BucketAdapterStore

        under = self.bucket.under("adapters")
        return BucketAdapterStore(self.home.adapters, under, self.cache_bytes, max(grace, GRACE))

    def records(self) -> Records:
        """Open the records of adapters' versions, from which a lost catalog is rebuilt."""
        return Records(self.home.adapters, self.at(self.home.adapters))

    def projects(self) -> list[str]:
        """Return the projects that may have uploads, on any machine.

        Raise BytesUnavailable if the bucket can't be read.
        """
        found = self.home.projects()
        others = [] if self.bucket is None else self.bucket.under(PROJECTS).folders()
        return [*found, *(project for project in others if project not in found)]

    def at(self, path: Path) -> "Bucket | None":
        """Return the part of the bucket that corresponds to a folder of HOME, or None without a bucket."""
        return None if self.bucket is None else self.bucket.under(path.relative_to(self.home.path).as_posix())


@dataclass(frozen=True)
class Place:
    """The HOME or bucket with the bytes that a database's rows name. `url` is its address or path.

    The HOME or bucket is identified by markers: empty files or objects in its folder `places`. A marker's name is
    an id that the database stores, too.
    """

    blobs: Blobs
    is_home: bool
    url: str

    def has_mark(self, place: str) -> bool:
        """Return whether this HOME or bucket has a marker whose name is the id `place`.

        A database stores the id of the HOME or bucket that it belongs to. Raise BytesUnavailable if the bucket
        can't be read.
        """
        return f"{PLACES}/{place}" in self.blobs.keys(f"{PLACES}/")

    def mark(self, place: str) -> None:
        """Add a marker, an empty file or object whose name is the id `place`, to this HOME or bucket.

        Raise OSError or BytesUnavailable if the marker can't be written.
        """
        self.blobs.put(f"{PLACES}/{place}", b"")
