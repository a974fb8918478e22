"""Which names other projects may use. A public composition shows its parts, so they must be public, too.

The catalog's writes, each within a transaction that `adapters.sql.transact` began.

For whoever writes tables of their own in the same transaction; `catalog.Catalog` is for all others. A name is a
key here (`adapters.names`). Records are written before the commit; see `adapters.catalog.records`.

What a job publishes, at a moment when nobody looks: whether the name means it from then on.

`latest` stays where somebody moved it back by hand: a job that ends later must not undo that. And it stays where
the new version is worse than its untouched base, unless the one before is even worse.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

import sqlalchemy as sa

from adapters.catalog.reads import LATEST, MAX_VERSION, resolve, seen, select_versions, version_of, why_missing
from adapters.catalog.records import Recorder, Records
from adapters.catalog.tables import aliases, lock, names, parts, versions
from adapters.catalog.versions import Kind, NewVersion, Origin, Part, Version, blend_digest, combine, gather
from adapters.errors import Conflict, InvalidInput, NotFound, TryAgain
from adapters.expression import Term, render
from adapters.names import Viewpoint, name_fault, split_key
from adapters.sql import FAILURES, transact


def set_visibility_in(connection: sa.Connection, name: str, is_public: bool, of: Viewpoint) -> None:
    """As `Catalog.set_visibility`, of a key."""
    lock(connection, name)
    mine = names.c.name == name
    if connection.execute(sa.select(names.c.name).where(mine, names.c.latest.is_not(None))).first() is None:
        raise NotFound(*why_missing(connection, of, Term(name)))
    if is_public:
        used = sa.select(parts.c.part_name).where(parts.c.name == name).distinct()
        _refuse_private(connection, name, connection.execute(used).scalars(), of)
    else:
        _refuse_parts_of_public(connection, name, of)
    connection.execute(sa.update(names).where(mine).values(is_public=is_public))


def refuse_private_parts(connection: sa.Connection, name: str, leaves: Iterable[Part], of: Viewpoint) -> None:
    """Conflict where not all parts of the public composition `name` are public, too."""
    _refuse_private(connection, name, (part.name for part in leaves), of)


def _refuse_private(connection: sa.Connection, name: str, used: Iterable[str], of: Viewpoint) -> None:
    keys = set(used)
    public = sa.select(names.c.name).where(names.c.name.in_(keys), names.c.is_public)
    if private := keys - set(connection.execute(public).scalars()):
        told = ", ".join(sorted(map(of.shown, private)))
        raise Conflict(f"{of.shown(name)} can be public only when its parts are: make {told} public first")


def _refuse_parts_of_public(connection: sa.Connection, name: str, of: Viewpoint) -> None:
    """Those of the same project; another's composition is refused from then on, as its parts are."""
    query = sa.select(parts.c.name).distinct().join(names, names.c.name == parts.c.name)
    query = query.where(parts.c.part_name == name, names.c.is_public, names.c.name != name)
    if blends := [blend for blend in connection.execute(query).scalars() if of.owns(blend)]:
        told = ", ".join(sorted(map(of.shown, blends)))
        raise Conflict(f"{of.shown(name)} is a part of public compositions: make {told} private first")


@contextmanager
def recording(engine: sa.Engine, records: Records | None) -> Iterator[Recorder | None]:
    """A block around a transaction that publishes. Where that fails, if only as it commits, its records go again:
    the next start would take them for versions that a lost database knew. Raises as `Records.reach`.
    """
    recorder = None if records is None else Recorder(records)
    if records is not None:
        records.reach()
    try:
        yield recorder
    except BaseException:
        if records is not None and recorder is not None and recorder.written:
            with suppress(*FAILURES):  # then it is as if the process had been killed
                records.reach(to_write=False)
                transact(engine, partial(_forget_uncommitted, recorder))
        raise


def publish_in(
    connection: sa.Connection,
    new: NewVersion,
    alias: str | None = None,
    records: Recorder | None = None,
    moves_latest: bool = True,
) -> Version:
    """As `Catalog.publish`; `alias` then means the version, too. `moves_latest` is as in `insert_in`."""
    if not all(map(math.isfinite, new.metrics.values())):
        raise ValueError("metrics must be finite")
    number = _next_number(connection, new.name, "adapter")
    version = Version(**vars(new), version=number, created_at=datetime.now(UTC))
    insert_in(connection, version, records, moves_latest)
    if alias is not None and alias != LATEST:
        _point(connection, new.name, alias, number)
    return version


def compose_in(
    connection: sa.Connection,
    name: str,
    terms: Sequence[Term],
    field: str,
    of: Viewpoint,
    records: Recorder | None = None,
) -> tuple[Version, bool]:
    """As `Catalog.compose`."""
    number = _next_number(connection, name, "composition")  # first: others can't delete the parts from here on
    leaves = gather(resolve(connection, terms, field, of))
    if not combine(leaves):
        raise InvalidInput.of(field, "comes to nothing but the base: give adapters whose weights don't cancel out")
    row = connection.execute(sa.select(names).where(names.c.name == name)).one()
    if row.latest is not None and set((same := one_version(connection, name, row.latest)).parts) == set(leaves):
        connection.execute(sa.update(names).where(names.c.name == name).values(next_version=number))
        return same, False
    if row.is_public:
        refuse_private_parts(connection, name, leaves, of)
    made_of = [one_version(connection, part.name, part.version) for part in leaves]
    version = _blend(name, number, leaves, made_of, of)
    insert_in(connection, version, records)
    return version, True


def insert_in(
    connection: sa.Connection, version: Version, records: Recorder | None, moves_latest: bool = True
) -> None:
    """Store a version whose number is its own. It becomes the latest; without `moves_latest`, only a first."""
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


def point_in(connection: sa.Connection, name: str, alias: str, version: int, of: Viewpoint) -> None:
    """As `Catalog.point`."""
    lock(connection, name)
    which = (versions.c.name == name, versions.c.version == _bounded(version))
    if connection.execute(sa.select(versions.c.version).where(*which)).first() is None:
        raise NotFound(*why_missing(connection, of, Term(name, version)))
    if alias == LATEST:
        moved = {"latest": version, "rolled_back": version < _newest(name)}
        connection.execute(sa.update(names).where(names.c.name == name).values(moved))
    else:
        _point(connection, name, alias, version)


def unpoint_in(connection: sa.Connection, name: str, alias: str, of: Viewpoint) -> None:
    """As `Catalog.unpoint`."""
    mine = sa.and_(aliases.c.name == name, aliases.c.alias == alias)
    if connection.execute(sa.delete(aliases).where(mine)).rowcount == 0:
        raise NotFound(*why_missing(connection, of, Term(name, alias=alias)))


def drop_in(
    connection: sa.Connection, name: str, version: int | None, force: bool, of: Viewpoint
) -> tuple[list[int], list[str]]:
    """As `Catalog.delete` and `delete_version`: the numbers that went, and the digests that nothing names now."""
    lock(connection, name)
    number = None if version is None else _bounded(version)
    which = _of(name, number, versions.c.name, versions.c.version)
    numbers = list(connection.execute(sa.select(versions.c.version).where(which)).scalars())
    if not numbers:
        raise NotFound(*why_missing(connection, of, Term(name, version)))
    _refuse_held(connection, name, number, force, of)
    digests = list(connection.execute(_named_by_these_alone(name, number)).scalars())
    connection.execute(sa.delete(aliases).where(_of(name, number, aliases.c.name, aliases.c.version)))
    connection.execute(sa.delete(parts).where(_of(name, number, parts.c.name, parts.c.version)))
    connection.execute(sa.delete(versions).where(which))
    _mend_latest(connection, name)
    return numbers, digests


def _of(
    name: str, number: int | None, names_there: "sa.Column[str]", numbers_there: "sa.Column[int]"
) -> sa.ColumnElement[bool]:
    """Rows of the name's version, or of all: as one condition, however many those are."""
    return names_there == name if number is None else sa.and_(names_there == name, numbers_there == number)


def _named_by_these_alone(name: str, number: int | None) -> "sa.Select[str]":
    """The digests of the name's version, or of all, that no other version has."""
    which = _of(name, number, versions.c.name, versions.c.version)
    digests = sa.select(versions.c.digest).where(which).distinct().subquery()
    others = sa.exists().where(versions.c.digest == digests.c.digest, sa.not_(which))
    return sa.select(digests.c.digest).where(sa.not_(others)).order_by(digests.c.digest)


def is_named(connection: sa.Connection, digest: str) -> bool:
    """Whether any version has this digest."""
    query = sa.select(versions.c.digest).where(versions.c.digest == digest).limit(1)
    return connection.execute(query).first() is not None


def _forget_uncommitted(recorder: Recorder, connection: sa.Connection) -> None:
    """In a transaction, so that nobody else is just giving the same numbers out."""
    for version in recorder.written:
        mine = (versions.c.name == version.name, versions.c.version == version.version)
        if connection.execute(sa.select(versions.c.version).where(*mine)).first() is None:
            recorder.forget(version)


def _refuse_held(connection: sa.Connection, name: str, number: int | None, force: bool, of: Viewpoint) -> None:
    """Conflict, naming whatever holds the version, or one of all; `force` lets aliases go. Other projects'
    compositions are counted, but for the operator.
    """
    holders: list[str] = []
    has_aliases = False
    if not force:
        held = sa.select(aliases.c.alias).where(_of(name, number, aliases.c.name, aliases.c.version))
        holders += [
            f"the alias {of.shown(name)}@{alias}" for alias in connection.execute(held.order_by("alias")).scalars()
        ]
        has_aliases = bool(holders)
    blends = sa.select(parts.c.name, parts.c.version).distinct()
    blends = blends.where(_of(name, number, parts.c.part_name, parts.c.part_version))
    rows = connection.execute(blends.order_by(parts.c.name, parts.c.version)).all()
    blended = [
        f"the composition {of.shown(row.name)}@{row.version}" for row in rows if of.sees_all or of.owns(row.name)
    ]
    if num_others := len(rows) - len(blended):
        blended.append(f"{num_others} composition{'s' if num_others > 1 else ''} of other projects")
    holders += blended
    if not holders:
        return
    helps = ["?force=true deletes aliases with it"] if has_aliases else []
    helps += ["delete the compositions first"] if len(rows) > num_others else []
    helps += ["make it private, which ends their use, and ask the operator to delete theirs"] if num_others else []
    shown = f"{', '.join(holders[:20])}{', …' if len(holders) > 20 else ''}"
    raise Conflict(f"held by {shown}: {'; '.join(helps)}")


def _mend_latest(connection: sa.Connection, name: str) -> None:
    """Where `latest` names a version that went, the highest left becomes it; it then isn't moved back any more.

    A name without versions is private: what is published under it one day was nobody's to share.
    """
    mine = names.c.name == name
    is_gone = names.c.latest.not_in(sa.select(versions.c.version).where(versions.c.name == name))
    connection.execute(sa.update(names).where(mine, is_gone).values(latest=_newest(name)))
    is_empty = names.c.latest.is_(None)
    connection.execute(sa.update(names).where(mine, is_empty).values(is_public=False))
    is_newest = sa.or_(is_empty, names.c.latest == _newest(name))
    connection.execute(sa.update(names).where(mine, is_newest).values(rolled_back=False))


def _newest(name: str) -> "sa.ScalarSelect[int]":
    """The highest number of the name's versions."""
    return sa.select(sa.func.max(versions.c.version)).where(versions.c.name == name).scalar_subquery()


def _next_number(connection: sa.Connection, name: str, kind: Kind) -> int:
    """Counts the name's number up, and locks the name. InvalidInput, or Conflict where it is of another kind."""
    project, own = split_key(name)
    if fault := name_fault(own):
        raise InvalidInput.of("name", fault)
    mine = names.c.name == name
    counted = sa.update(names).where(mine).values(next_version=names.c.next_version + 1)
    if connection.execute(counted).rowcount == 0:
        connection.execute(sa.insert(names).values(name=name, project=project, kind=kind, next_version=2))
    row = connection.execute(sa.select(names).where(mine)).one()
    refuse_other_kind(own, row.kind if row.latest is not None else None, kind)
    number: int = row.next_version - 1
    return number


def refuse_other_kind(name: str, existing: str | None, kind: Kind) -> None:
    """Conflict where `name` has versions, of the kind `existing`, and would get one of another kind."""
    if existing is not None and existing != kind:
        owner = "a composition" if existing == "composition" else "an adapter"
        raise Conflict(f"'{name}' is the name of {owner}: choose another one, or delete that first")


def one_version(connection: sa.Connection, name: str, number: int) -> Version:
    """The version, which is there."""
    mine = (versions.c.name == name, versions.c.version == number)
    return version_of(connection.execute(select_versions(*mine)).mappings().all())


def _blend(name: str, number: int, leaves: tuple[Part, ...], made_of: Sequence[Version], of: Viewpoint) -> Version:
    """What is listed of a composition: that of its parts together, where that has a meaning."""
    by_digest = {version.digest: version for version in made_of}.values()  # equal bytes take their rows once
    origin = Origin.of(seen(of, version) for version in made_of)
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
        parent=render(Term(of.shown(part.name), part.version, weight=part.weight) for part in leaves),
        key_id=of.key_id,
        version=number,
        created_at=datetime.now(UTC),
        parts=leaves,
    )


def _point(connection: sa.Connection, name: str, alias: str, version: int) -> None:
    """Makes the alias of `name` mean the version, whatever it meant before."""
    moved = sa.update(aliases).where(aliases.c.name == name, aliases.c.alias == alias).values(version=version)
    if connection.execute(moved).rowcount == 0:
        connection.execute(sa.insert(aliases).values(name=name, alias=alias, version=version))


def _bounded(version: int) -> int:
    """The number, or that of no version where a database could not hold it."""
    return version if version <= MAX_VERSION else 0


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
