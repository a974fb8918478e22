"""The audit log: what operators and keys did, when, and by which request. Entries never change, and
RETAIN_AUDIT alone removes them.

If a request is being handled, its id and its client's address are added to every entry.
"""

import logging
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from adapters.errors import Unavailable
from adapters.sql import reader_of, transact
from server.access.principal import OF_SETTING, OPERATOR
from server.access.tables import MAX_ADDRESS, audit
from server.telemetry.logs import NO_REQUEST, request_id

REFUSED = "refused"
"""The action of an attempt that was answered with 401 or 403."""
_PRUNED_AT_ONCE = 1000

client_address: ContextVar[str | None] = ContextVar("client_address", default=None)
"""The address of the client whose request is being handled, or None."""

log = logging.getLogger("smolora.access")


@dataclass(frozen=True)
class Entry:
    """An entry of the log.

    `who` is a key's id, "env-…" for one of API_KEYS, "command-line", "anonymous", or "unknown" for a wrong key.
    """

    number: int
    at: datetime  # in UTC
    who: str
    action: str  # such as "key.revoke"
    project: str  # the project that `target` belongs to
    target: str
    detail: Mapping[str, object]
    address: str | None  # of the client; None if it was no request
    request_id: str | None


def record(
    connection: sa.Connection,
    who: str,
    action: str,
    project: str,
    target: str,
    detail: Mapping[str, object] | None = None,
) -> None:
    """Add an entry that describes a change, in the same transaction as the change."""
    address, request = client_address.get(), request_id.get()
    row = {
        "at": datetime.now(UTC),
        "who": who,
        "action": action,
        "project": project,
        "target": target,
        "detail": dict(detail or {}),
        "address": None if address is None else address[:MAX_ADDRESS],
        "request_id": None if request == NO_REQUEST else request,
    }
    connection.execute(sa.insert(audit).values(row))


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

    def prune(self, before: datetime) -> int:
        """Remove all entries from before that time, and return their number.

        Each transaction removes few of them, so that other writers don't wait.
        """
        with self._reader.connect() as connection:
            newest = connection.execute(sa.select(sa.func.max(audit.c.number)).where(audit.c.at < before)).scalar()
        old = sa.select(audit.c.number).where(audit.c.number <= (newest or 0)).order_by(audit.c.number)
        removal = sa.delete(audit).where(audit.c.number.in_(old.limit(_PRUNED_AT_ONCE).scalar_subquery()))
        num_removed = 0
        while removed := transact(self._engine, lambda connection: connection.execute(removal).rowcount):
            num_removed += removed
        return num_removed

    def list(
        self,
        limit: int,
        before: int | None = None,
        *,
        project: str | None = None,
        who: str | None = None,
        action: str | None = None,
        since: datetime | None = None,
        hidden: Collection[str] | None = None,
    ) -> list[Entry]:
        """Return at most `limit` entries that meet the given conditions, the newest first.

        If `before` is given, only entries with a lower number are included. For a manager, `hidden` must have the
        ids of operators' keys. Entries about these keys are then left out, and what operators did has "operator"
        as `who`, and neither address nor request id.
        """
        columns: dict[str, sa.ColumnElement[object]] = {column.name: column for column in audit.c}
        if hidden is not None:
            is_operators = sa.or_(
                audit.c.who.in_(hidden), audit.c.who == OPERATOR, audit.c.who.startswith(OF_SETTING)
            )
            columns["who"] = sa.case((is_operators, "operator"), else_=audit.c.who)
            for name in ("address", "request_id"):
                columns[name] = sa.case((is_operators, None), else_=audit.c[name])
        query = sa.select(*(column.label(name) for name, column in columns.items()))
        query = query.order_by(audit.c.number.desc()).limit(limit)
        if hidden:
            query = query.where(audit.c.target.not_in(hidden))
        for column, value in ((audit.c.project, project), (columns["who"], who), (audit.c.action, action)):
            if value is not None:
                query = query.where(column == value)
        if since is not None:
            query = query.where(audit.c.at >= since)
        if before is not None:
            query = query.where(audit.c.number < before)
        with self._reader.connect() as connection:
            return [Entry(**row) for row in connection.execute(query).mappings()]
