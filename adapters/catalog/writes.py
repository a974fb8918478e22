"""The catalog's writes, each within a transaction of `adapters.sql.transact`.

They are for callers that write their own tables in the same transaction; other callers use `catalog.Catalog`. A
`name` is a key here (see `adapters.names`). Records are written before the commit (see
`adapters.catalog.records`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import sqlalchemy as sa

from adapters.catalog.reads import (
    LATEST,
    MAX_VERSION,
    resolve,
    select_versions,
    show_version,
    version_of,
    why_missing,
)
from adapters.catalog.records import Recorder, Records
from adapters.catalog.tables import aliases, lock, names, parts, versions
from adapters.catalog.versions import (
    EVALUATION,
    Kind,
    NewVersion,
    Origin,
    Part,
    Version,
    VersionLimits,
    blend_digest,
    combine,
    gather,
)
from adapters.errors import Conflict, Hint, InvalidInput, LimitReached, NotFound, TryAgain
from adapters.expression import Term, render
from adapters.names import Viewpoint, name_fault, split_key
from adapters.sql import FAILURES, transact

MAX_ALIASES = 100
"""The most aliases of one name. Lists of adapters show all of them."""


@contextmanager
def recording(engine: sa.Engine, records: Records | None) -> Iterator[Recorder | None]:
    """Surround a transaction that publishes versions, and yield its recorder, or None without records.

    Raise BytesUnavailable if records can't be written or removed. If the transaction fails, even in its commit,
    the records that it wrote are removed. Otherwise the next start would take them for versions of a lost
    database, and publish them.
    """
    recorder = None if records is None else Recorder(records)
    if records is not None:
        records.reach()
    try:
        yield recorder
    except BaseException:
        if records is not None and recorder is not None and recorder.written:
            with suppress(*FAILURES):  # recovery at the next start handles the records, as after a crash
                records.reach(to_write=False)
                transact(engine, partial(_forget_uncommitted, recorder))
        raise


def _forget_uncommitted(recorder: Recorder, connection: sa.Connection) -> None:
    """Remove the records that the recorder wrote for versions that were not committed.

    Meanwhile no other process can use these versions' numbers: writers wait until `connection`'s transaction ends.
    """
    for version in recorder.written:
        mine = (versions.c.name == version.name, versions.c.version == version.version)
        if connection.execute(sa.select(versions.c.version).where(*mine)).first() is None:
            recorder.forget(version)


def publish_in(
    connection: sa.Connection,
    new: NewVersion,
    alias: str | None = None,
    records: Recorder | None = None,
    moves_latest: bool = True,
    limits: VersionLimits | None = None,
) -> Version:
    """Publish as `Catalog.publish` does, and point `alias` to the version. `moves_latest` is as in `insert_in`."""
    if not all(map(math.isfinite, new.metrics.values())):
        raise ValueError("metrics must be finite")
    number = _next_number(connection, new.name, "adapter")
    refuse_too_many(connection, new.name, new.key_id, limits)
    version = Version(**vars(new), version=number, created_at=datetime.now(UTC))
    insert_in(connection, version, records, moves_latest)
    if alias is not None and alias != LATEST:
        _point(connection, new.name, alias, number)
    return version


class LatestMoved(TryAgain):
    """Raised if `latest` is no longer the version that the new one was compared with."""

    default_message = "the name's latest version is another one by now: compare the new one with that"


def publish_unattended_in(
    connection: sa.Connection,
    new: NewVersion,
    alias: str | None,
    records: Recorder | None,
    compared_with: int | None = None,
    worse: str | None = None,
    limits: VersionLimits | None = None,
) -> tuple[Version, str | None]:
    """Publish a version from a job. Return the version, and a message for people if `latest` stays, else None.

    `latest` stays if somebody moved it back manually, because a job that ends later must not undo that. It also
    stays if `worse` is given, which says in words that the job found the new version worse than the latest one.

    `alias` is pointed to the version; the alias "latest" moves `latest` in any case. `compared_with` is the number
    of the latest version with which the job compared the new one, 0 if there was no version, or None if the job
    didn't compare. Raise LatestMoved if the job did, and the latest version is another one by now.
    """
    lock(connection, new.name)
    has_latest = (names.c.name == new.name, names.c.latest.is_not(None))
    row = connection.execute(sa.select(names).where(*has_latest)).first()
    if compared_with is not None and compared_with != (0 if row is None else row.latest):
        raise LatestMoved
    stays = None
    if row is not None and alias != LATEST:
        if row.rolled_back:
            stays = f"latest stays at {row.latest}, where it was moved back to by hand"
        elif worse is not None:
            stays = f"latest stays at {row.latest}: the new version is {worse}"
    version = publish_in(connection, new, alias, records, moves_latest=stays is None, limits=limits)
    if stays is None:
        return version, None
    return version, f"{stays}; PUT /adapters/{split_key(new.name)[1]}/aliases/latest moves it"


def compose_in(
    connection: sa.Connection,
    name: str,
    terms: Sequence[Term],
    field: str,
    viewpoint: Viewpoint,
    records: Recorder | None = None,
    limits: VersionLimits | None = None,
    evaluation: Mapping[str, object] | None = None,
) -> tuple[Version, bool]:
    """Publish a composition as `Catalog.compose` does."""
    # called first: it takes a lock, so that the parts can't be deleted meanwhile
    number = _next_number(connection, name, "composition")
    leaves = gather(resolve(connection, terms, field, viewpoint))
    if not combine(leaves):
        raise InvalidInput.of(field, "is equal to the base: give adapters whose weights don't cancel out")
    row = connection.execute(sa.select(names).where(names.c.name == name)).one()
    if row.latest is not None and set((same := one_version(connection, name, row.latest)).parts) == set(leaves):
        connection.execute(sa.update(names).where(names.c.name == name).values(next_version=number))
        return same, False
    refuse_too_many(connection, name, viewpoint.key_id, limits)
    if row.is_public:
        _refuse_private(connection, name, (part.name for part in leaves), viewpoint)
    made_of = [one_version(connection, part.name, part.version) for part in leaves]
    version = _blend(name, number, leaves, made_of, viewpoint)
    if evaluation is not None:
        version = replace(version, config={EVALUATION: evaluation})
    insert_in(connection, version, records)
    return version, True


def insert_in(
    connection: sa.Connection, version: Version, records: Recorder | None, moves_latest: bool = True
) -> None:
    """Insert a numbered version and make it the latest.

    Without `moves_latest`, the version becomes the latest only if there is no latest yet.
    """
    row = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(version).items()}
    del row["parts"]
    connection.execute(sa.insert(versions).values(row))
    for place, part in enumerate(version.parts):
        values = {"part_name": part.name, "part_version": part.version, "part_digest": part.digest}
        values |= {"name": version.name, "version": version.version, "place": place, "weight": part.weight}
        connection.execute(sa.insert(parts).values(values))
    mine = names.c.name == version.name
    connection.execute(sa.update(names).where(mine).values(kind=version.kind))
    follows = mine if moves_latest else sa.and_(mine, names.c.latest.is_(None))
    connection.execute(sa.update(names).where(follows).values(latest=version.version, rolled_back=False))
    if records is not None:
        records.write(version)


def point_in(connection: sa.Connection, name: str, alias: str, version: int, viewpoint: Viewpoint) -> None:
    """Point an alias, or `latest`, to a version as `Catalog.point` does."""
    lock(connection, name)
    which = (versions.c.name == name, versions.c.version == _bounded(version))
    if connection.execute(sa.select(versions.c.version).where(*which)).first() is None:
        raise NotFound(*why_missing(connection, viewpoint, Term(name, version)))
    if alias == LATEST:
        moved = {"latest": version, "rolled_back": version < _newest(name)}
        connection.execute(sa.update(names).where(names.c.name == name).values(moved))
    else:
        _point(connection, name, alias, version)


def unpoint_in(connection: sa.Connection, name: str, alias: str, viewpoint: Viewpoint) -> None:
    """Remove an alias as `Catalog.unpoint` does."""
    mine = sa.and_(aliases.c.name == name, aliases.c.alias == alias)
    if connection.execute(sa.delete(aliases).where(mine)).rowcount == 0:
        raise NotFound(*why_missing(connection, viewpoint, Term(name, alias=alias)))


def set_visibility_in(connection: sa.Connection, name: str, is_public: bool, viewpoint: Viewpoint) -> None:
    """Set whether other projects may use the name, as `Catalog.set_visibility` does.

    A public composition shows its parts, so they must be public, too.
    """
    lock(connection, name)
    mine = names.c.name == name
    if connection.execute(sa.select(names.c.name).where(mine, names.c.latest.is_not(None))).first() is None:
        raise NotFound(*why_missing(connection, viewpoint, Term(name)))
    if is_public:
        used = sa.select(parts.c.part_name).where(parts.c.name == name).distinct()
        _refuse_private(connection, name, connection.execute(used).scalars(), viewpoint)
    else:
        _refuse_parts_of_public(connection, name, viewpoint)
    connection.execute(sa.update(names).where(mine).values(is_public=is_public))


def _refuse_private(connection: sa.Connection, name: str, used: Iterable[str], viewpoint: Viewpoint) -> None:
    """Raise Conflict unless all parts `used` by the public composition `name` are public, too."""
    keys = set(used)
    public = sa.select(names.c.name).where(names.c.name.in_(keys), names.c.is_public)
    if private := keys - set(connection.execute(public).scalars()):
        shown = ", ".join(sorted(map(viewpoint.shown, private)))
        raise Conflict(f"{viewpoint.shown(name)} can be public only when its parts are: make {shown} public first")


def _refuse_parts_of_public(connection: sa.Connection, name: str, viewpoint: Viewpoint) -> None:
    """Raise Conflict if `name`, which is to become private, is a part of a public composition of the project.

    Other projects' compositions don't forbid this: they can't be used while one of their parts is private.
    """
    query = sa.select(parts.c.name).distinct().join(names, names.c.name == parts.c.name)
    query = query.where(parts.c.part_name == name, names.c.is_public, names.c.name != name)
    if blends := [blend for blend in connection.execute(query).scalars() if viewpoint.owns(blend)]:
        shown = ", ".join(sorted(map(viewpoint.shown, blends)))
        raise Conflict(f"{viewpoint.shown(name)} is a part of public compositions: make {shown} private first")


def drop_in(
    connection: sa.Connection, name: str, version: int | None, force: bool, viewpoint: Viewpoint
) -> tuple[list[int], list[str]]:
    """Delete one version, or all if `version` is None, as `Catalog.delete` does.

    Return the numbers of the deleted versions, and the digests that no version has any more.
    """
    lock(connection, name)
    number = None if version is None else _bounded(version)
    which = _rows_of(name, number, versions.c.name, versions.c.version)
    numbers = list(connection.execute(sa.select(versions.c.version).where(which)).scalars())
    if not numbers:
        raise NotFound(*why_missing(connection, viewpoint, Term(name, version)))
    _refuse_needed(connection, name, number, force, viewpoint)
    digests = list(connection.execute(_select_unshared_digests(name, number)).scalars())
    connection.execute(sa.delete(aliases).where(_rows_of(name, number, aliases.c.name, aliases.c.version)))
    connection.execute(sa.delete(parts).where(_rows_of(name, number, parts.c.name, parts.c.version)))
    connection.execute(sa.delete(versions).where(which))
    _repair_latest(connection, name)
    return numbers, digests


_FORCE = Hint("force_delete", "?force=true deletes aliases with it")


def _refuse_needed(
    connection: sa.Connection, name: str, number: int | None, force: bool, viewpoint: Viewpoint
) -> None:
    """Raise Conflict, naming the aliases and compositions that need version `number` (None: any version).

    `force` ignores aliases. Only the operator learns the names of other projects' compositions; everybody else
    learns how many such compositions there are.
    """
    named: list[str] = []
    if not force:
        query = sa.select(aliases.c.alias).where(_rows_of(name, number, aliases.c.name, aliases.c.version))
        found = connection.execute(query.order_by("alias")).scalars()
        named = [f"the alias {viewpoint.shown(name)}@{alias}" for alias in found]
    blends = sa.select(parts.c.name, parts.c.version).distinct()
    blends = blends.where(_rows_of(name, number, parts.c.part_name, parts.c.part_version))
    rows = connection.execute(blends.order_by(parts.c.name, parts.c.version)).all()
    seen = [row for row in rows if viewpoint.sees_all or viewpoint.owns(row.name)]
    holders = named + [f"the composition {viewpoint.shown(row.name)}@{row.version}" for row in seen]
    if num_others := len(rows) - len(seen):
        holders.append(f"{num_others} composition{'s' if num_others > 1 else ''} of other projects")
    if not holders:
        return
    hint = _FORCE if named else None
    helps = [_FORCE.text] if named else []
    helps += ["delete the compositions first"] if seen else []
    helps += ["make it private, which ends their use, and ask the operator to delete theirs"] if num_others else []
    shown = f"{', '.join(holders[:20])}{', …' if len(holders) > 20 else ''}"
    raise Conflict(f"held by {shown}: {'; '.join(helps)}", hint=hint)


def _select_unshared_digests(name: str, number: int | None) -> "sa.Select[str]":
    """Select the digests that no version has except the name's version `number` (None: all its versions)."""
    which = _rows_of(name, number, versions.c.name, versions.c.version)
    digests = sa.select(versions.c.digest).where(which).distinct().subquery()
    others = sa.exists().where(versions.c.digest == digests.c.digest, sa.not_(which))
    return sa.select(digests.c.digest).where(sa.not_(others)).order_by(digests.c.digest)


def _rows_of(
    name: str, number: int | None, names_there: "sa.Column[str]", numbers_there: "sa.Column[int]"
) -> sa.ColumnElement[bool]:
    """Return an SQL condition for a table's rows about the name's version `number` (None: all its versions).

    The table has adapters' names in the column `names_there`, and versions' numbers in `numbers_there`.
    """
    return names_there == name if number is None else sa.and_(names_there == name, numbers_there == number)


def _repair_latest(connection: sa.Connection, name: str) -> None:
    """If `latest` is a deleted version, make the highest remaining version the latest.

    If `latest` is now the highest version, clear `rolled_back`, which says that somebody moved `latest` back. A
    name without versions becomes private, so that later versions aren't public by accident.
    """
    mine = names.c.name == name
    is_gone = names.c.latest.not_in(sa.select(versions.c.version).where(versions.c.name == name))
    connection.execute(sa.update(names).where(mine, is_gone).values(latest=_newest(name)))
    is_empty = names.c.latest.is_(None)
    connection.execute(sa.update(names).where(mine, is_empty).values(is_public=False))
    is_newest = sa.or_(is_empty, names.c.latest == _newest(name))
    connection.execute(sa.update(names).where(mine, is_newest).values(rolled_back=False))


def is_named(connection: sa.Connection, digest: str) -> bool:
    """Return whether any version has this digest."""
    query = sa.select(versions.c.digest).where(versions.c.digest == digest).limit(1)
    return connection.execute(query).first() is not None


def refuse_other_kind(name: str, existing: str | None, kind: Kind) -> None:
    """Raise Conflict if `existing`, the kind of the name's versions, isn't `kind`.

    If the name has no versions, `existing` is None, and no error is raised.
    """
    if existing is not None and existing != kind:
        owner = "a composition" if existing == "composition" else "an adapter"
        raise Conflict(f"'{name}' is the name of {owner}: choose another one, or delete that first")


def one_version(connection: sa.Connection, name: str, number: int) -> Version:
    """Return an existing version."""
    mine = (versions.c.name == name, versions.c.version == number)
    return version_of(connection.execute(select_versions(*mine)).mappings().all())


def _next_number(connection: sa.Connection, name: str, kind: Kind) -> int:
    """Return the name's next version number, and lock the name.

    Raise InvalidInput if the name is invalid, or Conflict if it has versions of another kind.
    """
    project, own = split_key(name)
    if fault := name_fault(own):
        raise InvalidInput.of("name", fault)
    mine = names.c.name == name
    increment = sa.update(names).where(mine).values(next_version=names.c.next_version + 1)
    if connection.execute(increment).rowcount == 0:
        connection.execute(sa.insert(names).values(name=name, project=project, kind=kind, next_version=2))
    row = connection.execute(sa.select(names).where(mine)).one()
    refuse_other_kind(own, row.kind if row.latest is not None else None, kind)
    number: int = row.next_version - 1
    return number


def refuse_too_many(
    connection: sa.Connection, name: str, key_id: str | None, limits: VersionLimits | None
) -> None:
    """Raise LimitReached if the project that `name` belongs to, or the key, can't have one more version.

    Reserved versions count, too.
    """
    if limits is None:
        return
    project, _ = split_key(name)
    of_project = sa.select(sa.func.count()).select_from(versions).join(names, names.c.name == versions.c.name)
    of_project = of_project.where(names.c.project == project)
    of_key = of_project.where(versions.c.key_id == key_id)
    for most, owner, query, key in (
        (limits.of_project, f"project {project}", of_project, None),
        (limits.of_key, f"key {key_id}", of_key, key_id),
    ):
        if most is None:
            continue
        num_reserved = limits.num_reserved(connection, project, key)
        number = connection.execute(query).scalar_one() + num_reserved
        if number >= most:
            reserved = f", {num_reserved:,} of them reserved by unfinished jobs," if num_reserved else ","
            cancel = "cancel some jobs, " if num_reserved else ""
            raise LimitReached(
                f"the {owner} has {number:,} versions{reserved} and may have {most:,}: delete some, {cancel}or "
                "ask for a larger max_versions"
            )


def _newest(name: str) -> "sa.ScalarSelect[int]":
    """Return SQL for the highest number of the name's versions."""
    return sa.select(sa.func.max(versions.c.version)).where(versions.c.name == name).scalar_subquery()


def _blend(
    name: str, number: int, leaves: tuple[Part, ...], made_of: Sequence[Version], viewpoint: Viewpoint
) -> Version:
    """Return the composition's version `number`. `leaves` are its parts, `made_of` the parts' versions."""
    by_digest = {version.digest: version for version in made_of}.values()  # equal bytes count once
    origin = Origin.of(show_version(viewpoint, version) for version in made_of)
    return Version(
        name=name,
        digest=blend_digest(leaves),
        rank=sum(version.rank for version in by_digest),
        alpha=0.0,
        target_modules=tuple(dict.fromkeys(module for version in made_of for module in version.target_modules)),
        parameters=sum(version.parameters for version in by_digest),
        bytes=0,
        base_model=origin.base_model,
        base_digest=origin.base_digest,
        warnings=origin.warnings,
        parent=render(Term(viewpoint.shown(part.name), part.version, weight=part.weight) for part in leaves),
        key_id=viewpoint.key_id,
        version=number,
        created_at=datetime.now(UTC),
        parts=leaves,
    )


def _point(connection: sa.Connection, name: str, alias: str, version: int) -> None:
    """Point the alias to the version. The alias is created if it doesn't exist.

    Raise LimitReached if the name has MAX_ALIASES others.
    """
    moved = sa.update(aliases).where(aliases.c.name == name, aliases.c.alias == alias).values(version=version)
    if connection.execute(moved).rowcount == 0:
        mine = sa.select(sa.func.count()).select_from(aliases).where(aliases.c.name == name)
        if connection.execute(mine).scalar_one() >= MAX_ALIASES:
            raise LimitReached(f"a name has at most {MAX_ALIASES} aliases: remove one first")
        connection.execute(sa.insert(aliases).values(name=name, alias=alias, version=version))


def _bounded(version: int) -> int:
    """Return the number, or 0 if it is too large for a database's column. No version has the number 0."""
    return version if version <= MAX_VERSION else 0
