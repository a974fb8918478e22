"""Run by Alembic, on the connection and within the transaction that `server.database` hands over."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    transactional_ddl=True,  # SQLite can, once a transaction was begun explicitly: all steps are done or none
)
context.run_migrations()
