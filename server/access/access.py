"""Access to a server: its API keys, projects, usage, rate limits and audit log, in one database."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from adapters.sql import reader_of
from server.access.audit import Audit
from server.access.keys import KeyRing, Keys
from server.access.projects import Projects
from server.access.rates import MemoryRates, Rates
from server.access.tables import changes
from server.access.usage import Ledger
from server.database import is_file
from server.database.silence import Outage


@dataclass(frozen=True)
class Access:
    """A server's API keys, projects, usage, rate limits and audit log, in one database."""

    keys: Keys
    projects: Projects
    ring: KeyRing
    rates: Rates
    ledger: Ledger
    audit: Audit

    def keep(self, used: Mapping[str, datetime]) -> None:
        """Store the usage that `ledger` has gathered, and `used`, the keys' times of last use by key id.

        This blocks on the disk.
        """
        self.ledger.flush()
        if used:
            self.keys.used(used)


def open_access(
    engine: sa.Engine,
    keyed: Path,
    commits: Callable[[], int],
    fixed_keys: Sequence[str] = (),
    allow_guests: bool = False,
    outage: Outage | None = None,
) -> Access:
    """Create the `Access` of a server from its database.

    `keyed` is as in `Keys`; `fixed_keys`, `allow_guests` and `outage` are as in `KeyRing`. `commits` is a cheap
    function: it returns a number that changes with every commit to the database.
    """
    keys, projects = Keys(engine, keyed), Projects(engine)
    ring = KeyRing(
        keys,
        projects,
        commits,
        fixed_keys,
        allow_guests,
        changes=partial(_num_changes, reader_of(engine)),
        is_remote=not is_file(engine),
        outage=outage,
    )
    ring.refresh_now()
    return Access(keys, projects, ring, _rates(engine, outage or Outage()), Ledger(engine), Audit(engine))


def _rates(engine: sa.Engine, outage: Outage) -> Rates:
    if is_file(engine):
        return MemoryRates()
    from server.access.database_rates import DatabaseRates

    return DatabaseRates(engine, outage)


def _num_changes(reader: sa.Engine) -> int:
    with reader.connect() as connection:
        number: int = connection.execute(sa.select(changes.c.number)).scalar_one()
        return number
