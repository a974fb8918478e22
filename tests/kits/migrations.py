"""A later version of smolora, in whose schema there is one more revision than in this one's."""

import shutil
from pathlib import Path

import pytest

from server.database import migrating

NEWEST = migrating.newest_schema()
LATER = f"{int(NEWEST) + 1:04}"
_REVISION = f'''
import sqlalchemy as sa
from alembic import op

revision = "{LATER}"
down_revision = "{NEWEST}"


def upgrade() -> None:
    op.add_column("projects", sa.Column("later", sa.Integer))
    op.execute("UPDATE schema_range SET lowest = '{{lowest}}'")
'''


def upgrade_smolora(monkeypatch: pytest.MonkeyPatch, scratch: Path, lowest: str = NEWEST) -> None:
    """Have this process know the revision LATER, until the test ends.

    Versions whose newest revision is older than `lowest` can't use a database with that revision.
    """
    migrations = scratch / "50% migrations"
    shutil.copytree(migrating.MIGRATIONS, migrations)
    (migrations / "versions" / f"v{LATER}_later.py").write_text(_REVISION.format(lowest=lowest))
    monkeypatch.setattr(migrating, "MIGRATIONS", migrations)
