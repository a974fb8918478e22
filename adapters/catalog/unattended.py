"""What a job publishes, at a moment when nobody looks: whether the name means it from then on.

`latest` stays where somebody moved it back by hand: a job that ends later must not undo that. And it stays where
the new version is worse than its untouched base, unless the one before is even worse.
"""

from typing import Any

import sqlalchemy as sa

from adapters.catalog.reads import LATEST
from adapters.catalog.records import Recorder
from adapters.catalog.tables import lock, names
from adapters.catalog.versions import NewVersion, Version
from adapters.catalog.writes import one_version, publish_in
from adapters.errors import TryAgain
from adapters.viewpoint import split_key


class LatestMoved(TryAgain):
    """`latest` is another version than the one that the new version was found better than."""

    default_message = "the name's latest version is another one by now: compare the new one with that"


def publish_unattended_in(
    connection: sa.Connection,
    new: NewVersion,
    alias: str | None,
    records: Recorder | None,
    better_than: int | None = None,
) -> tuple[Version, str | None]:
    """Publish the version, and what a person should be told of it, if anything.

    `alias` then means it; "latest" as an alias moves that in any case. Within a transaction, as `publish_in`.
    Raises LatestMoved unless `latest` is the version `better_than` (0: there is none); None: whichever it is.
    """
    lock(connection, new.name)
    has_latest = (names.c.name == new.name, names.c.latest.is_not(None))
    row = connection.execute(sa.select(names).where(*has_latest)).first()
    if better_than is not None and better_than != (0 if row is None else row.latest):
        raise LatestMoved
    stays = None if row is None or alias == LATEST else _why_latest_stays(connection, new, row)
    version = publish_in(connection, new, alias, records, moves_latest=stays is None)
    name = split_key(new.name)[1]
    if stays is not None:
        return version, f"{stays}; PUT /adapters/{name}/aliases/latest moves it"
    if new.is_worse_than_base:
        return version, f"{name}@{version.version} is worse than the untouched base on the held-out rows"
    return version, None


def _why_latest_stays(connection: sa.Connection, new: NewVersion, row: sa.Row[Any]) -> str | None:
    """None where it doesn't. `row` is the name's."""
    if row.rolled_back:
        return f"latest stays at {row.latest}, where it was moved back to by hand"
    if not new.is_worse_than_base:
        return None
    latest = one_version(connection, new.name, row.latest)
    if latest.is_worse_than_base and new.metrics["eval_loss"] <= latest.metrics["eval_loss"]:
        return None
    return f"latest stays at {row.latest}: the new version is worse than the untouched base on the held-out rows"
