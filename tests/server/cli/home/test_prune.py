"""`smolora prune`: the files it removes from a HOME, and its report."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from server.cli.main import app
from server.database import agree, connect
from server.errors import StartupError
from server.jobs.files import JobFiles
from server.jobs.jobs import Jobs
from server.storage.reserve import Reserve
from server.training.spec import JobSpec
from tests.kits.small_disk import fill, mounted


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = connect(tmp_path)
    yield engine
    engine.dispose()


@pytest.fixture
def jobs(tmp_path: Path, engine: sa.Engine) -> Jobs:
    """Make j1, which ended four days ago, j2, which ended just now, and j3, which runs. Each has 1,234 bytes."""
    jobs = Jobs(engine)
    for job_id in ("j1", "j2", "j3"):
        jobs.submit(JobSpec("codes"), job_id=job_id, data={})
        JobFiles(tmp_path).directory(job_id).mkdir(parents=True)
        JobFiles(tmp_path).log(job_id).write_bytes(bytes(1234))
    jobs.cancel("j1")
    jobs.cancel("j2")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE jobs SET finished_at = datetime('now', '-4 days') WHERE id = 'j1'")
    return jobs


def prune(home: Path, *arguments: str, **environment: str) -> str:
    result = CliRunner().invoke(app, ["prune", "--home", str(home), *arguments], env=environment)
    assert result.exit_code == 0, result.output
    return result.stdout


def stored(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "jobs").iterdir())


def test_prunes_all_ended_jobs(tmp_path: Path, jobs: Jobs) -> None:
    """Others may have the database open."""
    listed = "j1: 1,234 bytes\nj2: 1,234 bytes\n"
    assert prune(tmp_path, "--dry-run") == f"{listed}2,468 bytes of 2 jobs would be removed\n"
    assert stored(tmp_path) == ["j1", "j2", "j3"]
    assert prune(tmp_path) == f"{listed}2,468 bytes of 2 jobs removed\n"
    assert stored(tmp_path) == ["j3"]
    assert prune(tmp_path) == "0 bytes of 0 jobs removed\n"
    assert [job.id for job in jobs.list()] == ["j3", "j2", "j1"]


def test_prunes_by_age(tmp_path: Path, jobs: Jobs) -> None:
    assert prune(tmp_path, "--older-than", "5") == "0 bytes of 0 jobs removed\n"
    dry = json.loads(prune(tmp_path, "--dry-run", "--json", SMOLORA_RETAIN_JOBS="3"))
    assert dry == {"dry_run": True, "jobs": [{"job_id": "j1", "num_bytes": 1234}], "num_bytes": 1234}
    assert prune(tmp_path, SMOLORA_RETAIN_JOBS="3").endswith("1,234 bytes of 1 job removed\n")
    assert stored(tmp_path) == ["j2", "j3"]


def test_missing_home_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["prune", "--home", str(tmp_path)])
    assert isinstance(result.exception, StartupError)
    assert "isn't a server's home" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


class Elsewhere:
    """A bucket with the bytes of a database."""

    is_home = False
    url = "s3://elsewhere"

    def has_mark(self, place: str) -> bool:
        return True

    def mark(self, place: str) -> None:
        pass


@pytest.mark.parametrize("command", [["prune"], ["projects", "delete", "default"]])
def test_another_bucket_is_refused(tmp_path: Path, engine: sa.Engine, jobs: Jobs, command: list[str]) -> None:
    agree(engine, Elsewhere())
    result = CliRunner().invoke(app, [*command, "--home", str(tmp_path)])
    assert isinstance(result.exception, StartupError)
    assert "are in s3://elsewhere, and not in" in str(result.exception)
    assert stored(tmp_path) == ["j1", "j2", "j3"]


def test_imports_nothing_slow(jobs: Jobs, tmp_path: Path) -> None:
    code = f"""
import sys
from server.cli.main import app
app(["prune", "--home", {str(tmp_path)!r}], standalone_mode=False)
print(sorted({{"torch", "transformers", "fastapi"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_full_disk_without_a_server(tmp_path: Path) -> None:
    """SQLite needs room to open the database, which the reserve provides."""
    with mounted(tmp_path, 4):
        engine = connect(tmp_path)
        Jobs(engine).submit(JobSpec("codes"), job_id="j1", data={})
        Jobs(engine).cancel("j1")
        engine.dispose()
        JobFiles(tmp_path).directory("j1").mkdir(parents=True)
        JobFiles(tmp_path).log("j1").write_bytes(bytes(1234))
        assert Reserve(tmp_path).fill()
        fill(tmp_path)
        assert prune(tmp_path) == "j1: 1,234 bytes\n1,234 bytes of 1 job removed\n"
        assert stored(tmp_path) == []
