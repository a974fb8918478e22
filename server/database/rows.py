"""Copy all rows of tables from one database to another of the same schema, compare and check them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from adapters.errors import InvalidInput
from adapters.sql import reader_of
from server.errors import StartupError
from server.system.messages import plural

_STREAMED = {"yield_per": 500}
_MODULUS = 1 << 256


@dataclass(frozen=True)
class Content:
    """A table's content: the number of rows, and a digest of the rows that doesn't depend on their order."""

    num_rows: int
    digest: int


def copy_rows(source: sa.Connection, target: sa.Connection, tables: Sequence[sa.Table]) -> None:
    """Insert the rows of `source` into `target`, table by table.

    In `tables`, a table must come after the tables that it refers to. The numbers that the database gives to new
    rows continue after the copied ones. Raise StartupError if PostgreSQL can't store a text.
    """
    for table in tables:
        for rows in source.execute(sa.select(table), execution_options=_STREAMED).mappings().partitions():
            try:
                target.execute(sa.insert(table), [dict(row) for row in rows])
            except InvalidInput:
                raise StartupError(
                    f"the table {table.name} has a text with a NUL character or half of a surrogate pair, which "
                    "PostgreSQL can't store: delete what has it"
                ) from None
        if target.dialect.name != "sqlite" and (column := table.autoincrement_column) is not None:
            last = sa.select(sa.func.max(column)).scalar_subquery()
            sequence = sa.func.pg_get_serial_sequence(table.name, column.name)
            target.execute(sa.select(sa.func.setval(sequence, sa.func.coalesce(last, 1), last.is_not(None))))


def row_faults(engine: sa.Engine, tables: Sequence[sa.Table]) -> list[str]:
    """Return what is wrong with the tables: missing ones, missing columns, and rows that refer to missing rows.

    A database refuses such rows itself, unless its constraints were off, for example while a dump was restored.
    """
    found = []
    with reader_of(engine).connect() as connection:
        schema = sa.inspect(connection)
        names = set(schema.get_table_names())
        for table in tables:
            if table.name not in names:
                found.append(f"has no table {table.name}")
                continue
            columns = {column["name"] for column in schema.get_columns(table.name)}
            missing = [column.name for column in table.columns if column.name not in columns]
            found += [f"the table {table.name} has no column {column}" for column in missing]
        if found:
            return found
        for table in tables:
            for constraint in table.foreign_key_constraints:
                parent = constraint.referred_table.alias()
                pairs = [(part.parent, parent.c[part.column.name]) for part in constraint.elements]
                has_parent = sa.exists().where(*(child == column for child, column in pairs))
                refers = [child.is_not(None) for child, _ in pairs]
                orphans = sa.select(sa.func.count()).select_from(table).where(*refers, ~has_parent)
                if number := connection.execute(orphans).scalar_one():
                    name = constraint.referred_table.name
                    found.append(f"{plural(number, 'row')} of {table.name} refer to what {name} doesn't have")
    return found


def contents(connection: sa.Connection, tables: Sequence[sa.Table]) -> dict[str, Content]:
    """Return each table's content, by the table's name."""
    found = {}
    for table in tables:
        num_rows = total = 0
        for row in connection.execute(sa.select(table), execution_options=_STREAMED):
            num_rows += 1
            total += int.from_bytes(hashlib.sha256(repr(tuple(row)).encode("utf-8", "surrogatepass")).digest())
        found[table.name] = Content(num_rows, total % _MODULUS)
    return found


def refuse_rows(connection: sa.Connection, tables: Sequence[sa.Table], where: str) -> None:
    """Raise StartupError if one of the tables has rows. `where` names the database for the message."""
    for table in tables:
        if connection.execute(sa.select(sa.literal(1)).select_from(table).limit(1)).first() is not None:
            raise StartupError(f"{where} isn't empty, it has {table.name}: give an empty one")
