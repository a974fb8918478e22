"""The database's tables, step by step (Alembic). `server.database.connect` runs what is missing.

Processes of the version before go on while a step is run and after it: a rolling upgrade, on PostgreSQL. So a
step only adds: tables, columns that are null or have a default of the server's, indices. What nobody needs any
more goes with the release after the one that stopped using it. A step is short: writers wait for it.
"""
