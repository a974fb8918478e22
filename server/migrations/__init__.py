"""The database's tables, step by step (Alembic). `server.database.connect` runs what is missing."""
