"""What moves: the tables, and the bytes that their rows name."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy as sa

from adapters.catalog import tables as catalog
from adapters.catalog.catalog import Catalog
from adapters.errors import CorruptAdapter, Unavailable
from adapters.objects.bucket import Missing
from adapters.viewpoint import Viewpoint
from server.access import tables as access
from server.errors import StartupError
from server.training.queue import tables as queue
from server.training.queue.moving import used_by_unended, with_folders
from server.training.queue.tables import Status

TABLES = [
    table
    for metadata in (catalog.metadata, access.metadata, queue.metadata)
    for table in metadata.sorted_tables
    if table is not access.changes  # of which every database has its own
]
"""In an order in which each may be filled."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Moved:
    """What was moved. `going_on` are the jobs that a worker had when it ended."""

    num_versions: int
    num_adapters: int
    num_jobs: int
    num_unended_jobs: int
    num_uploads: int  # data sets and files
    num_rows: int
    going_on: tuple[str, ...]
    damaged: tuple[str, ...] = ()  # uploads that were so before, and are as they were


@dataclass(frozen=True)
class Needs:
    """What the rows name: adapters by digest, and the jobs that have files."""

    num_versions: int
    digests: tuple[str, ...]
    jobs: dict[str, Status]

    @classmethod
    def of(cls, engine: sa.Engine) -> "Needs":
        """Those of a database."""
        listed = Catalog(engine, of=Viewpoint(sees_all=True)).list()
        versions = [version for adapter in listed for version in adapter.versions]
        digests = {version.digest for version in versions if not version.parts}
        digests.update(used for _, used in used_by_unended(engine) if _DIGEST.fullmatch(used))
        return cls(len(versions), tuple(sorted(digests)), with_folders(engine))

    def moved(self, num_uploads: int, num_rows: int, going_on: list[str]) -> Moved:
        """All of it was."""
        return Moved(
            num_versions=self.num_versions,
            num_adapters=len(self.digests),
            num_jobs=len(self.jobs),
            num_unended_jobs=sum(not status.has_ended for status in self.jobs.values()),
            num_uploads=num_uploads,
            num_rows=num_rows,
            going_on=tuple(going_on),
        )


@contextmanager
def told() -> Iterator[None]:
    """A block whose faults are one line for the person at the terminal, as StartupError."""
    try:
        yield
    except CorruptAdapter as error:
        raise StartupError(f"{error}: smolora doctor says which versions that are; delete them first") from None
    except (Unavailable, Missing) as error:
        raise StartupError(f"{error}: run it again") from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise StartupError(f"{where}{error.strerror or error}") from None
