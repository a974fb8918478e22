"""The audit log: what operators and keys did, and when. Entries never change."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from adapters.errors import Unavailable
from adapters.sql import reader_of, transact
from server.access.tables import audit

log = logging.getLogger("smolora.access")


@dataclass(frozen=True)
class Entry:
    """An entry of the log. `who` is a key's id, "command-line", "anonymous", or "env-…" for one of API_KEYS."""

    number: int
    at: datetime  # in UTC
    who: str
    action: str  # such as "key.revoke"
    project: str  # the project that `target` belongs to
    target: str
    detail: Mapping[str, object]


def record(
    connection: sa.Connection,
    who: str,
    action: str,
    project: str,
    target: str,
    detail: Mapping[str, object] | None = None,
) -> None:
    """Add an entry that describes a change, in the same transaction as the change."""
    row = {"at": datetime.now(UTC), "who": who, "action": action, "project": project, "target": target}
    connection.execute(sa.insert(audit).values(row | {"detail": dict(detail or {})}))


class Audit:
    """The audit log. Thread-safe."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._reader = reader_of(engine)

    def add(
        self, who: str, action: str, project: str, target: str, detail: Mapping[str, object] | None = None
    ) -> None:
        """Record, in a transaction of its own, a change that has already been made.

        If the database fails, write the entry to the server's log instead of raising: the change is made and must
        not seem to have failed.
        """
        try:
            transact(self._engine, lambda connection: record(connection, who, action, project, target, detail))
        except (DBAPIError, Unavailable):
            log.error("not on the audit list: %s did %s of %s in %s", who, action, ascii(target), project)

    def list(self, limit: int, before: int | None = None) -> list[Entry]:
        """Return at most `limit` entries, the newest first.

        If `before` is given, only entries with a lower number are included.
        """
        query = sa.select(audit).order_by(audit.c.number.desc()).limit(limit)
        if before is not None:
            query = query.where(audit.c.number < before)
        with self._reader.connect() as connection:
            return [Entry(**row) for row in connection.execute(query).mappings()]
