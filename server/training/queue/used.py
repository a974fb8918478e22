"""What a job comes to in the ledger: counted once, in the transaction that ends it."""

from datetime import UTC, datetime

import sqlalchemy as sa

from adapters.viewpoint import key_of
from server.access.principal import ANONYMOUS
from server.access.usage import Account, Usage, add_in
from server.training.queue.tables import jobs


def charge(connection: sa.Connection, job_id: str) -> None:
    """Add the job's tokens and time, as its row has them, to the account of whoever submitted it."""
    columns = (jobs.c.project, jobs.c.key_id, jobs.c.name, jobs.c.progress, jobs.c.run_seconds)
    row = connection.execute(sa.select(*columns).where(jobs.c.id == job_id)).one()
    adapter = key_of(row.project, row.name)
    tokens = row.progress.get("tokens", 0)
    if not tokens and not row.run_seconds:  # it never ran
        return
    account = Account(datetime.now(UTC).date(), row.project, row.key_id or ANONYMOUS, adapter)
    add_in(connection, account, Usage(trained_tokens=int(tokens), job_seconds=row.run_seconds))
