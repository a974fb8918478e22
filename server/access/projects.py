"""Projects and their limits. A project is created with its first key, or when its limits are set."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from adapters.catalog.records import Records
from adapters.catalog.tables import names
from adapters.errors import Conflict, Hint, InvalidInput, NotFound
from adapters.names import DEFAULT_PROJECT, MAX_NAME, project_fault, split_key
from adapters.sql import reader_of, transact
from server.access.audit import record
from server.access.managers import exceeding, require_manager
from server.access.principal import LIMITS, Principal, Quota
from server.access.tables import api_keys, audit, changed, projects, usage

RETIRED = "~"
"""Begins the last part of the name under which a deleted project's history is kept. No project's name has it."""

RetireJobs = Callable[[sa.Connection, str, str], None]
"""Renames the project of jobs, from one name to another. Raises Conflict if one of them hasn't ended."""


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
            values = {**asdict(quota), "ceiling": None}
            connection.execute(sa.update(projects).where(projects.c.name == name).values(values))
            changed(connection)
            record(connection, who, "project.limit", name, name, asdict(quota))
            return _get(connection, name)

        return transact(self._engine, work)

    def change(
        self, name: str, limits: Mapping[str, int | None], *, who: str, manager: Principal | None = None
    ) -> Project:
        """Change only the given limits of the project. If this changes nothing, nothing is recorded.

        A `manager` can set limits up to the operator's; None restores the operator's. `who` is for the audit log.
        Raise NotFound if the project doesn't exist, InvalidInput if a limit is above the operator's, and Forbidden
        if the manager's key is no longer valid.
        """

        def work(connection: sa.Connection) -> Project:
            require_manager(connection, manager)
            mine = projects.c.name == name
            quota = (old := _get(connection, name)).quota
            ceiling = connection.execute(sa.select(projects.c.ceiling).where(mine)).scalar_one()
            operators = old_operators = quota if ceiling is None else quota.with_limits(ceiling)
            if manager is None:
                operators, quota = operators.with_limits(limits), quota.with_limits(limits)
            else:
                if faults := list(exceeding(limits, operators, "the operator's limit")):
                    raise InvalidInput(faults)
                given = {key: getattr(operators, key) if value is None else value for key, value in limits.items()}
                quota = quota.with_limits(given)
            if (quota, operators) == (old.quota, old_operators):
                return old
            values = {**asdict(quota), "ceiling": None if quota == operators else asdict(operators)}
            connection.execute(sa.update(projects).where(mine).values(values))
            changed(connection)
            record(connection, who, "project.limit", name, name, dict(limits))
            return _get(connection, name)

        return transact(self._engine, work)

    def delete(
        self, name: str, refuse: Callable[[], None], retire_jobs: RetireJobs, records: Records, *, who: str
    ) -> str:
        """Delete a project and revoke its keys. Return the name under which its history is kept.

        Its keys, jobs, usage and audit entries stay for the operator, under a name that no project can have. So a
        new project of the same name starts empty. `retire_jobs` renames its jobs' project. `records` are those of
        adapters' versions.

        Raise NotFound if the project doesn't exist, or Conflict if it has adapters or unfinished jobs, or is the
        default project.
        `refuse` must raise an error if anything else forbids the deletion, such as data sets.
        """
        if name == DEFAULT_PROJECT:
            raise Conflict("the project default is always there")
        self.get(name)
        refuse()
        records.reach(to_write=False)
        mark = f"{RETIRED}{secrets.token_hex(4)}"
        retired = name[: MAX_NAME - len(mark)] + mark

        def work(connection: sa.Connection) -> str:
            _get(connection, name)
            _refuse_with_adapters(connection, name)
            mine = sa.and_(api_keys.c.project == name, api_keys.c.revoked_at.is_(None))
            for key_id in connection.execute(sa.select(api_keys.c.id).where(mine)).scalars().all():
                record(connection, who, "key.revoke", name, key_id)
            connection.execute(sa.update(api_keys).where(mine).values(revoked_at=datetime.now(UTC)))
            connection.execute(sa.delete(projects).where(projects.c.name == name))
            # without versions: else a new project's adapters would continue the old numbers
            connection.execute(sa.delete(names).where(names.c.project == name))
            changed(connection)
            record(connection, who, "project.delete", name, name, {"history": retired})
            for table in (api_keys, usage, audit):
                connection.execute(sa.update(table).where(table.c.project == name).values(project=retired))
            retire_jobs(connection, name, retired)
            records.forget_project(name)
            return retired

        return transact(self._engine, work)


def ensure(connection: sa.Connection, name: str) -> None:
    """Create the project, within the connection's transaction, if it doesn't exist."""
    if connection.execute(sa.select(projects.c.name).where(projects.c.name == name)).first() is None:
        connection.execute(sa.insert(projects).values(name=name, created_at=datetime.now(UTC)))


def require_project(connection: sa.Connection, name: str) -> None:
    """Raise Conflict, within the connection's transaction, if the project was deleted."""
    row = sa.select(projects.c.name).where(projects.c.name == name)
    if name != DEFAULT_PROJECT and connection.execute(row).first() is None:
        raise Conflict(f"the project {name} was deleted")


def quotas_in(connection: sa.Connection, project: str, key_id: str | None) -> tuple[Quota, Quota]:
    """Return the limits of a project and of a key, as they are now. Neither has to exist."""
    found = []
    for table, mine in ((projects, projects.c.name == project), (api_keys, api_keys.c.id == key_id)):
        row = connection.execute(sa.select(table).where(mine)).mappings().first()
        found.append(Quota() if row is None else quota_of(row))
    return found[0], found[1]


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
