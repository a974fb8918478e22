"""Which place has the bytes that the rows name: an id in the database, and a mark of that id where they are.

Who starts first makes both. So no server can work with another bucket, or another HOME, than those beside it.
The file under HOME has its bytes beside it unless it says otherwise, and needs no mark.
"""

import secrets
from typing import Protocol

import sqlalchemy as sa

from adapters.catalog.tables import transact
from server.database.opening import is_file
from server.errors import StartupError

MOVING = "moving-"
"""How the id begins of a place that `smolora move` fills just now, for a database that has nothing yet."""

metadata = sa.MetaData()

places = sa.Table(
    "bytes_place",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),  # of its one row: 1
    sa.Column("place", sa.String(64), nullable=False),
    sa.Column("told", sa.Text, nullable=False),  # for a person; no credentials
)


class Place(Protocol):
    """Where bytes are. `is_home`: in HOME alone."""

    @property
    def is_home(self) -> bool: ...
    @property
    def told(self) -> str: ...
    def has_mark(self, place: str) -> bool: ...
    def mark(self, place: str) -> None: ...


def agree(engine: sa.Engine, place: Place) -> None:
    """See that the database's bytes are there, from now on for good where it has none yet. Raises StartupError."""

    def work(connection: sa.Connection) -> None:
        row = connection.execute(sa.select(places)).one_or_none()
        if row is None and not (place.is_home and is_file(engine)):
            put_place(connection, place)
        elif row is not None and row.place.startswith(MOVING):
            raise StartupError("smolora move is at work on this database, or was cut off: run it again")
        elif row is not None and ((place.is_home and is_file(engine)) or not place.has_mark(row.place)):
            raise StartupError(
                f"{'SMOLORA_HOME' if place.is_home else 'SMOLORA_BYTES_URL'}: this database's adapters and data "
                f"are in {row.told}, and not in {place.told}: give all servers and workers on it the same place"
            )

    transact(engine, work)


def refuse_elsewhere(engine: sa.Engine, why: str) -> None:
    """Raises StartupError where the bytes of a file under HOME are in an object store, and says `why`."""
    with engine.connect() as connection:
        if (told := connection.execute(sa.select(places.c.told)).scalar_one_or_none()) is not None:
            raise StartupError(f"this HOME's adapters and data are in {told}: {why}")


def put_place(connection: sa.Connection, place: Place, prefix: str = "") -> str:
    """Mark the place and name it, in the place of any other, within a transaction; the id, after `prefix`."""
    made = prefix + secrets.token_hex(16)
    place.mark(made)  # first: where the commit fails, a mark too many does no harm
    connection.execute(sa.delete(places))
    connection.execute(sa.insert(places).values(id=1, place=made, told=place.told))
    return made


def place_in(connection: sa.Connection) -> str | None:
    """The id; None where no server has started yet, or the bytes are in HOME beside the file."""
    return connection.execute(sa.select(places.c.place)).scalar_one_or_none()
