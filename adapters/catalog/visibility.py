"""Which names other projects may use. A public composition shows its parts, so they must be public, too."""

from collections.abc import Iterable

import sqlalchemy as sa

from adapters.catalog.reads import why_missing
from adapters.catalog.tables import lock, names, parts
from adapters.catalog.versions import Part
from adapters.errors import Conflict, NotFound
from adapters.expression import Term
from adapters.viewpoint import Viewpoint


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
