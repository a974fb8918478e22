"""Names, versions, aliases and compositions of adapters, in tables of a given database engine.

A catalog shows the tables as one project sees them: a plain name means the project's own adapter. Every write is
one transaction, repeated if it conflicts with another transaction. Nearly every read is one statement. The SQL
works with SQLite and PostgreSQL. Adapters' files are in the store: the catalog only knows their digests.
"""

import builtins
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from datetime import datetime
from functools import partial

import sqlalchemy as sa

from adapters.catalog import reads, writes
from adapters.catalog.reads import (
    LATEST,
    MAX_VERSION,
    adapters_of,
    in_sight,
    select_adapters,
    select_versions,
    select_visible,
    show_adapter,
    show_part,
    show_version,
    version_of,
)
from adapters.catalog.records import Records
from adapters.catalog.recovery import Recovered, recover
from adapters.catalog.tables import aliases, metadata, names, versions
from adapters.catalog.versions import Adapter, Kind, NewVersion, Part, Version, VersionLimits, combine
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

    `records` keeps a copy of every version's metadata outside the database. If `records` is None, a lost database
    can't be rebuilt.
    """

    def __init__(self, engine: sa.Engine, records: Records | None = None, of: Viewpoint | None = None) -> None:
        self.viewpoint = of or Viewpoint()
        self._limits = VersionLimits()
        self._engine = engine
        self._records = records
        # a read is one statement, which needs no transaction
        self._reader = reader_of(engine)

    def of(self, viewpoint: Viewpoint, limits: VersionLimits | None = None) -> "Catalog":
        """Return a catalog of the same tables, as the viewpoint's project sees them.

        `publish` and `compose` keep within the `limits`; None means no limits.
        """
        view = copy(self)
        view.viewpoint, view._limits = viewpoint, limits or VersionLimits()
        return view

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
        """Add the next version of `name`, which may be new, and make it the latest.

        Raise InvalidInput if the name is invalid, Conflict if a composition has the name, or LimitReached.
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
            work = partial(publish_in, new=new, records=records, limits=self._limits)
            return show_version(self.viewpoint, transact(self._engine, work))

    def compose(
        self,
        name: str,
        terms: Sequence[Term],
        field: str = "expression",
        evaluation: Mapping[str, object] | None = None,
    ) -> tuple[Version, bool]:
        """Add the next version of the composition `name`. Each term is pinned to the version that it means now.

        `evaluation` is stored with a new version, in its `config`.
        Return the version, and whether it is new: if the latest version has the same parts and weights, that
        version is returned and nothing is added. Compositions among the terms are replaced by their own parts.

        Raise NotFound if a term's adapter doesn't exist; InvalidInput on `field` if there are too many parts, a
        weight is too large or the weights cancel out; or Conflict if an adapter that is no composition has the
        name, or the composition is public and a part isn't; or LimitReached.
        """
        viewpoint, key, limits = self.viewpoint, self._new_key(name), self._limits
        with recording(self._engine, self._records) as records:
            version, is_new = transact(
                self._engine,
                lambda connection: compose_in(
                    connection, key, terms, field, viewpoint, records, limits, evaluation
                ),
            )
        return show_version(self.viewpoint, version), is_new

    def list(
        self,
        name: str | None = None,
        limit: int | None = None,
        after: str | None = None,
        *,
        contains: str | None = None,
        public: bool = False,
        num_versions: int | None = None,
        max_versions: int | None = None,
        below: int | None = None,
    ) -> list[Adapter]:
        """Return the project's adapters, sorted by name. If `public`, return the public adapters of all projects.

        Each comes with its `num_versions` newest versions, or with those below the version `below`; None: all.
        If that could be more than `max_versions` together, each comes with fewer.
        `name` selects one adapter. `after` selects the adapters whose names sort after this text. `contains`
        selects the adapters whose names, as the project sees them, contain this text; case is ignored.
        """
        chosen = reads.select_listed(self.viewpoint, after, contains, public)
        if name is not None:
            chosen = chosen.where(names.c.name == self.viewpoint.key(name))
        chosen = chosen.limit(limit)
        with self._reader.connect() as connection:
            if num_versions is not None and max_versions is not None:
                count = sa.select(sa.func.count()).select_from(chosen.subquery())
                num_adapters = connection.execute(count).scalar_one()
                num_versions = min(num_versions, max(1, max_versions // max(1, num_adapters)))
            rows = connection.execute(select_adapters(chosen, num_versions, below)).mappings()
            found = adapters_of(rows, num_versions)
        return [show_adapter(self.viewpoint, adapter) for adapter in found]

    def has_after(self, name: str, *, contains: str | None = None, public: bool = False) -> bool:
        """Return whether `list`, with `after=name`, would return any adapter."""
        query = reads.select_listed(self.viewpoint, name, contains, public).limit(1)
        with self._reader.connect() as connection:
            return connection.execute(query).first() is not None

    def latest_dates(self) -> dict[str, datetime]:
        """Return, by name, when the latest version of each of the project's adapters was created."""
        query = reads.select_latest().where(in_sight(self.viewpoint))
        with self._reader.connect() as connection:
            return {self.viewpoint.shown(row.name): row.created_at for row in connection.execute(query)}

    def get(self, name: str, num_versions: int | None = None, below: int | None = None) -> Adapter:
        """Return the adapter, with versions as `list` does. Raise NotFound if it doesn't exist."""
        page = partial(self.list, name, num_versions=num_versions, below=below)
        if self._is_visible(name) and (found := page() or page(public=True)):
            return found[0]
        with self._reader.connect() as connection:
            raise NotFound(*reads.why_missing(connection, self.viewpoint, Term(self.viewpoint.key(name))))

    def version(self, name: str, version: int) -> Version:
        """Return one version. Raise NotFound if it doesn't exist."""
        key = self.viewpoint.key(name)
        if version <= MAX_VERSION and self._is_visible(name):
            query = select_versions(versions.c.name == key, versions.c.version == version)
            with self._reader.connect() as connection:
                rows = connection.execute(query).mappings().all()
            if rows:
                return show_version(self.viewpoint, version_of(rows))
        with self._reader.connect() as connection:
            raise NotFound(*reads.why_missing(connection, self.viewpoint, Term(key, version)))

    def twin(self, version: Version) -> int | None:
        """Return the number of the newest version before `version` that has the same name and weights.

        Return None if there is no such version.
        """
        same = (versions.c.name == self.viewpoint.key(version.name), versions.c.digest == version.digest)
        query = sa.select(sa.func.max(versions.c.version)).where(*same, versions.c.version < version.version)
        with self._reader.connect() as connection:
            number: int | None = connection.execute(query).scalar_one()
        return number

    def check_limits(self, name: str) -> None:
        """Raise LimitReached if there can't be another version of `name`, which may be new."""
        with self._reader.connect() as connection:
            writes.refuse_too_many(connection, self.viewpoint.key(name), self.viewpoint.key_id, self._limits)

    def check_kind(self, name: str, kind: Kind) -> None:
        """Raise Conflict if `kind` is "adapter" and the name means a composition, or the other way round."""
        key = self.viewpoint.key(name)
        query = sa.select(names.c.kind).where(names.c.name == key, names.c.latest.is_not(None))
        with self._reader.connect() as connection:
            writes.refuse_other_kind(name, connection.execute(query).scalar_one_or_none(), kind)

    def resolve(self, terms: Sequence[Term], field: str = "adapter") -> tuple[Part, ...]:
        """Return the parts that the terms of an expression mean now, in order, by one indexed query.

        A composition is replaced by its parts, with their weights multiplied by the term's weight. Raise NotFound,
        naming every missing term, if an adapter doesn't exist, or InvalidInput on `field` if there are too many
        parts or a weight is too large.
        """
        if not terms:
            return ()
        with self._reader.connect() as connection:
            found = reads.resolve(connection, terms, field, self.viewpoint)
        return tuple(show_part(self.viewpoint, part) for part in found)

    def point(self, name: str, alias: str, version: int) -> None:
        """Point the alias, or `latest`, at this version. Raise NotFound if the version doesn't exist."""
        viewpoint, key = self.viewpoint, self.own_key(name)
        transact(self._engine, lambda connection: point_in(connection, key, alias, version, viewpoint))

    def unpoint(self, name: str, alias: str) -> None:
        """Remove the alias. Raise NotFound if it doesn't exist, or Conflict if it is `latest`."""
        if alias == LATEST:
            raise Conflict("latest can't be removed: point it at another version")
        viewpoint, key = self.viewpoint, self.own_key(name)
        transact(self._engine, lambda connection: unpoint_in(connection, key, alias, viewpoint))

    def set_visibility(self, name: str, is_public: bool) -> None:
        """Let other projects use the adapter if `is_public`, else no longer let them.

        Raise NotFound if the adapter doesn't exist, and Conflict if a public composition would have a private
        part.
        """
        viewpoint, key = self.viewpoint, self.own_key(name)
        transact(self._engine, lambda connection: set_visibility_in(connection, key, is_public, viewpoint))

    def delete(self, name: str, force: bool = False) -> builtins.list[str]:
        """Delete all versions of `name`, and return the digests that no version has any more.

        Raise NotFound if the adapter doesn't exist, and Conflict if aliases or compositions need one of the
        versions; the error names them. With `force`, the aliases are deleted, too.
        """
        return self._drop(name, None, force)

    def delete_version(self, name: str, version: int, force: bool = False) -> builtins.list[str]:
        """Delete one version. Raise errors and return digests as `delete` does.

        If the version was the latest, the highest remaining version becomes the latest.
        """
        return self._drop(name, version, force)

    def num_bytes(self, key_id: str | None = None) -> int:
        """Return the total size in bytes of the project's adapters.

        If `key_id` is given, count only the adapters that this API key published. Adapters with equal weights
        count once.
        """
        with self._reader.connect() as connection:
            return reads.num_bytes(connection, self.viewpoint.project, key_id)

    def in_use(self, digest: str) -> bool:
        """Return whether any version has this digest."""
        with self._reader.connect() as connection:
            return writes.is_named(connection, digest)

    def recover(self, is_stored: Callable[[str], bool], is_known: Callable[[str], bool]) -> Recovered:
        """Make the database and the records agree, and return what was repaired.

        Do nothing if the catalog has no `records`. The arguments are as in `adapters.catalog.recovery.recover`.
        """
        if self._records is None:
            return Recovered()
        return recover(self._engine, self._records, is_stored, is_known)

    def _drop(self, name: str, version: int | None, force: bool) -> builtins.list[str]:
        viewpoint, key = self.viewpoint, self.own_key(name)
        numbers, digests = transact(
            self._engine, lambda connection: drop_in(connection, key, version, force, viewpoint)
        )
        if (records := self._records) is not None:
            # if the disk is full, for example: the versions are deleted, and the next start or `doctor --rebuild`
            # removes their records
            with suppress(*FAILURES):
                records.reach(to_write=records.removal_writes(key, numbers))
                transact(self._engine, lambda _: records.remove(key, numbers))
        return digests

    def _new_key(self, name: str) -> str:
        """Return the key (see `adapters.names`) of a name that gets a new version.

        Raise InvalidInput if the name is invalid.
        """
        if fault := name_fault(name):
            raise InvalidInput.of("name", fault)
        return self.viewpoint.key(name)

    def own_key(self, name: str) -> str:
        """Return the key (see `adapters.names`) of an adapter that the caller wants to change.

        Raise NotFound if the adapter belongs to another project, unless the viewpoint sees all.
        """
        key = self.viewpoint.key(name)
        if not (self.viewpoint.sees_all or self.viewpoint.owns(key)):
            raise NotFound(f"no such adapter in project {self.viewpoint.project}: {name}")
        return key

    def _is_visible(self, name: str) -> bool:
        """Return whether the project may see the name. It may see all its own names, even if they don't exist."""
        key = self.viewpoint.key(name)
        if self.viewpoint.sees_all or self.viewpoint.owns(key):
            return True
        with self._reader.connect() as connection:
            return connection.execute(select_visible(key, self.viewpoint)).first() is not None
