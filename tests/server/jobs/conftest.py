"""Databases for the queue, and a HOME to train in."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from server.database import WORKER_PATIENCE_SECONDS, connect
from server.jobs.jobs import Jobs
from server.jobs.leases import Leases
from server.model.base.weights import BaseModel
from tests.kits.engines import EngineLoadingAtOnce
from tests.server.jobs.attempt_kit import Shop


@pytest.fixture
def engine(database_url: str | None, new_database: Path, tmp_path: Path) -> Iterator[sa.Engine]:
    """A database with all tables, opened as by a worker: it waits long for other writers.

    Every statement run on it must also compile for PostgreSQL, or the test fails.
    """
    if database_url is None:
        shutil.copy(new_database, tmp_path)
    engine = connect(tmp_path, url=database_url, patience=WORKER_PATIENCE_SECONDS)
    sa.event.listen(engine, "before_execute", _compile_for_postgresql)
    yield engine
    engine.dispose()


def _compile_for_postgresql(connection: sa.Connection, statement: Any, *_: object) -> None:
    if isinstance(statement, sa.ClauseElement):
        statement.compile(dialect=postgresql.dialect())


@pytest.fixture
def jobs(engine: sa.Engine) -> Jobs:
    return Jobs(engine)


@pytest.fixture
def leases(engine: sa.Engine) -> Leases:
    return Leases(engine)


@pytest.fixture
def shop(new_database: Path, tmp_path: Path, tiny_base: BaseModel) -> Iterator[Shop]:
    shutil.copy(new_database, tmp_path)
    engine = connect(tmp_path)
    yield Shop(tmp_path, engine, tiny_base)
    engine.dispose()


@pytest.fixture
def loads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the number of an attempt's moments depends on how long a thread takes to load an adapter."""
    monkeypatch.setattr("server.jobs.scoring.Engine", EngineLoadingAtOnce)
