"""Make the catalog and its records agree: after a crash, and after the loss of the database.

A version without a record gets a record. If the records don't show a name's next version number, the number is
recorded, too.
For a record without a version there are two cases:

- Its number is below the name's next version number in the database. Then a delete was interrupted, and the
  record is removed.
- Its number isn't below it. Then a publication was interrupted, or the database was lost or restored from an older
  copy. The version is published if its bytes exist. The exception is a version whose job is in the database: the
  job publishes the version itself, or ended before it could.

So the same code repairs a crash and rebuilds the catalog from the records. Aliases, a `latest` that was moved
back, jobs, and which adapters are public aren't in the records: they are lost with the database.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

import sqlalchemy as sa

from adapters.catalog.reads import select_versions, version_of
from adapters.catalog.records import Found, Records
from adapters.catalog.tables import names
from adapters.catalog.versions import Version
from adapters.catalog.writes import insert_in
from adapters.names import split_key
from adapters.sql import transact


@dataclass(frozen=True)
class Recovered:
    """What `recover` has repaired, with versions as "name@version".

    The `adopted` versions were published again. The `lost` ones can't be: their bytes or parts are missing.
    """

    adopted: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    num_written: int = 0  # records that were missing or differed, and were written
    num_dropped: int = 0  # records of deleted versions that were removed

    def lines(self) -> tuple[str, ...]:
        """Return messages for people, or () if nothing was missing."""
        found = []
        if self.adopted:
            again = f"the database didn't know {_joined(self.adopted)}: published again"
            found.append(f"{again}; where it is a new one, aliases and jobs are lost")
        if self.lost:
            found.append(f"the bytes, or the parts, of {_joined(self.lost)} are missing or damaged: lost")
        return tuple(found)


def recover(
    engine: sa.Engine,
    records: Records,
    is_stored: Callable[[str], bool],
    is_known: Callable[[str], bool],
) -> Recovered:
    """Make the catalog and its records agree, in one transaction, and return what was repaired.

    `is_stored(digest)` returns whether the bytes exist, `is_known(job_id)` whether the database has the job.
    """

    def work(connection: sa.Connection) -> Recovered:
        records.clean()
        found = records.read()
        listed = _listed(connection)
        rows = connection.execute(sa.select(names.c.name, names.c.next_version))
        numbers: dict[str, int] = {row.name: row.next_version for row in rows}
        recorded = {(version.name, version.version): version for version in found.versions}
        missing = [version for key, version in listed.items() if recorded.get(key) != version]
        for version in missing:
            records.write(version)
        _record_numbers(records, found, listed, numbers)
        strays = [version for key, version in recorded.items() if key not in listed]
        owed = [version for version in strays if version.version >= numbers.get(version.name, 1)]
        owed = [version for version in owed if version.job_id is None or not is_known(version.job_id)]
        _count_up(connection, found, numbers, owed)
        adopted, lost = _adopt(connection, owed, set(listed), is_stored)
        kept = {(version.name, version.version) for version in (*adopted, *lost)}
        dropped = [version for version in strays if (version.name, version.version) not in kept]
        for name, of_name in groupby(dropped, key=lambda version: version.name):
            gone, following = [version.version for version in of_name], numbers.get(name, 1)
            if new := [number for number in gone if number >= following]:
                records.forget(name, new)
            records.remove(name, [number for number in gone if number < following])
        return Recovered(_names(adopted), _names(lost), len(missing), len(dropped))

    return transact(engine, work)


def _listed(connection: sa.Connection) -> dict[tuple[str, int], Version]:
    rows: dict[tuple[str, int], list[sa.RowMapping]] = {}
    for row in connection.execute(select_versions()).mappings():
        rows.setdefault((row["name"], row["version"]), []).append(row)
    return {key: version_of(of) for key, of in rows.items()}


def _count_up(
    connection: sa.Connection, found: Found, numbers: Mapping[str, int], owed: Iterable[Version]
) -> None:
    """Increase the names' next version numbers (`numbers`) so that no number in the records is used again.

    `found` is the content of the records; `owed` are versions that have records but are missing in the database.
    """
    wanted = {name: (number, "adapter") for name, number in found.next_versions.items()}
    for version in owed:
        number, _ = wanted.get(version.name, (1, ""))
        wanted[version.name] = max(number, version.version + 1), version.kind
    for name, (number, kind) in wanted.items():
        if name not in numbers and number > 1:
            project = split_key(name)[0]
            connection.execute(sa.insert(names).values(name=name, project=project, kind=kind, next_version=number))
        elif number > numbers.get(name, number):
            connection.execute(sa.update(names).where(names.c.name == name).values(next_version=number))


def _record_numbers(
    records: Records, found: Found, listed: Iterable[tuple[str, int]], numbers: Mapping[str, int]
) -> None:
    """Record the next version number of each name (`numbers`), unless the records show it already.

    They show it if it follows the highest number of the name's versions (`listed`), or if the file `next` has it.
    """
    recorded = dict(found.next_versions)
    for name, number in listed:
        recorded[name] = max(recorded.get(name, 1), number + 1)
    for name, number in numbers.items():
        if number > recorded.get(name, 1):
            records.count_up(name, number)


def _adopt(
    connection: sa.Connection,
    owed: Iterable[Version],
    listed: set[tuple[str, int]],
    is_stored: Callable[[str], bool],
) -> tuple[list[Version], list[Version]]:
    """Publish the versions in `owed` whose bytes or parts exist, compositions last.

    `owed` are versions that have records but are missing in the database; `listed` are those in the database.
    Return the published versions and the lost versions.
    """
    adopted: list[Version] = []
    lost: list[Version] = []
    for version in sorted(owed, key=lambda version: (bool(version.parts), version.name, version.version)):
        parts = {(part.name, part.version) for part in version.parts}
        if parts <= listed if parts else is_stored(version.digest):
            insert_in(connection, version, None, moves_latest=version.moves_latest)
            listed.add((version.name, version.version))
            adopted.append(version)
        else:
            lost.append(version)
    return adopted, lost


def _joined(names: tuple[str, ...], limit: int = 20) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _names(found: Iterable[Version]) -> tuple[str, ...]:
    return tuple(f"{version.name}@{version.version}" for version in found)
