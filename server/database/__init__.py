"""The database: a SQLite file under HOME, or PostgreSQL if SMOLORA_DATABASE_URL is set.

`opening` chooses the database. `file` and `postgres` have the code for one database each; no other module knows
which database it uses. The SQL works with both databases. `clock` has SQL expressions for the database's time, and
`migrations` has the schema.
"""

from server.database.file import (
    FILE_NAME,
    Commits,
    build_of,
    copy,
    copy_alone,
    existing,
    faults,
    nobody_has_it_open,
    opened_copy,
    schema_of,
    set_aside,
)
from server.database.migrating import knows_schema, migrate
from server.database.opening import (
    WORKER_PATIENCE_SECONDS,
    Place,
    agree,
    as_startup_error,
    commits_at_once,
    commits_of,
    connect,
    described,
    is_file,
    records_of,
    refuse_in_use,
    refuse_unused,
    silence_of,
    without_writers_lock,
)

__all__ = [
    "FILE_NAME",
    "WORKER_PATIENCE_SECONDS",
    "Commits",
    "Place",
    "agree",
    "as_startup_error",
    "build_of",
    "commits_at_once",
    "commits_of",
    "connect",
    "copy",
    "copy_alone",
    "described",
    "existing",
    "faults",
    "is_file",
    "knows_schema",
    "migrate",
    "nobody_has_it_open",
    "opened_copy",
    "records_of",
    "refuse_in_use",
    "refuse_unused",
    "schema_of",
    "set_aside",
    "silence_of",
    "without_writers_lock",
]
