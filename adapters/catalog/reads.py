"""How what the tables know by keys looks to a project: its own names alone, others' with their project.

From digests to what requests call them, for whoever watches the server as a whole.

The catalog's reads: each one statement, and its rows as plain values.

A name is a key here, in what goes in and in what comes out; what a person reads is as their project sees it.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TypeVar

import sqlalchemy as sa

from adapters.catalog.tables import aliases, names, parts, versions
from adapters.catalog.versions import Adapter, Part, Version, gather, times
from adapters.errors import InvalidInput, NotFound
from adapters.expression import MAX_PARTS, MAX_WEIGHT, Term
from adapters.names import DEFAULT_PROJECT, NAME, Viewpoint, key_of, near, slips, split_key
from adapters.sql import reader_of

_OF_PARTS = re.compile(rf"(?:(?:{NAME.pattern}/)?{NAME.pattern}@[0-9]+: )+")
"""With what a warning begins that was kept with a part, or a part's part: see `Origin.of`."""


def seen(of: Viewpoint, version: Version) -> Version:
    """A version. Of another project's, how it was made stays there, unless all is seen."""
    name, parts = of.shown(version.name), tuple(part_seen(of, part) for part in version.parts)
    if of.sees_all or of.owns(version.name):
        is_same = name == version.name and parts == version.parts
        return version if is_same else replace(version, name=name, parts=parts)
    hidden = replace(version, parent=None, job_id=None, data_digest=None, config={}, key_id=None)
    warnings = dict.fromkeys(_without_parts(text) for text in version.warnings)
    return replace(hidden, name=name, parts=parts, warnings=tuple(warnings))


def part_seen(of: Viewpoint, part: Part) -> Part:
    """A part of a composition, or of an expression."""
    name = of.shown(part.name)
    return part if name == part.name else replace(part, name=name)


def adapter_seen(of: Viewpoint, adapter: Adapter) -> Adapter:
    """A name with its versions."""
    versions = tuple(seen(of, version) for version in adapter.versions)
    return replace(adapter, name=of.shown(adapter.name), versions=versions)


def _without_parts(warning: str) -> str:
    found = _OF_PARTS.match(warning)
    return warning if found is None else warning[found.end() :]


_MAX_DIGESTS = 500  # of one statement


class NamesByDigest:
    """The names of one database; `keys` where they aren't the default project's. Thread-safe."""

    def __init__(self, engine: sa.Engine) -> None:
        self._reader = reader_of(engine)

    def __call__(self, digests: Collection[str]) -> list[str]:
        """Every expression of one term that means these bytes and no others: names, then versions, then aliases.

        A composition is among them by its name, where all its parts are.
        """
        wanted = sorted(digests)[:_MAX_DIGESTS]
        with self._reader.connect() as connection:
            found = connection.execute(_versions_of_digests().where(versions.c.digest.in_(wanted))).all()
            moved = connection.execute(_aliases().where(versions.c.digest.in_(wanted))).all()
            composed = connection.execute(_compositions(wanted)).scalars().all()
        latest = sorted({row.name for row in found if row.latest == row.version} | set(composed))
        numbered = sorted(f"{row.name}@{row.version}" for row in found)
        return latest + numbered + sorted(f"{row.name}@{row.alias}" for row in moved)


def _versions_of_digests() -> "sa.Select[str, int, int]":
    query = sa.select(versions.c.name, versions.c.version, names.c.latest)
    return query.join(names, names.c.name == versions.c.name)


def _aliases() -> "sa.Select[str, str]":
    same = sa.and_(aliases.c.name == versions.c.name, aliases.c.version == versions.c.version)
    return sa.select(aliases.c.name, aliases.c.alias).join(versions, same)


def _compositions(digests: list[str]) -> "sa.Select[str]":
    """Those whose latest version has no part but these; found from the parts on, by their index."""
    uses = parts.alias()
    is_part = sa.and_(uses.c.part_name == versions.c.name, uses.c.part_version == versions.c.version)
    candidates = sa.select(uses.c.name).join(versions, is_part).where(versions.c.digest.in_(digests))
    others = parts.alias()
    lacks = sa.exists().where(
        others.c.name == names.c.name, others.c.version == names.c.latest, others.c.part_digest.not_in(digests)
    )
    has = sa.exists().where(parts.c.name == names.c.name, parts.c.version == names.c.latest)
    return sa.select(names.c.name).where(names.c.name.in_(candidates), has, sa.not_(lacks))


LATEST = "latest"
MAX_VERSION = 2**31 - 1
_NEIGHBOURS = 8  # names on either side of a misspelt one, in their order
_SHOWN_VERSIONS = 10
_GUESSED = 2  # names of one answer for which the meant one is looked for; and as many of which aliases are shown
_SHOWN = 10  # aliases

_PART = (parts.c.place, parts.c.part_name, parts.c.part_version, parts.c.part_digest, parts.c.weight)
_OF_VERSION = sa.and_(parts.c.name == versions.c.name, parts.c.version == versions.c.version)

# Built once: that takes longer than running them.
_LATEST = sa.select(names.c.name, names.c.latest).where(names.c.name.in_(sa.bindparam("names", expanding=True)))
_ALIASES = (
    sa.select(aliases.c.alias)
    .where(aliases.c.name == sa.bindparam("name"))
    .order_by(aliases.c.alias)
    .limit(sa.literal_column(str(_SHOWN)))
)


def _near() -> "sa.CompoundSelect[str]":
    """The project's names before and after `name` in their order, and those of `slips` that there are; public
    ones alone, unless `sees_private`.
    """
    name = sa.bindparam("name", type_=sa.String)
    may_see = sa.or_(sa.bindparam("sees_private", type_=sa.Boolean), names.c.is_public)
    exists = sa.select(names.c.name).where(names.c.latest.is_not(None), may_see)
    exists = exists.where(names.c.project == sa.bindparam("project"))
    num = sa.literal_column(str(_NEIGHBOURS), sa.Integer)
    after = exists.where(names.c.name > name).order_by(names.c.name).limit(num).subquery()
    before = exists.where(names.c.name < name).order_by(names.c.name.desc()).limit(num).subquery()
    slipped = exists.where(names.c.name.in_(sa.bindparam("slips", expanding=True)))
    return sa.union_all(sa.select(after.c.name), sa.select(before.c.name), slipped)


_NEAR = _near()


def select_adapters(chosen: "sa.Select[str]") -> "sa.Select[tuple[object, ...]]":
    """Adapters of the chosen names, a row for each version, alias and part: `adapters_of` puts them together."""
    aliased = sa.and_(aliases.c.name == versions.c.name, aliases.c.version == versions.c.version)
    return (
        sa.select(versions, names.c.latest, names.c.is_public, aliases.c.alias, *_PART)
        .where(versions.c.name.in_(chosen))
        .join(names, names.c.name == versions.c.name)
        .outerjoin(aliases, aliased)
        .outerjoin(parts, _OF_VERSION)
        .order_by(versions.c.name, versions.c.version, aliases.c.alias, parts.c.place)
    )


def in_sight(of: Viewpoint) -> sa.ColumnElement[bool]:
    """Of names: those of its project, or all where it sees all."""
    return sa.true() if of.sees_all else names.c.project == of.project


def select_listed(of: Viewpoint, after: str | None, contains: str | None, public: bool) -> "sa.Select[str]":
    """Keys in their order: of what the project sees, or with `public` of all that others may use; those after the
    name, and those whose names, as they are told, have the text in them in whichever case.
    """
    wanted = names.c.is_public if public else in_sight(of)
    query = sa.select(names.c.name).where(names.c.latest.is_not(None), wanted).order_by(names.c.name)
    if after is not None:
        query = query.where(names.c.name > of.key(after))
    if contains is not None:
        query = query.where(sa.func.lower(_told(of)).contains(contains.lower(), autoescape=True))
    return query


def _told(of: Viewpoint) -> sa.ColumnElement[str]:
    """`of.shown` of a key."""
    start = sa.func.length(names.c.project) + 2
    own = sa.case((names.c.project == DEFAULT_PROJECT, names.c.name), else_=sa.func.substr(names.c.name, start))
    return sa.case((names.c.project == of.project, own), else_=names.c.project + "/" + own)


def select_visible(name: str, of: Viewpoint) -> "sa.Select[str]":
    """Whether another project's name may be seen: it is public, or all are seen."""
    query = sa.select(names.c.name).where(names.c.name == name)
    return query if of.sees_all else query.where(names.c.is_public)


def select_latest() -> "sa.Select[tuple[str, datetime]]":
    """All names, each with the moment at which what it means now was made: a row for each."""
    is_latest = sa.and_(versions.c.name == names.c.name, versions.c.version == names.c.latest)
    return sa.select(names.c.name, versions.c.created_at).join(versions, is_latest).order_by(names.c.name)


def adapters_of(rows: Iterable[sa.RowMapping]) -> list[Adapter]:
    """Rows of `select_adapters`, grouped by name."""
    latest: dict[str, tuple[int, bool]] = {}
    by_version: dict[str, dict[int, list[sa.RowMapping]]] = {}
    by_alias: dict[str, dict[str, int]] = {}
    for row in rows:
        name, number = row["name"], row["version"]
        latest[name] = row["latest"], row["is_public"]
        by_version.setdefault(name, {}).setdefault(number, []).append(row)
        if row["alias"] is not None:
            by_alias.setdefault(name, {})[row["alias"]] = number
    return [
        Adapter(name, number, by_alias.get(name, {}), tuple(map(version_of, by_version[name].values())), is_public)
        for name, (number, is_public) in latest.items()
    ]


def select_versions(*which: sa.ColumnElement[bool]) -> "sa.Select[tuple[object, ...]]":
    """Versions, a row for each part of one: `version_of` puts those of one version together."""
    query = sa.select(versions, *_PART).where(*which).outerjoin(parts, _OF_VERSION)
    return query.order_by(versions.c.name, versions.c.version, parts.c.place)


def version_of(rows: Sequence[sa.RowMapping]) -> Version:
    """All rows of one version."""
    fields = {column.name: rows[0][column.name] for column in versions.columns}
    fields |= {key: tuple(fields[key]) for key in ("target_modules", "warnings")}
    found = {row["place"]: row for row in rows if row["place"] is not None}  # once for each alias
    return Version(**fields, parts=tuple(_part(found[place], 1.0) for place in sorted(found)))


def resolve(connection: sa.Connection, terms: Sequence[Term], field: str, of: Viewpoint) -> tuple[Part, ...]:
    """See `Catalog.resolve`."""
    terms = [replace(term, name=of.key(term.name)) for term in terms]
    hidden = _hidden(connection, {place: term.name for place, term in enumerate(terms)}, of)
    known = [
        (place, term)
        for place, term in enumerate(terms)
        if place not in hidden and (term.version or 0) <= MAX_VERSION
    ]
    rows: Sequence[sa.RowMapping] = ()
    if known:
        rows = connection.execute(sa.union_all(*(lookup(place, term) for place, term in known))).mappings().all()
    found = {row["term"] for row in rows}
    if missing := [term for place, term in enumerate(terms) if place not in found]:
        raise NotFound("; ".join(why_missing(connection, of, *missing)))
    leaves = tuple(_leaf(row, terms[row["term"]]) for row in sorted(rows, key=_order))
    _check_leaves(leaves, field)
    if unshared := _hidden(connection, {leaf: leaf.name for leaf in leaves}, of):
        told = ", ".join(sorted({f"{of.shown(leaf.name)}@{leaf.version}" for leaf in unshared}))
        raise NotFound(f"a composition has parts that their project no longer shares: {told}")
    return leaves


_T = TypeVar("_T")


def _hidden(connection: sa.Connection, keys: Mapping[_T, str], of: Viewpoint) -> set[_T]:
    """Those whose key is another project's and not that of a public name: a look-up only where there is any of
    another's. It is the same, and all that is done, for a private name and for one that there isn't: how long an
    answer takes tells nothing of which it is.
    """
    others = set() if of.sees_all else {key for key in keys.values() if not of.owns(key)}
    if not others:
        return set()
    public = sa.select(names.c.name).where(names.c.name.in_(others), names.c.is_public)
    seen = set(connection.execute(public).scalars())
    return {item for item, key in keys.items() if key in others - seen}


def lookup(place: int, term: Term) -> "sa.Select[tuple[object, ...]]":
    """Rows of (term, version, digest, part) if the term means a version: one, or one for each of its parts."""
    here = sa.literal_column(str(place), sa.Integer).label("term")
    query = sa.select(here, versions.c.version, versions.c.digest, *_PART).where(versions.c.name == term.name)
    if term.version is not None:
        return query.where(versions.c.version == term.version).outerjoin(parts, _OF_VERSION)
    table, means = (names, names.c.latest) if term.alias in (None, LATEST) else (aliases, aliases.c.version)
    query = query.join(table, sa.and_(table.c.name == versions.c.name, means == versions.c.version))
    query = query.outerjoin(parts, _OF_VERSION)
    return query if table is names else query.where(aliases.c.alias == term.alias)


def why_missing(connection: sa.Connection, of: Viewpoint, *terms: Term) -> list[str]:
    """What is wrong with terms that name nothing, each said once, and what the first were perhaps meant to be.

    What there is of another project and isn't public is as if there were nothing. Some look-ups by name, however
    many adapters there are and however many terms.
    """
    asked = {term.name: term.name for term in terms}
    rows = connection.execute(_LATEST, {"names": list(asked.keys() - _hidden(connection, asked, of))})
    latest = {row.name: row.latest for row in rows if row.latest is not None}
    unsaid = {"name": _GUESSED, "version": _GUESSED, "alias": _GUESSED}

    def hint(kind: str, tell: Callable[[sa.Connection, str, Viewpoint], str], name: str) -> str:
        unsaid[kind] -= 1
        return tell(connection, name, of) if unsaid[kind] >= 0 else ""

    told: dict[str, str] = {}
    for term in terms:
        if term.reference in told:
            continue
        reference = replace(term, name=of.shown(term.name)).reference
        if term.name not in latest:
            reason = f"no such adapter: {reference}{hint('name', _meant, term.name)}"
        elif term.version is not None:
            reason = f"no such version: {reference}{hint('version', _versions, term.name)}"
        else:
            reason = f"no such alias: {reference}{hint('alias', _others, term.name)}"
        told[term.reference] = reason
    return list(told.values())


def _meant(connection: sa.Connection, key: str, of: Viewpoint) -> str:
    """The project's name that is most like this one, if any is: of its neighbours, and of what a slip can hide."""
    project, name = split_key(key)
    values = {"name": key, "project": project, "sees_private": of.sees_all or of.owns(key)}
    rows = connection.execute(_NEAR, values | {"slips": [key_of(project, slip) for slip in slips(name)]})
    meant = near(name, dict.fromkeys(split_key(found)[1] for found in rows.scalars()))
    return "" if meant is None else f" (did you mean {of.shown(key_of(project, meant))}?)"


def _versions(connection: sa.Connection, name: str, of: Viewpoint) -> str:
    """Names the versions that there are, the newest of many."""
    query = sa.select(versions.c.version).where(versions.c.name == name).order_by(versions.c.version.desc())
    found = list(connection.execute(query.limit(_SHOWN_VERSIONS + 1)).scalars())
    more = ["…"] if len(found) > _SHOWN_VERSIONS else []
    shown = ", ".join([*more, *map(str, reversed(found[:_SHOWN_VERSIONS]))])
    return f" ({of.shown(name)} has {'version' if len(found) == 1 else 'versions'} {shown})"


def _others(connection: sa.Connection, name: str, of: Viewpoint) -> str:
    """Names the aliases that there are."""
    mine = ", ".join(connection.execute(_ALIASES, {"name": name}).scalars())
    return f" ({of.shown(name)} has {mine or 'none but latest'})"


def num_bytes(connection: sa.Connection, project: str, key_id: str | None) -> int:
    """What the project's versions take, or those of one API key; equal bytes once."""
    query = sa.select(versions.c.digest, versions.c.bytes).distinct().join(names, names.c.name == versions.c.name)
    query = query.where(names.c.project == project)
    if key_id is not None:
        query = query.where(versions.c.key_id == key_id)
    total = sa.select(sa.func.coalesce(sa.func.sum(query.subquery().c.bytes), 0))
    return int(connection.execute(total).scalar_one())


def _order(row: sa.RowMapping) -> tuple[int, int]:
    return row["term"], row["place"] or 0


def _leaf(row: sa.RowMapping, term: Term) -> Part:
    if row["place"] is None:
        return Part(term.name, row["version"], row["digest"], term.weight)
    return _part(row, term.weight)


def _part(row: sa.RowMapping, weight: float) -> Part:
    weight = row["weight"] if weight == 1.0 else times(row["weight"], weight)
    return Part(row["part_name"], row["part_version"], row["part_digest"], weight)


def _check_leaves(leaves: Sequence[Part], field: str) -> None:
    """Compositions within an expression multiply and add up, beyond what its grammar could see."""
    if (count := len(gather(leaves))) > MAX_PARTS:
        raise InvalidInput.of(field, f"its compositions come to {count} adapters; at most {MAX_PARTS} may be")
    if any(abs(part.weight) > MAX_WEIGHT for part in leaves):
        limit = f"{MAX_WEIGHT:g}"
        raise InvalidInput.of(field, f"weights, multiplied through compositions, go from -{limit} to {limit}")
