"""The database's schema, one Alembic revision at a time. `server.database.connect` runs the missing ones.

During a rolling upgrade on PostgreSQL, processes of the previous version keep running while a revision is applied
and afterwards. So a revision only adds: tables, indices, and columns that are nullable or have a server default.
A later release removes what no supported version uses any more. A revision is short, since writers wait for it.
"""
