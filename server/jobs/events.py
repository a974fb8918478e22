"""The events of a job, in order: messages for users, and the metrics of steps."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import sqlalchemy as sa

from adapters.errors import FieldError, InvalidInput
from server.database.clock import database_now
from server.jobs.tables import events, jobs

Level = Literal["info", "warning", "error"]
EventType = Literal["message", "metrics"]
SAMPLES = "samples"
"""The key in `Event.data` for the answers to a training job's samples."""


@dataclass(frozen=True)
class Event:
    """An event of a job. `seq` numbers the job's events from 1, without gaps."""

    seq: int
    at: datetime  # in UTC
    level: Level
    type: EventType
    message: str
    data: Mapping[str, object]


def append(
    connection: sa.Connection,
    job_id: str,
    message: str,
    *,
    level: Level = "info",
    type: EventType = "message",  # noqa: A002 as in Event and in the API
    data: Mapping[str, object] | None = None,
) -> None:
    """Add an event to a job within the caller's transaction, which must have written or locked the job's row."""
    mine = jobs.c.id == job_id
    connection.execute(sa.update(jobs).where(mine).values(num_events=jobs.c.num_events + 1))
    seq = connection.execute(sa.select(jobs.c.num_events).where(mine)).scalar_one()
    row = {"seq": seq, "at": database_now(), "level": level, "type": type, "message": without_nul(message)}
    connection.execute(sa.insert(events).values(row | {"job_id": job_id, "data": plain(data or {})}))


def without_nul(text: str) -> str:
    """Return the text with U+FFFD instead of NUL characters, since PostgreSQL can't store them."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def read(connection: sa.Connection, job_id: str, after: int, limit: int) -> list[Event]:
    """Return at most `limit` of the job's events with a `seq` above `after`, in order."""
    columns = [column for column in events.columns if column is not events.c.job_id]
    query = sa.select(*columns).where(events.c.job_id == job_id, events.c.seq > after)
    rows = connection.execute(query.order_by(events.c.seq).limit(limit)).mappings()
    return [Event(**row) for row in rows]


def remove_samples(connection: sa.Connection, job_id: str) -> None:
    """Remove the samples, which quote held-out rows, from the job's events, within the caller's transaction."""
    mine = sa.and_(events.c.job_id == job_id, events.c.data[SAMPLES].as_string().is_not(None))
    for seq, data in connection.execute(sa.select(events.c.seq, events.c.data).where(mine)).all():
        rest = {key: value for key, value in data.items() if key != SAMPLES}
        this = sa.and_(events.c.job_id == job_id, events.c.seq == seq)
        connection.execute(sa.update(events).where(this).values(data=rest))


def storable(document: Mapping[str, object], field: str) -> Mapping[str, object]:
    """Return the document. Raise InvalidInput if it has NUL characters, which PostgreSQL can't store.

    `field` is the document's name in the error.
    """
    if "\\u0000" in json.dumps(document) and (place := _place_of_nul(document)) is not None:
        raise InvalidInput([FieldError((field, *place), "must not have NUL characters")])
    return document


def _place_of_nul(value: object) -> tuple[str, ...] | None:
    """Return the names of the fields that lead to the first NUL character, or None if there is no NUL."""
    if isinstance(value, str):
        return () if "\0" in value else None
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if "\0" in name:
                return ()
            if (place := _place_of_nul(inner)) is not None:
                return (name, *place)
    if isinstance(value, list | tuple):
        return next((place for inner in value if (place := _place_of_nul(inner)) is not None), None)
    return None


def plain(document: Mapping[str, object]) -> dict[str, object]:
    """Return a copy with JSON's types only. Raise ValueError if a number is NaN or infinite."""
    copy: dict[str, object] = json.loads(json.dumps(document, allow_nan=False))
    return copy
