"""The database's schema, one Alembic revision at a time. `server.database.connect` runs the missing ones.

During a rolling upgrade on PostgreSQL, processes of the previous version keep running, and restart, while a
revision is applied and afterwards. So a revision expands: it adds tables, indices, and columns that are nullable
or have a server default. A later release contracts: it removes what no supported version uses any more. The row of
`schema_range` states the lowest revision whose smolora may use the database. A revision that contracts sets it to
the first revision that doesn't need what is removed; a revision that expands leaves it as it is. A revision is
short, since writers wait for it.
"""
