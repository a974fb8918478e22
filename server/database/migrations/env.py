"""The script that Alembic runs, on the connection and in the transaction of `server.database.migrating`."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    transactional_ddl=True,  # SQLite rolls DDL back too, since the transaction was begun explicitly
)
context.run_migrations()
