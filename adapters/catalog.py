"""Names, versions and aliases of adapters, in tables of their own over an Engine that is given.

Every write is one transaction, done again if it clashes with another's; every read is one statement. The SQL is
what SQLite and PostgreSQL have in common. The bytes are the store's: here they are digests only.
"""

import builtins
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

import sqlalchemy as sa

from adapters.catalog_tables import aliases, metadata, names, transact, versions
from adapters.errors import Conflict, InvalidInput, NotFound
from adapters.expression import MAX_NAME, Term, valid_name
from adapters.versions import Adapter, NewVersion, Part, Version, combine

__all__ = ["Adapter", "Catalog", "NewVersion", "Part", "Version", "combine", "metadata", "publish_in"]

LATEST = "latest"
MAX_VERSION = 2**31 - 1


class Catalog:
    """All adapters by name. Thread-safe; other processes may write the same tables."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        # A read is one statement, so it needs no transaction around it.
        self._reader = engine.execution_options(isolation_level="AUTOCOMMIT")

    def publish(
        self,
        name: str,
        *,
        digest: str,
        rank: int,
        alpha: float,
        target_modules: Sequence[str],
        parameters: int,
        bytes: int,  # noqa: A002 as in Version and in the API
        base_model: str | None = None,
        metrics: Mapping[str, float] | None = None,
        parent: str | None = None,
        job_id: str | None = None,
        warnings: Sequence[str] = (),
    ) -> Version:
        """Adds the next version of `name`, which may be new, and makes it the latest. InvalidInput: a bad name."""
        new = NewVersion(
            name=name,
            digest=digest,
            rank=rank,
            alpha=float(alpha),
            target_modules=tuple(target_modules),
            parameters=parameters,
            bytes=bytes,
            base_model=base_model,
            metrics=dict(metrics or {}),
            parent=parent,
            job_id=job_id,
            warnings=tuple(warnings),
        )
        return transact(self._engine, lambda connection: publish_in(connection, new))

    def list(self, name: str | None = None, limit: int | None = None, after: str | None = None) -> list[Adapter]:
        """Adapters by name: the one called `name` or all, at most `limit`, those after the name `after`."""
        chosen = sa.select(names.c.name).where(names.c.latest.is_not(None)).order_by(names.c.name).limit(limit)
        if name is not None:
            chosen = chosen.where(names.c.name == name)
        if after is not None:
            chosen = chosen.where(names.c.name > after)
        query = (
            sa.select(versions, names.c.latest, aliases.c.alias)
            .where(versions.c.name.in_(chosen))
            .join(names, names.c.name == versions.c.name)
            .outerjoin(
                aliases, sa.and_(aliases.c.name == versions.c.name, aliases.c.version == versions.c.version)
            )
            .order_by(versions.c.name, versions.c.version, aliases.c.alias)
        )
        with self._reader.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return _adapters(rows)

    def get(self, name: str) -> Adapter:
        """The adapter called `name`. Raises NotFound."""
        found = self.list(name)
        if not found:
            raise NotFound(f"no adapter is called '{name}'")
        return found[0]

    def version(self, name: str, version: int) -> Version:
        """One version. Raises NotFound."""
        if version <= MAX_VERSION:
            query = sa.select(versions).where(versions.c.name == name, versions.c.version == version)
            with self._reader.connect() as connection:
                row = connection.execute(query).mappings().one_or_none()
            if row is not None:
                return _version(row)
        raise NotFound(f"'{name}' has no version {version}")

    def resolve(self, terms: Sequence[Term]) -> tuple[Part, ...]:
        """The version that each term means at this moment, in the order of the terms, by one indexed query.

        Raises NotFound, naming every term that means none.
        """
        if not terms:
            return ()
        known = [(place, term) for place, term in enumerate(terms) if (term.version or 0) <= MAX_VERSION]
        rows: dict[int, tuple[int, str]] = {}
        if known:
            query = sa.union_all(*(_lookup(place, term) for place, term in known))
            with self._reader.connect() as connection:
                rows = {row.place: (row.version, row.digest) for row in connection.execute(query)}
        missing = [term.reference for place, term in enumerate(terms) if place not in rows]
        if missing:
            raise NotFound(f"no such adapter, version or alias: {', '.join(dict.fromkeys(missing))}")
        return tuple(Part(term.name, *rows[place], term.weight) for place, term in enumerate(terms))

    def delete(self, name: str) -> builtins.list[str]:
        """Removes all versions of `name`; returns the digests that no version has any more.

        Raises NotFound, or Conflict where an alias holds one of them.
        """

        def write(connection: sa.Connection) -> builtins.list[str]:
            _lock(connection, name)
            return _drop(connection, name, versions.c.name == name)

        return transact(self._engine, write)

    def delete_version(self, name: str, version: int) -> builtins.list[str]:
        """Removes one version; if it was the latest, the highest left becomes it. Otherwise as `delete`."""

        def write(connection: sa.Connection) -> builtins.list[str]:
            _lock(connection, name)
            return _drop(connection, name, sa.and_(versions.c.name == name, versions.c.version == version))

        if version > MAX_VERSION:
            raise NotFound(f"'{name}' has no version {version}")
        return transact(self._engine, write)

    def in_use(self, digest: str) -> bool:
        """Whether any version has this digest."""
        query = sa.select(versions.c.digest).where(versions.c.digest == digest).limit(1)
        with self._reader.connect() as connection:
            return connection.execute(query).first() is not None


def publish_in(connection: sa.Connection, new: NewVersion, alias: str | None = None) -> Version:
    """As `Catalog.publish`, within a transaction that `transact` began; `alias` then means the version, too."""
    if not valid_name(new.name):
        message = f"1 to {MAX_NAME} letters, digits, '_', '-' or '.', a letter or digit first; not 'base'"
        raise InvalidInput.of("name", message)
    if not all(map(math.isfinite, new.metrics.values())):
        raise ValueError("metrics must be finite")
    mine = names.c.name == new.name
    counted = sa.update(names).where(mine).values(next_version=names.c.next_version + 1)
    if connection.execute(counted).rowcount == 0:
        connection.execute(sa.insert(names).values(name=new.name, kind="adapter", next_version=2))
    number = connection.execute(sa.select(names.c.next_version).where(mine)).scalar_one() - 1
    version = Version(**vars(new), version=number, created_at=datetime.now(UTC))
    row = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(version).items()}
    connection.execute(sa.insert(versions).values(row))
    connection.execute(sa.update(names).where(mine).values(latest=number))
    if alias is not None and alias != LATEST:
        _point(connection, new.name, alias, number)
    return version


def _point(connection: sa.Connection, name: str, alias: str, version: int) -> None:
    """Makes the alias of `name` mean the version, whatever it meant before."""
    moved = sa.update(aliases).where(aliases.c.name == name, aliases.c.alias == alias).values(version=version)
    if connection.execute(moved).rowcount == 0:
        connection.execute(sa.insert(aliases).values(name=name, alias=alias, version=version))


def _lookup(place: int, term: Term) -> "sa.Select[int, int, str]":
    """One row, (place, version, digest), if the term means a version."""
    here = sa.literal_column(str(place), sa.Integer).label("place")
    query = sa.select(here, versions.c.version, versions.c.digest)
    query = query.where(versions.c.name == term.name)
    if term.version is not None:
        return query.where(versions.c.version == term.version)
    table, means = (names, names.c.latest) if term.alias in (None, LATEST) else (aliases, aliases.c.version)
    query = query.join(table, sa.and_(table.c.name == versions.c.name, means == versions.c.version))
    return query if table is names else query.where(aliases.c.alias == term.alias)


def _lock(connection: sa.Connection, name: str) -> None:
    """Keeps others from writing versions of `name` until the end of the transaction."""
    connection.execute(sa.select(names.c.name).where(names.c.name == name).with_for_update())


def _drop(connection: sa.Connection, name: str, which: sa.ColumnElement[bool]) -> list[str]:
    doomed = connection.execute(sa.select(versions.c.version, versions.c.digest).where(which)).all()
    if not doomed:
        raise NotFound(f"no adapter is called '{name}', or it has no such version")
    numbers = [number for number, _ in doomed]
    held = connection.execute(sa.select(aliases.c.alias, aliases.c.version).where(aliases.c.name == name)).all()
    if holders := sorted(f"{name}@{alias}" for alias, number in held if number in numbers):
        raise Conflict(f"{', '.join(holders)} still names it")
    connection.execute(sa.delete(versions).where(which))
    mine = names.c.name == name
    theirs = versions.c.name == name
    left = sa.select(sa.func.max(versions.c.version)).where(theirs).scalar_subquery()
    is_gone = names.c.latest.not_in(sa.select(versions.c.version).where(theirs))
    connection.execute(sa.update(names).where(mine, is_gone).values(latest=left))
    digests = sorted({digest for _, digest in doomed})
    return [
        digest
        for digest in digests
        if connection.execute(sa.select(versions.c.digest).where(versions.c.digest == digest).limit(1)).first()
        is None
    ]


def _adapters(rows: Iterable[sa.RowMapping]) -> list[Adapter]:
    """Rows of `Catalog.list`, one for each version and alias, grouped by name."""
    latest: dict[str, int] = {}
    by_version: dict[str, dict[int, Version]] = {}
    by_alias: dict[str, dict[str, int]] = {}
    for row in rows:
        name, number = row["name"], row["version"]
        latest[name] = row["latest"]
        if number not in by_version.setdefault(name, {}):
            by_version[name][number] = _version(row)
        if row["alias"] is not None:
            by_alias.setdefault(name, {})[row["alias"]] = number
    return [Adapter(n, latest[n], by_alias.get(n, {}), tuple(found.values())) for n, found in by_version.items()]


def _version(row: sa.RowMapping) -> Version:
    fields = {column.name: row[column.name] for column in versions.columns}
    return Version(**fields | {key: tuple(fields[key]) for key in ("target_modules", "warnings")})
