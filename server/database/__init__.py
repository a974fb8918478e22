"""The database: a SQLite file under HOME, or PostgreSQL where SMOLORA_DATABASE_URL names it.

`opening` chooses; what one of the two needs and the other doesn't is in `file` and in `postgres`, and nothing else
knows which it is. The SQL is what both have in common; `clock` is the time that both tell.
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
    commits_at_once,
    commits_of,
    connect,
    described,
    is_file,
    records_of,
    refuse_in_use,
    told_to_a_person,
)

__all__ = [
    "FILE_NAME",
    "WORKER_PATIENCE_SECONDS",
    "Commits",
    "Place",
    "agree",
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
    "schema_of",
    "set_aside",
    "told_to_a_person",
]
