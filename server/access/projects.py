"""Projects and their limits. A project is created with its first key, or when its limits are set."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from adapters.catalog.tables import names
from adapters.errors import Conflict, Hint, InvalidInput, NotFound
from adapters.names import DEFAULT_PROJECT, project_fault, split_key
from adapters.sql import reader_of, transact
from server.access.audit import record
from server.access.principal import LIMITS, Quota
from server.access.tables import api_keys, changed, projects


@dataclass(frozen=True)
class Project:
    """A project's name, and the limits that its keys share."""

    name: str
    created_at: datetime  # in UTC
    quota: Quota

    def to_document(self) -> dict[str, object]:
        """Return a JSON-ready document. The quota's fields are at its top level, not nested."""
        return {"name": self.name, "created_at": self.created_at.isoformat(), **asdict(self.quota)}


class Projects:
    """All projects. Thread-safe; other processes may write the same tables."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._reader = reader_of(engine)

    def list(self) -> list[Project]:
        """Return all projects, by name."""
        with self._reader.connect() as connection:
            return [_project(row) for row in connection.execute(sa.select(projects).order_by("name")).mappings()]

    def get(self, name: str) -> Project:
        """Return the project. Raise NotFound if it doesn't exist."""
        with self._reader.connect() as connection:
            return _get(connection, name)

    def put(self, name: str, quota: Quota, *, who: str) -> Project:
        """Replace the project's limits. The project is created if it doesn't exist.

        `who` is for the audit log. Raise InvalidInput if the project's name is invalid.
        """
        if fault := project_fault(name):
            raise InvalidInput.of("project", fault)

        def work(connection: sa.Connection) -> Project:
            ensure(connection, name)
            connection.execute(sa.update(projects).where(projects.c.name == name).values(asdict(quota)))
            changed(connection)
            record(connection, who, "project.limit", name, name, asdict(quota))
            return _get(connection, name)

        return transact(self._engine, work)

    def delete(self, name: str, refuse: Callable[[], None], *, who: str) -> None:
        """Delete a project and revoke its keys.

        Revoked keys stay listed: if there were no keys, clients would need none.

        Raise NotFound if the project doesn't exist, or Conflict if it has adapters or is the default project.
        `refuse` must raise an error if anything else forbids the deletion, such as unfinished jobs.
        """
        if name == DEFAULT_PROJECT:
            raise Conflict("the project default is always there")
        self.get(name)
        refuse()

        def work(connection: sa.Connection) -> None:
            _get(connection, name)
            _refuse_with_adapters(connection, name)
            mine = sa.and_(api_keys.c.project == name, api_keys.c.revoked_at.is_(None))
            for key_id in connection.execute(sa.select(api_keys.c.id).where(mine)).scalars().all():
                record(connection, who, "key.revoke", name, key_id)
            connection.execute(sa.update(api_keys).where(mine).values(revoked_at=datetime.now(UTC)))
            connection.execute(sa.delete(projects).where(projects.c.name == name))
            changed(connection)
            record(connection, who, "project.delete", name, name)

        transact(self._engine, work)


def ensure(connection: sa.Connection, name: str) -> None:
    """Create the project, within the connection's transaction, if it doesn't exist."""
    if connection.execute(sa.select(projects.c.name).where(projects.c.name == name)).first() is None:
        connection.execute(sa.insert(projects).values(name=name, created_at=datetime.now(UTC)))


def quota_of(row: sa.RowMapping) -> Quota:
    """Return the limits in a row of a project or a key."""
    return Quota(**{name: row[name] for name in LIMITS})


def _get(connection: sa.Connection, name: str) -> Project:
    row = connection.execute(sa.select(projects).where(projects.c.name == name)).mappings().first()
    if row is None:
        hint = Hint("list_projects", "GET /projects lists them")
        raise NotFound(f"there is no project {name}: {hint}", hint=hint)
    return _project(row)


def _project(row: sa.RowMapping) -> Project:
    return Project(row["name"], row["created_at"], quota_of(row))


def _refuse_with_adapters(connection: sa.Connection, name: str) -> None:
    adapters = sa.select(names.c.name).where(names.c.project == name, names.c.latest.is_not(None))
    if found := list(connection.execute(adapters.limit(20)).scalars()):
        listed = ", ".join(split_key(key)[1] for key in found)
        raise Conflict(f"{name} has adapters: {listed}; delete them first")
