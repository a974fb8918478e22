"""Where a HOME's bytes are: in HOME alone, or in a bucket that many machines share, of which HOME is a cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.catalog.records import Records
from adapters.store.store import AdapterStore
from server.errors import StartupError, Unavailable
from server.home import Home
from server.shared import SharedSettings, Transport

if TYPE_CHECKING:
    from adapters.objects.bucket import Bucket


@dataclass(frozen=True)
class Storage:
    """A HOME, and the bucket if there is one: what is at a path below HOME has that path as its key."""

    home: Home
    bucket: "Bucket | None" = None
    cache_bytes: int | None = None

    @classmethod
    def open(cls, home: Path, settings: SharedSettings, *, check: bool = True) -> "Storage":
        """As the settings say; nothing of a bucket is imported where they name none. Raises StartupError where it
        can't be opened or, with `check`, be written to.
        """
        if settings.bytes_url is None:
            return cls(Home(home))
        where = "SMOLORA_BYTES_URL"
        try:
            from adapters.objects.bucket import Bucket
        except ImportError:
            raise StartupError(f"{where}: needs the extra `cluster`: pip install 'smolora[cluster]'") from None
        try:
            bucket = Bucket.open(settings.bytes_url, allow_http=Transport().allow_http)
            if check:
                bucket.now()  # writes, reads and removes
        except ValueError as error:
            raise StartupError(f"{where}: {error}") from None
        except Unavailable:
            raise StartupError(
                f"{where}: can't write there; check the address and AWS_ENDPOINT_URL, AWS_REGION, "
                "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and AWS_ALLOW_HTTP for http"
            ) from None
        return cls(Home(home), bucket, settings.bytes_cache)

    def adapters(self, grace: float = 0.0) -> AdapterStore:
        """The adapters' bytes. No request takes longer than `grace` seconds."""
        if self.bucket is None:
            return AdapterStore(self.home.adapters)
        from adapters.store.deletions import GRACE
        from adapters.store.shared import SharedAdapterStore

        under = self.bucket.under("adapters")
        return SharedAdapterStore(self.home.adapters, under, self.cache_bytes, max(grace, GRACE))

    def records(self) -> Records:
        """The catalog's records."""
        if self.bucket is None:
            return Records(self.home.adapters)
        from adapters.catalog.shared_records import SharedRecords

        return SharedRecords(self.home.adapters, self.bucket.under("adapters"))

    def at(self, path: Path) -> "Bucket | None":
        """What the bucket has of a folder of HOME."""
        return None if self.bucket is None else self.bucket.under(path.relative_to(self.home.path).as_posix())
