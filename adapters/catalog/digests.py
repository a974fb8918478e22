"""From digests to what requests call them, for whoever watches the server as a whole."""

from collections.abc import Collection

import sqlalchemy as sa

from adapters.catalog.tables import aliases, names, parts, versions

_MAX_DIGESTS = 500  # of one statement


class NamesByDigest:
    """The names of one database; `keys` where they aren't the default project's. Thread-safe."""

    def __init__(self, engine: sa.Engine) -> None:
        self._reader = engine.execution_options(isolation_level="AUTOCOMMIT")

    def __call__(self, digests: Collection[str]) -> list[str]:
        """Every expression of one term that means these bytes and no others: names, then versions, then aliases.

        A composition is among them by its name, where all its parts are.
        """
        wanted = sorted(digests)[:_MAX_DIGESTS]
        with self._reader.connect() as connection:
            found = connection.execute(_versions().where(versions.c.digest.in_(wanted))).all()
            moved = connection.execute(_aliases().where(versions.c.digest.in_(wanted))).all()
            composed = connection.execute(_compositions(wanted)).scalars().all()
        latest = sorted({row.name for row in found if row.latest == row.version} | set(composed))
        numbered = sorted(f"{row.name}@{row.version}" for row in found)
        return latest + numbered + sorted(f"{row.name}@{row.alias}" for row in moved)


def _versions() -> "sa.Select[str, int, int]":
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
