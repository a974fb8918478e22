"""What a job publishes, at a moment when nobody looks: whether the name means it from then on.

`latest` stays where somebody moved it back by hand: a job that ends later must not undo that. And it stays where
the new version is worse than its untouched base, unless the one before is even worse.
"""

import sqlalchemy as sa

from adapters.catalog.reads import LATEST
from adapters.catalog.records import Recorder
from adapters.catalog.tables import lock, names
from adapters.catalog.versions import NewVersion, Version
from adapters.catalog.writes import one_version, publish_in
from adapters.viewpoint import split_key


def publish_unattended_in(
    connection: sa.Connection, new: NewVersion, alias: str | None, records: Recorder | None
) -> tuple[Version, str | None]:
    """Publish the version, and what a person should be told of it, if anything.

    `alias` then means it; "latest" as an alias moves that in any case. Within a transaction, as `publish_in`.
    """
    stays = None if alias == LATEST else _why_latest_stays(connection, new)
    version = publish_in(connection, new, alias, records, moves_latest=stays is None)
    name = split_key(new.name)[1]
    if stays is not None:
        return version, f"{stays}; PUT /adapters/{name}/aliases/latest moves it"
    if new.is_worse_than_base:
        return version, f"{name}@{version.version} is worse than the untouched base on the held-out rows"
    return version, None


def _why_latest_stays(connection: sa.Connection, new: NewVersion) -> str | None:
    """None where it doesn't. Locks the name."""
    lock(connection, new.name)
    row = connection.execute(sa.select(names).where(names.c.name == new.name)).first()
    if row is None or row.latest is None:
        return None
    if row.rolled_back:
        return f"latest stays at {row.latest}, where it was moved back to by hand"
    if not new.is_worse_than_base:
        return None
    latest = one_version(connection, new.name, row.latest)
    if latest.is_worse_than_base and new.metrics["eval_loss"] <= latest.metrics["eval_loss"]:
        return None
    return f"latest stays at {row.latest}: the new version is worse than the untouched base on the held-out rows"
