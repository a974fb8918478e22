"""Run by Alembic, on the connection and within the transaction that `server.database.migrating` passes in."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    transactional_ddl=True,  # SQLite rolls DDL back too, since the transaction was begun explicitly
)
context.run_migrations()
