"""Names, versions, aliases and compositions of adapters, in tables of their own over an Engine that is given.

A catalog is one project's view of them: what it calls by a plain name is its own. Every write is one transaction,
done again if it clashes with another's; every read is one statement, as a rule. The SQL is
what SQLite and PostgreSQL have in common. The bytes are the store's: here they are digests only.
"""

import builtins
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime

import sqlalchemy as sa

from adapters.catalog import reads, writes
from adapters.catalog.reads import (
    LATEST,
    MAX_VERSION,
    adapter_seen,
    adapters_of,
    in_sight,
    part_seen,
    seen,
    select_adapters,
    select_versions,
    select_visible,
    version_of,
)
from adapters.catalog.records import Records
from adapters.catalog.recovery import Recovered, recover
from adapters.catalog.tables import aliases, metadata, names, versions
from adapters.catalog.versions import Adapter, Kind, NewVersion, Part, Version, combine
from adapters.catalog.writes import (
    compose_in,
    drop_in,
    point_in,
    publish_in,
    recording,
    set_visibility_in,
    unpoint_in,
)
from adapters.errors import Conflict, InvalidInput, NotFound
from adapters.expression import Term
from adapters.names import Viewpoint, name_fault
from adapters.sql import FAILURES, reader_of, transact

__all__ = [
    "LATEST",
    "Adapter",
    "Catalog",
    "Kind",
    "NewVersion",
    "Part",
    "Version",
    "aliases",
    "combine",
    "metadata",
    "publish_in",
    "recording",
]


class Catalog:
    """Adapters by name, as one project sees them. Thread-safe; other processes may write the same tables.

    `records` keeps a copy of every version outside the database. None: nothing is to be rebuilt from.
    """

    def __init__(self, engine: sa.Engine, records: Records | None = None, of: Viewpoint | None = None) -> None:
        self.viewpoint = of or Viewpoint()
        self._engine = engine
        self._records = records
        # A read is one statement, so it needs no transaction around it.
        self._reader = reader_of(engine)

    def of(self, viewpoint: Viewpoint) -> "Catalog":
        """The same as another project sees it."""
        return Catalog(self._engine, self._records, viewpoint)

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
        base_digest: str | None = None,
        data_digest: str | None = None,
        config: Mapping[str, object] | None = None,
    ) -> Version:
        """Adds the next version of `name`, which may be new, and makes it the latest.

        Raises InvalidInput for a bad name, Conflict where a composition has it.
        """
        new = NewVersion(
            name=self._new_key(name),
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
            base_digest=base_digest,
            data_digest=data_digest,
            config=dict(config or {}),
            key_id=self.viewpoint.key_id,
        )
        with recording(self._engine, self._records) as records:
            return seen(
                self.viewpoint,
                transact(self._engine, lambda connection: publish_in(connection, new, records=records)),
            )

    def compose(self, name: str, terms: Sequence[Term], field: str = "expression") -> tuple[Version, bool]:
        """Adds the next version of the composition `name`, its parts pinned to the versions that they mean now.

        And whether it is new: where the latest has the same parts and weights already, it is that one.

        Compositions among the terms are replaced by their own parts. Raises NotFound as `resolve` does,
        InvalidInput on `field`, or Conflict where an adapter has the name.
        """
        viewpoint, key = self.viewpoint, self._new_key(name)
        with recording(self._engine, self._records) as records:
            version, is_new = transact(
                self._engine, lambda connection: compose_in(connection, key, terms, field, viewpoint, records)
            )
        return seen(self.viewpoint, version), is_new

    def list(
        self,
        name: str | None = None,
        limit: int | None = None,
        after: str | None = None,
        *,
        contains: str | None = None,
        public: bool = False,
    ) -> list[Adapter]:
        """Adapters by name: the one called `name` or all, at most `limit`, those after the name `after`, those in
        whose names, as they are told, is `contains` in whichever case.

        The project's own; with `public`, those of all projects that others may use.
        """
        chosen = reads.select_listed(self.viewpoint, after, contains, public)
        if name is not None:
            chosen = chosen.where(names.c.name == self.viewpoint.key(name))
        with self._reader.connect() as connection:
            found = adapters_of(connection.execute(select_adapters(chosen.limit(limit))).mappings())
        return [adapter_seen(self.viewpoint, adapter) for adapter in found]

    def has_after(self, name: str, *, contains: str | None = None, public: bool = False) -> bool:
        """Whether `list` would have more after the adapter of this name."""
        query = reads.select_listed(self.viewpoint, name, contains, public).limit(1)
        with self._reader.connect() as connection:
            return connection.execute(query).first() is not None

    def latest_dates(self) -> dict[str, datetime]:
        """The project's names, each with the moment at which its latest version was made."""
        query = reads.select_latest().where(in_sight(self.viewpoint))
        with self._reader.connect() as connection:
            return {self.viewpoint.shown(row.name): row.created_at for row in connection.execute(query)}

    def get(self, name: str) -> Adapter:
        """The adapter called `name`. Raises NotFound."""
        if self._is_visible(name) and (found := self.list(name) or self.list(name, public=True)):
            return found[0]
        with self._reader.connect() as connection:
            raise NotFound(*reads.why_missing(connection, self.viewpoint, Term(self.viewpoint.key(name))))

    def version(self, name: str, version: int) -> Version:
        """One version. Raises NotFound."""
        key = self.viewpoint.key(name)
        if version <= MAX_VERSION and self._is_visible(name):
            query = select_versions(versions.c.name == key, versions.c.version == version)
            with self._reader.connect() as connection:
                rows = connection.execute(query).mappings().all()
            if rows:
                return seen(self.viewpoint, version_of(rows))
        with self._reader.connect() as connection:
            raise NotFound(*reads.why_missing(connection, self.viewpoint, Term(key, version)))

    def twin(self, version: Version) -> int | None:
        """The newest version of its name before it that has the same weights; None: there is none."""
        same = (versions.c.name == self.viewpoint.key(version.name), versions.c.digest == version.digest)
        query = sa.select(sa.func.max(versions.c.version)).where(*same, versions.c.version < version.version)
        with self._reader.connect() as connection:
            number: int | None = connection.execute(query).scalar_one()
        return number

    def check_kind(self, name: str, kind: Kind) -> None:
        """Raises Conflict where the name has versions of another kind."""
        key = self.viewpoint.key(name)
        query = sa.select(names.c.kind).where(names.c.name == key, names.c.latest.is_not(None))
        with self._reader.connect() as connection:
            writes.refuse_other_kind(name, connection.execute(query).scalar_one_or_none(), kind)

    def resolve(self, terms: Sequence[Term], field: str = "adapter") -> tuple[Part, ...]:
        """What each term means at this moment, in the order of the terms, by one indexed query.

        A composition means its parts, whose weights are multiplied by the term's. Raises NotFound, naming every
        term that means nothing, or InvalidInput on `field` where the parts are too many, or a weight too large.
        """
        if not terms:
            return ()
        with self._reader.connect() as connection:
            found = reads.resolve(connection, terms, field, self.viewpoint)
        return tuple(part_seen(self.viewpoint, part) for part in found)

    def point(self, name: str, alias: str, version: int) -> None:
        """Makes the alias, or `latest`, mean that version from now on. Raises NotFound."""
        viewpoint, key = self.viewpoint, self.own_key(name)
        transact(self._engine, lambda connection: point_in(connection, key, alias, version, viewpoint))

    def unpoint(self, name: str, alias: str) -> None:
        """Removes the alias. Raises NotFound, or Conflict for `latest`."""
        if alias == LATEST:
            raise Conflict("latest can't be removed: point it at another version")
        viewpoint, key = self.viewpoint, self.own_key(name)
        transact(self._engine, lambda connection: unpoint_in(connection, key, alias, viewpoint))

    def set_visibility(self, name: str, is_public: bool) -> None:
        """Whether other projects may use the name. Raises NotFound, or Conflict: a public composition has public
        parts alone.
        """
        viewpoint, key = self.viewpoint, self.own_key(name)
        transact(self._engine, lambda connection: set_visibility_in(connection, key, is_public, viewpoint))

    def delete(self, name: str, force: bool = False) -> builtins.list[str]:
        """Removes all versions of `name`; returns the digests that no version has any more.

        Raises NotFound, or Conflict where an alias or a composition holds one of them, which it names. `force`
        removes the aliases, too.
        """
        return self._drop(name, None, force)

    def delete_version(self, name: str, version: int, force: bool = False) -> builtins.list[str]:
        """Removes one version; if it was the latest, the highest left becomes it. Otherwise as `delete`."""
        return self._drop(name, version, force)

    def num_bytes(self, key_id: str | None = None) -> int:
        """That the project's adapters take, those that a key published or all; equal bytes once."""
        with self._reader.connect() as connection:
            return reads.num_bytes(connection, self.viewpoint.project, key_id)

    def in_use(self, digest: str) -> bool:
        """Whether any version has this digest."""
        with self._reader.connect() as connection:
            return writes.is_named(connection, digest)

    def recover(self, is_stored: Callable[[str], bool], is_known: Callable[[str], bool]) -> Recovered:
        """See `catalog_recovery`. Nothing without records."""
        if self._records is None:
            return Recovered()
        return recover(self._engine, self._records, is_stored, is_known)

    def _drop(self, name: str, version: int | None, force: bool) -> builtins.list[str]:
        viewpoint, key = self.viewpoint, self.own_key(name)
        numbers, digests = transact(
            self._engine, lambda connection: drop_in(connection, key, version, force, viewpoint)
        )
        if (records := self._records) is not None:
            # no room, say: they are gone all the same, and the next start or `doctor --rebuild` tidies up
            with suppress(*FAILURES):
                records.reach(to_write=records.removal_writes(key, numbers))
                transact(self._engine, lambda _: records.remove(key, numbers))
        return digests

    def _new_key(self, name: str) -> str:
        """Of a name that gets a version. Raises InvalidInput."""
        if fault := name_fault(name):
            raise InvalidInput.of("name", fault)
        return self.viewpoint.key(name)

    def own_key(self, name: str) -> str:
        """Of a name that is to be changed. Raises NotFound where it can only be another project's."""
        key = self.viewpoint.key(name)
        if not (self.viewpoint.sees_all or self.viewpoint.owns(key)):
            raise NotFound(f"no such adapter in project {self.viewpoint.project}: {name}")
        return key

    def _is_visible(self, name: str) -> bool:
        """Own names always are, whether there are any."""
        key = self.viewpoint.key(name)
        if self.viewpoint.sees_all or self.viewpoint.owns(key):
            return True
        with self._reader.connect() as connection:
            return connection.execute(select_visible(key, self.viewpoint)).first() is not None
