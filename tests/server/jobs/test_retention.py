"""Removal of jobs' files by age; a removal killed anywhere leaves all of them or none."""

import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.errors import Conflict, NotFound
from server.database import connect
from server.jobs.files import JobFiles, Retention, Statuses
from server.jobs.jobs import Jobs, Status
from server.jobs.leases import Leases
from tests.server.jobs import stub_job
from tests.server.jobs.job_kit import submit

KILLED = 9
ROOT = Path(__file__).parents[3]
DAY = timedelta(days=1)


@pytest.fixture
def retention(tmp_path: Path, jobs: Jobs) -> Retention:
    return Retention(tmp_path, jobs)


def leave_files(home: Path, job_id: str) -> None:
    """Write 1,500 bytes in three folders."""
    files = JobFiles(home)
    (files.checkpoints(job_id) / "1-10").mkdir(parents=True)
    files.model(job_id).mkdir()
    for path in (files.log(job_id), files.checkpoints(job_id) / "1-10" / "state.json", files.model(job_id) / "m"):
        path.write_bytes(bytes(500))


def end(engine: sa.Engine, jobs: Jobs, home: Path, job_id: str, at: datetime) -> None:
    submit(jobs, job_id)
    leave_files(home, job_id)
    jobs.cancel(job_id)
    with engine.begin() as connection:
        statement = sa.text("UPDATE jobs SET finished_at = :at WHERE id = :id").bindparams(
            sa.bindparam("at", at, sa.DateTime(timezone=True)), id=job_id
        )
        connection.execute(statement)


def stored(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "jobs").iterdir())


def test_prune_removes_files_by_age(tmp_path: Path, engine: sa.Engine, jobs: Jobs, retention: Retention) -> None:
    now = datetime.now(UTC)
    for days in (1, 3, 5):
        end(engine, jobs, tmp_path, f"ended-{days}", now - days * DAY)
    submit(jobs, "waits")
    leave_files(tmp_path, "waits")
    everything = ["ended-1", "ended-3", "ended-5", "waits"]
    assert retention.prune(now - 6 * DAY) == []
    found = retention.prune(now - 2 * DAY, dry_run=True)
    assert [(removal.job_id, removal.num_bytes) for removal in found] == [("ended-5", 1500), ("ended-3", 1500)]
    assert stored(tmp_path) == everything
    assert retention.prune(now - 2 * DAY) == found
    assert stored(tmp_path) == ["ended-1", "waits"]
    assert retention.prune(now - 2 * DAY) == []
    assert [removal.job_id for removal in retention.prune(now)] == ["ended-1"]
    assert stored(tmp_path) == ["waits"]
    assert jobs.get("waits").files_removed_at is None
    removed_at = jobs.get("ended-1").files_removed_at
    assert removed_at is not None
    assert now <= removed_at <= datetime.now(UTC)
    assert [event.message for event in jobs.events("ended-1")] == ["queued", "cancelled"]


def test_files_of_a_running_job_cannot_be_removed(
    tmp_path: Path, jobs: Jobs, leases: Leases, retention: Retention
) -> None:
    submit(jobs, "j1")
    leave_files(tmp_path, "j1")
    assert leases.claim("w") is not None
    with pytest.raises(Conflict, match="the job is running: cancel it first"):
        retention.remove("j1")
    with pytest.raises(NotFound):
        retention.remove("j2")
    assert stored(tmp_path) == ["j1"]
    jobs.cancel("j1")
    assert retention.remove("j1") == 1500
    assert retention.remove("j1") == 0


def test_files_of_a_late_process_are_removed_later(tmp_path: Path, jobs: Jobs, retention: Retention) -> None:
    """The process of a cancelled job may be writing a checkpoint when its files are removed."""
    submit(jobs, "j1")
    submit(jobs, "j2")
    jobs.cancel("j1")
    jobs.cancel("j2")
    retention.remove("j1")
    leave_files(tmp_path, "j1")
    leave_files(tmp_path, "j2")
    retention.finish()
    assert stored(tmp_path) == ["j2"]
    leave_files(tmp_path, "j1")
    (removal,) = retention.prune(datetime.now(UTC) - DAY)
    assert (removal.job_id, removal.num_bytes) == ("j1", 1500)
    assert stored(tmp_path) == ["j2"]


def statuses_of(status: Status | None) -> Statuses:
    """Return the statuses for jobs that all have this one."""
    return lambda job_ids: {} if status is None else dict.fromkeys(job_ids, status)


@pytest.mark.parametrize("status", [*Status, None])
def test_checkpoints_of_unended_jobs_and_models_of_successes_stay(tmp_path: Path, status: Status | None) -> None:
    """This includes jobs that aren't known here: they may be about to be queued."""
    leave_files(tmp_path, "j1")
    files = JobFiles(tmp_path)
    files.sweep_ended(statuses_of(status))
    assert files.checkpoints("j1").exists() is (status is None or not status.has_ended)
    assert files.model("j1").exists() is (status not in (Status.FAILED, Status.CANCELLED))
    assert files.log("j1").exists()


ROWS = {"data.json", "train.safetensors", "validation.safetensors"}


def leave_rows(home: Path, job_id: str) -> None:
    leave_files(home, job_id)
    for name in ROWS:
        (JobFiles(home).directory(job_id) / name).write_bytes(bytes(100))


def names(home: Path, job_id: str) -> set[str]:
    return {path.name for path in JobFiles(home).directory(job_id).iterdir()}


@pytest.mark.parametrize("status", [*Status, None])
def test_rows_of_unended_jobs_stay(tmp_path: Path, status: Status | None) -> None:
    leave_rows(tmp_path, "j1")
    before = names(tmp_path, "j1")
    JobFiles(tmp_path).sweep_ended(statuses_of(status))
    gone = ROWS | {"checkpoints"} if status is not None and status.has_ended else set()
    if status in (Status.FAILED, Status.CANCELLED):
        gone |= {"model"}
    assert names(tmp_path, "j1") == before - gone


@pytest.mark.parametrize("status", [*Status, None])
def test_an_abandoned_half_of_a_model_is_removed(tmp_path: Path, status: Status | None) -> None:
    """The attempt that wrote it was killed, and its job was cancelled before another attempt."""
    leave_files(tmp_path, "j1")
    shutil.rmtree(JobFiles(tmp_path).checkpoints("j1"))
    old, new = (JobFiles(tmp_path).directory("j1") / f".unfinished-model-{name}" for name in ("old", "new"))
    for half in (old, new):
        half.mkdir()
    os.utime(old, (0, 0))
    JobFiles(tmp_path).sweep_ended(statuses_of(status))
    assert old.exists() is (status is None or not status.has_ended)
    assert new.exists(), "a download may be fetching it"


def test_a_model_alone_is_removed_if_its_job_has_no_result(tmp_path: Path) -> None:
    """The attempt stored the model, and its job was cancelled before the attempt could store its end."""
    leave_files(tmp_path, "j1")
    shutil.rmtree(JobFiles(tmp_path).checkpoints("j1"))
    JobFiles(tmp_path).sweep_ended(statuses_of(Status.CANCELLED))
    assert names(tmp_path, "j1") == {"log.txt"}


def test_old_folders_of_jobs_never_submitted_are_removed(tmp_path: Path, jobs: Jobs, retention: Retention) -> None:
    """The server was killed in between, and restarts long before the folder's age shows that it is abandoned."""
    submit(jobs, "j1")
    for job_id in ("j1", "old", "new"):
        leave_rows(tmp_path, job_id)
        shutil.rmtree(JobFiles(tmp_path).model(job_id))
    for job_id in ("j1", "old"):
        os.utime(JobFiles(tmp_path).directory(job_id), (0, 0))
    retention.sweep()
    assert stored(tmp_path) == ["j1", "new"]


def test_a_model_outlives_the_database(tmp_path: Path, retention: Retention) -> None:
    """The database was set aside as damaged, or is about to be restored: the model can't be made again."""
    for job_id in ("job-1", "job-2"):
        leave_files(tmp_path, job_id)
        os.utime(JobFiles(tmp_path).directory(job_id), (0, 0))
    shutil.rmtree(JobFiles(tmp_path).model("job-2"))
    os.utime(JobFiles(tmp_path).directory("job-2"), (0, 0))
    retention.sweep()
    assert stored(tmp_path) == ["job-1"]
    assert JobFiles(tmp_path).model("job-1").is_dir()


def test_cancelling_removes_rows(tmp_path: Path, jobs: Jobs, retention: Retention) -> None:
    for job_id in ("j1", "j2"):
        submit(jobs, job_id)
        leave_rows(tmp_path, job_id)
    assert retention.cancel("j1").status is Status.CANCELLED
    assert names(tmp_path, "j1") == {"log.txt", "checkpoints", "model"}
    assert names(tmp_path, "j2") > ROWS
    with pytest.raises(Conflict):
        retention.cancel("j1")
    with pytest.raises(NotFound):
        retention.cancel("j3")


@pytest.mark.parametrize("left", [1, 2, 3])
def test_a_server_removes_rows_that_a_kill_left(
    tmp_path: Path, jobs: Jobs, retention: Retention, left: int
) -> None:
    """The client that cancelled the job may have removed some of them."""
    for job_id in ("j1", "j2"):
        submit(jobs, job_id)
        leave_rows(tmp_path, job_id)
    jobs.cancel("j1")
    for name in sorted(ROWS)[: 3 - left]:
        (JobFiles(tmp_path).directory("j1") / name).unlink()
    retention.sweep()
    assert names(tmp_path, "j1") == {"log.txt"}
    assert names(tmp_path, "j2") > ROWS
    assert jobs.get("j1").files_removed_at is None


REMOVER = """
import os, sys
from pathlib import Path
import sqlalchemy as sa
from server.jobs.jobs import Jobs
from server.jobs.files import Retention
from tests.server.jobs.stub_job import connect  # the quick one

STEPS = {"open", "os.remove", "os.rmdir", "os.scandir", "statement"}

def remove(home, last):
    engine = connect(home)
    retention = Retention(home, Jobs(engine))
    count = 0

    def step(event, *_):
        nonlocal count
        count += event in STEPS
        if count == last:
            os._exit(9)

    for event in ("before_cursor_execute", "after_cursor_execute", "commit"):
        sa.event.listen(engine, event, lambda *_: step("statement"))
    sys.addaudithook(step)
    retention.remove("j1")

for line in sys.stdin:
    home, last = line.split()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            remove(Path(home), int(last))
            code = 0
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_kill_anywhere_leaves_all_files_or_none(tmp_path: Path) -> None:
    original = make_home(tmp_path / "original")
    kept: list[int] = []
    gone: list[int] = []
    command = [sys.executable, "-c", REMOVER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as remover:
        assert remover.stdin is not None
        assert remover.stdout is not None
        code = KILLED
        while code == KILLED:
            last = len(kept) + len(gone) + 1
            home = shutil.copytree(original, tmp_path / str(last))
            print(home, last, file=remover.stdin, flush=True)
            code = int(remover.stdout.readline())
            engine = stub_job.connect(home)
            jobs = Jobs(engine)
            Retention(home, jobs).finish()  # as a server does when it starts
            job = jobs.get("j1")
            engine.dispose()
            assert job.status is Status.CANCELLED
            if job.files_removed_at is None:
                assert files_of(home) == files_of(original)
                kept.append(last)
            else:
                assert not JobFiles(home).directory("j1").exists()
                gone.append(last)
    assert code == 0
    assert len(kept) > 3
    assert len(gone) > 8
    assert max(kept) < min(gone)


def make_home(home: Path) -> Path:
    engine = connect(home)
    submit(Jobs(engine), "j1")
    leave_files(home, "j1")
    Jobs(engine).cancel("j1")
    engine.dispose()
    return home


def files_of(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "jobs" / "j1").rglob("*"))
