"""Where a HOME's bytes are: in HOME alone, or in a bucket that many machines share, of which HOME is a cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.catalog.records import Records
from adapters.storage.durable import new_file
from server.config import BucketSettings, StorageSettings
from server.errors import StartupError, Unavailable
from server.storage.home import PLACES, PROJECTS, Home

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket
    from adapters.store.store import AdapterStore


@dataclass(frozen=True)
class Storage:
    """A HOME, and the bucket if there is one: what is at a path below HOME has that path as its key."""

    home: Home
    bucket: "Bucket | None" = None
    cache_bytes: int | None = None
    url: str | None = None  # the bucket's

    @classmethod
    def open(cls, home: Path, settings: StorageSettings, *, check: bool = True) -> "Storage":
        """As the settings say; nothing of a bucket is imported where they name none. Raises StartupError where it
        can't be opened or, with `check`, be written to.
        """
        if settings.bytes_url is None:
            return cls(Home(home))
        where = "SMOLORA_BYTES_URL"
        try:
            from adapters.storage.bucket import Bucket
        except ImportError:
            install = "pip install -e '.[cluster]' in smolora's folder"
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
        """Where the bytes are, as `server.database.agree` asks."""
        return Place(self.home, self.bucket, self.url or "")

    def adapters(self, grace: float = 0.0) -> "AdapterStore":
        """The adapters' bytes. No request takes longer than `grace` seconds."""
        if self.bucket is None:
            from adapters.store.store import AdapterStore  # brings torch, which a worker doesn't need

            return AdapterStore(self.home.adapters)
        from adapters.store.bucket_store import GRACE, SharedAdapterStore

        under = self.bucket.under("adapters")
        return SharedAdapterStore(self.home.adapters, under, self.cache_bytes, max(grace, GRACE))

    def records(self) -> Records:
        """The catalog's records."""
        if self.bucket is None:
            return Records(self.home.adapters)
        from adapters.catalog.records import SharedRecords

        return SharedRecords(self.home.adapters, self.bucket.under("adapters"))

    def projects(self) -> list[str]:
        """Those that may have uploaded something, on any machine. Raises BytesUnavailable."""
        found = self.home.projects()
        others = [] if self.bucket is None else self.bucket.under(PROJECTS).folders()
        return [*found, *(project for project in others if project not in found)]

    def at(self, path: Path) -> "Bucket | None":
        """What the bucket has of a folder of HOME."""
        return None if self.bucket is None else self.bucket.under(path.relative_to(self.home.path).as_posix())


@dataclass(frozen=True)
class Place:
    """Where bytes are: HOME, or a bucket; marks are empty files, or objects, below `places`."""

    home: Home
    bucket: "Bucket | None"
    url: str

    @property
    def is_home(self) -> bool:
        return self.bucket is None

    @property
    def told(self) -> str:
        return str(self.home.path.absolute()) if self.bucket is None else self.url

    def has_mark(self, place: str) -> bool:
        """Whether the place is the one of that id. Raises BytesUnavailable."""
        if self.bucket is None:
            return (self.home.places / place).exists()
        return any(stored.key == f"{PLACES}/{place}" for stored in self.bucket.listed(f"{PLACES}/"))

    def mark(self, place: str) -> None:
        """Have it be that one, too. Raises OSError, BytesUnavailable."""
        if self.bucket is not None:
            self.bucket.put(f"{PLACES}/{place}", b"")
            return
        self.home.places.mkdir(parents=True, exist_ok=True)
        with new_file(self.home.places / place):
            pass
