"""The catalog's reads: each is one statement, whose rows become plain values.

In arguments and results, a `name` is a key, which includes the project (see `adapters.names`). The `show_…`
functions convert results to what a project sees. In messages, names are as the user's project sees them.
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

LATEST = "latest"
MAX_VERSION = 2**31 - 1
_NEIGHBOURS = 8  # names on either side of a misspelt one, in sorted order
_SHOWN_VERSIONS = 10
_MAX_HINTS = 2  # of each kind in one answer; the kinds are a similar name, the versions and the aliases
_SHOWN_ALIASES = 10

_PART = (parts.c.place, parts.c.part_name, parts.c.part_version, parts.c.part_digest, parts.c.weight)
_OF_VERSION = sa.and_(parts.c.name == versions.c.name, parts.c.version == versions.c.version)

_NUMBER = (
    sa.func.row_number().over(partition_by=versions.c.name, order_by=versions.c.version.desc()).label("number")
)

# built once, since building a statement takes longer than running it
_LATEST = sa.select(names.c.name, names.c.latest).where(names.c.name.in_(sa.bindparam("names", expanding=True)))
_ALIASES = (
    sa.select(aliases.c.alias)
    .where(aliases.c.name == sa.bindparam("name"))
    .order_by(aliases.c.alias)
    .limit(sa.literal_column(str(_SHOWN_ALIASES)))
)


def _near() -> "sa.CompoundSelect[str]":
    """Return a query for the names of a project that a user who mistyped a name may have meant.

    Its parameters are `project`; `name`, the mistyped name; `slips`, what `adapters.names.slips` returns for it;
    and `sees_private`. The query selects the names just before and after `name` in sorted order, and those in
    `slips`. Unless `sees_private` is true, it selects only public names.
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


_OF_PARTS = re.compile(rf"(?:(?:{NAME.pattern}/)?{NAME.pattern}@[0-9]+: )+")
"""The beginning of a warning that was copied from a part, or from a part of a part: see `Origin.of`."""


def show_version(viewpoint: Viewpoint, version: Version) -> Version:
    """Return the version as the project sees it. If it is another project's, how it was made is left out."""
    name, parts = viewpoint.shown(version.name), tuple(show_part(viewpoint, part) for part in version.parts)
    if viewpoint.sees_all or viewpoint.owns(version.name):
        is_same = name == version.name and parts == version.parts
        return version if is_same else replace(version, name=name, parts=parts)
    hidden = replace(version, parent=None, job_id=None, data_digest=None, config={}, key_id=None)
    warnings = dict.fromkeys(_without_parts(text) for text in version.warnings)
    return replace(hidden, name=name, parts=parts, warnings=tuple(warnings))


def show_part(viewpoint: Viewpoint, part: Part) -> Part:
    """Return a part of a composition or of an expression as the project sees it."""
    name = viewpoint.shown(part.name)
    return part if name == part.name else replace(part, name=name)


def show_adapter(viewpoint: Viewpoint, adapter: Adapter) -> Adapter:
    """Return the adapter as the project sees it."""
    versions = tuple(show_version(viewpoint, version) for version in adapter.versions)
    latest = show_version(viewpoint, adapter.latest_version)
    return replace(adapter, name=viewpoint.shown(adapter.name), versions=versions, latest_version=latest)


def _without_parts(warning: str) -> str:
    found = _OF_PARTS.match(warning)
    return warning if found is None else warning[found.end() :]


def select_adapters(
    chosen: "sa.Select[str]", num_versions: int | None = None, below: int | None = None
) -> "sa.Select[tuple[object, ...]]":
    """Return a query for the adapters whose keys `chosen` selects. `adapters_of` reads the rows.

    There is a row for each combination of a version, one of its aliases and one of its parts. With `num_versions`,
    the column `number` is 1 for the newest version, 2 for the next one, and so on; it is null for versions that
    aren't below the version `below`. Versions with higher numbers are left out, except one more, which shows that
    there are more, the latest one, and those with aliases.
    """
    aliased = sa.and_(aliases.c.name == versions.c.name, aliases.c.version == versions.c.version)
    query = (
        sa.select(versions, names.c.latest, names.c.is_public, aliases.c.alias, *_PART)
        .where(versions.c.name.in_(chosen))
        .join(names, names.c.name == versions.c.name)
        .outerjoin(aliases, aliased)
        .outerjoin(parts, _OF_VERSION)
        .order_by(versions.c.name, versions.c.version, aliases.c.alias, parts.c.place)
    )
    if num_versions is None:
        return query.add_columns(sa.literal_column("1", sa.Integer).label("number"))
    counted = sa.select(versions.c.name, versions.c.version, _NUMBER).where(versions.c.name.in_(chosen))
    if below is not None:
        counted = counted.where(versions.c.version < below)
    page = counted.subquery()
    on_page = sa.and_(page.c.name == versions.c.name, page.c.version == versions.c.version)
    query = query.add_columns(page.c.number).outerjoin(page, on_page)
    is_latest = versions.c.version == names.c.latest
    return query.where(sa.or_(page.c.number <= num_versions + 1, is_latest, aliases.c.alias.is_not(None)))


def in_sight(viewpoint: Viewpoint) -> sa.ColumnElement[bool]:
    """Return an SQL condition that selects the project's names, or all names if the viewpoint sees all."""
    return sa.true() if viewpoint.sees_all else names.c.project == viewpoint.project


def select_listed(viewpoint: Viewpoint, after: str | None, contains: str | None, public: bool) -> "sa.Select[str]":
    """Return a query for the sorted keys of the project's adapters or, with `public`, of all public adapters.

    `after` and `contains` are as in `Catalog.list`.
    """
    wanted = names.c.is_public if public else in_sight(viewpoint)
    query = sa.select(names.c.name).where(names.c.latest.is_not(None), wanted).order_by(names.c.name)
    if after is not None:
        query = query.where(names.c.name > viewpoint.key(after))
    if contains is not None:
        query = query.where(sa.func.lower(_shown(viewpoint)).contains(contains.lower(), autoescape=True))
    return query


def _shown(viewpoint: Viewpoint) -> sa.ColumnElement[str]:
    """Return the SQL expression for a name as the viewpoint's project sees it, like `viewpoint.shown`."""
    start = sa.func.length(names.c.project) + 2
    own = sa.case((names.c.project == DEFAULT_PROJECT, names.c.name), else_=sa.func.substr(names.c.name, start))
    return sa.case((names.c.project == viewpoint.project, own), else_=names.c.project + "/" + own)


def select_visible(name: str, viewpoint: Viewpoint) -> "sa.Select[str]":
    """Return a query for a name of another project. It finds no row if the viewpoint may not see the name."""
    query = sa.select(names.c.name).where(names.c.name == name)
    return query if viewpoint.sees_all else query.where(names.c.is_public)


def select_latest() -> "sa.Select[tuple[str, datetime]]":
    """Return a query for all names, each with the time at which its latest version was created."""
    is_latest = sa.and_(versions.c.name == names.c.name, versions.c.version == names.c.latest)
    return sa.select(names.c.name, versions.c.created_at).join(versions, is_latest).order_by(names.c.name)


def adapters_of(rows: Iterable[sa.RowMapping], num_versions: int | None = None) -> list[Adapter]:
    """Return the adapters in the rows of `select_adapters`, each with up to `num_versions` versions."""
    by_name: dict[str, dict[int, list[sa.RowMapping]]] = {}
    by_alias: dict[str, dict[str, int]] = {}
    for row in rows:
        name, version = row["name"], row["version"]
        by_name.setdefault(name, {}).setdefault(version, []).append(row)
        if row["alias"] is not None:
            by_alias.setdefault(name, {})[row["alias"]] = version
    found = []
    for name, by_version in by_name.items():
        of_page: list[Version] = []
        has_more = False
        for of_version in by_version.values():
            number = of_version[0]["number"]
            if number is not None and (num_versions is None or number <= num_versions):
                of_page.append(version_of(of_version))
            elif number is not None:
                has_more = True
        first = next(iter(by_version.values()))[0]
        found.append(
            Adapter(
                name,
                first["latest"],
                by_alias.get(name, {}),
                tuple(of_page),
                version_of(by_version[first["latest"]]),
                first["is_public"],
                of_page[0].version if of_page and has_more else None,
            )
        )
    return found


def select_versions(*which: sa.ColumnElement[bool]) -> "sa.Select[tuple[object, ...]]":
    """Return a query for the versions that meet the conditions `which`, with a row for each part of a version.

    `version_of` reads the rows of one version.
    """
    query = sa.select(versions, *_PART).where(*which).outerjoin(parts, _OF_VERSION)
    return query.order_by(versions.c.name, versions.c.version, parts.c.place)


def version_of(rows: Sequence[sa.RowMapping]) -> Version:
    """Build a version from the rows that `select_versions` or `select_adapters` selects for it."""
    fields = {column.name: rows[0][column.name] for column in versions.columns}
    fields |= {key: tuple(fields[key]) for key in ("target_modules", "warnings")}
    # the rows repeat each part for each alias
    found = {row["place"]: row for row in rows if row["place"] is not None}
    return Version(**fields, parts=tuple(_part(found[place], 1.0) for place in sorted(found)))


def resolve(
    connection: sa.Connection, terms: Sequence[Term], field: str, viewpoint: Viewpoint
) -> tuple[Part, ...]:
    """Return the versions that the terms mean now. See `Catalog.resolve`."""
    terms = [replace(term, name=viewpoint.key(term.name)) for term in terms]
    hidden = _hidden(connection, {place: term.name for place, term in enumerate(terms)}, viewpoint)
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
        raise NotFound("; ".join(why_missing(connection, viewpoint, *missing)))
    leaves = tuple(_leaf(row, terms[row["term"]]) for row in sorted(rows, key=_order))
    _check_leaves(leaves, field)
    if unshared := _hidden(connection, {leaf: leaf.name for leaf in leaves}, viewpoint):
        shown = ", ".join(sorted({f"{viewpoint.shown(leaf.name)}@{leaf.version}" for leaf in unshared}))
        raise NotFound(f"a composition has parts that their project no longer shares: {shown}")
    return leaves


_T = TypeVar("_T")


def _hidden(connection: sa.Connection, keys: Mapping[_T, str], viewpoint: Viewpoint) -> set[_T]:
    """Return those items of the mapping `keys` whose adapters belong to other projects and aren't public.

    `keys` maps an item to its adapter's key. This takes one query if there are keys of other projects, else none.
    Private and missing names are treated alike, so that the time of an answer doesn't reveal whether a name is
    private or missing.
    """
    others = set() if viewpoint.sees_all else {key for key in keys.values() if not viewpoint.owns(key)}
    if not others:
        return set()
    public = sa.select(names.c.name).where(names.c.name.in_(others), names.c.is_public)
    seen = set(connection.execute(public).scalars())
    return {item for item, key in keys.items() if key in others - seen}


def lookup(place: int, term: Term) -> "sa.Select[tuple[object, ...]]":
    """Return a query for what a term means: one row for an adapter, or a row for each part of a composition.

    Each row has `place`, the term's index, in the column `term`.
    """
    here = sa.literal_column(str(place), sa.Integer).label("term")
    query = sa.select(here, versions.c.version, versions.c.digest, *_PART).where(versions.c.name == term.name)
    if term.version is not None:
        return query.where(versions.c.version == term.version).outerjoin(parts, _OF_VERSION)
    table, means = (names, names.c.latest) if term.alias in (None, LATEST) else (aliases, aliases.c.version)
    query = query.join(table, sa.and_(table.c.name == versions.c.name, means == versions.c.version))
    query = query.outerjoin(parts, _OF_VERSION)
    return query if table is names else query.where(aliases.c.alias == term.alias)


def why_missing(connection: sa.Connection, viewpoint: Viewpoint, *terms: Term) -> list[str]:
    """Return one message for each missing term. The first few messages suggest what was meant.

    Other projects' private adapters count as missing. The number of queries depends neither on the number of
    adapters nor on the number of terms.
    """
    asked = {term.name: term.name for term in terms}
    rows = connection.execute(_LATEST, {"names": list(asked.keys() - _hidden(connection, asked, viewpoint))})
    latest = {row.name: row.latest for row in rows if row.latest is not None}
    num_left = {"name": _MAX_HINTS, "version": _MAX_HINTS, "alias": _MAX_HINTS}

    def hint(kind: str, find: Callable[[sa.Connection, str, Viewpoint], str], name: str) -> str:
        num_left[kind] -= 1
        return find(connection, name, viewpoint) if num_left[kind] >= 0 else ""

    reasons: dict[str, str] = {}
    for term in terms:
        if term.reference in reasons:
            continue
        reference = replace(term, name=viewpoint.shown(term.name)).reference
        if term.name not in latest:
            reason = f"no such adapter: {reference}{hint('name', _meant, term.name)}"
        elif term.version is not None:
            reason = f"no such version: {reference}{hint('version', _versions, term.name)}"
        else:
            reason = f"no such alias: {reference}{hint('alias', _others, term.name)}"
        reasons[term.reference] = reason
    return list(reasons.values())


def _meant(connection: sa.Connection, key: str, viewpoint: Viewpoint) -> str:
    """Return a hint with the name most similar to the name in `key`, or "" if no name is similar.

    Only names of the same project are suggested: the neighbours in sorted order, and the names that differ by one
    common typo.
    """
    project, name = split_key(key)
    values = {"name": key, "project": project, "sees_private": viewpoint.sees_all or viewpoint.owns(key)}
    rows = connection.execute(_NEAR, values | {"slips": [key_of(project, slip) for slip in slips(name)]})
    meant = near(name, dict.fromkeys(split_key(found)[1] for found in rows.scalars()))
    return "" if meant is None else f" (did you mean {viewpoint.shown(key_of(project, meant))}?)"


def _versions(connection: sa.Connection, name: str, viewpoint: Viewpoint) -> str:
    """Return a hint that lists the versions of `name`, or the newest ones if there are many."""
    query = sa.select(versions.c.version).where(versions.c.name == name).order_by(versions.c.version.desc())
    found = list(connection.execute(query.limit(_SHOWN_VERSIONS + 1)).scalars())
    more = ["…"] if len(found) > _SHOWN_VERSIONS else []
    shown = ", ".join([*more, *map(str, reversed(found[:_SHOWN_VERSIONS]))])
    return f" ({viewpoint.shown(name)} has {'version' if len(found) == 1 else 'versions'} {shown})"


def _others(connection: sa.Connection, name: str, viewpoint: Viewpoint) -> str:
    """Return a hint that lists the aliases of `name`."""
    mine = ", ".join(connection.execute(_ALIASES, {"name": name}).scalars())
    return f" ({viewpoint.shown(name)} has {mine or 'none but latest'})"


def num_bytes(connection: sa.Connection, project: str, key_id: str | None) -> int:
    """Return the total size in bytes of the project's versions.

    If `key_id` is given, count only the versions that this API key published. Versions with equal weights count
    once.
    """
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
    """Raise InvalidInput if there are too many `leaves`, or if the weight of a leaf is too large.

    The leaves are an expression's parts, with each composition replaced by its own parts.
    """
    if (count := len(gather(leaves))) > MAX_PARTS:
        raise InvalidInput.of(field, f"its compositions have {count} parts together, the most is {MAX_PARTS}")
    if any(abs(part.weight) > MAX_WEIGHT for part in leaves):
        limit = f"{MAX_WEIGHT:g}"
        raise InvalidInput.of(field, f"weights, multiplied through compositions, must be from -{limit} to {limit}")


_MAX_DIGESTS = 500  # in one statement


class NamesByDigest:
    """Looks up adapters' names in one database by digest, for metrics of the whole server. Thread-safe.

    Adapters of projects other than `default` are named with their project, such as "acme/tweets".
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._reader = reader_of(engine)

    def __call__(self, digests: Collection[str]) -> list[str]:
        """Return all names, versions ("name@2") and aliases ("name@alias") of adapters with these digests.

        The name of a composition is included if all its parts are among the digests.
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
    """Return a query for the compositions whose latest versions have only parts with these digests."""
    uses = parts.alias()
    is_part = sa.and_(uses.c.part_name == versions.c.name, uses.c.part_version == versions.c.version)
    candidates = sa.select(uses.c.name).join(versions, is_part).where(versions.c.digest.in_(digests))
    others = parts.alias()
    lacks = sa.exists().where(
        others.c.name == names.c.name, others.c.version == names.c.latest, others.c.part_digest.not_in(digests)
    )
    has = sa.exists().where(parts.c.name == names.c.name, parts.c.version == names.c.latest)
    return sa.select(names.c.name).where(names.c.name.in_(candidates), has, sa.not_(lacks))
