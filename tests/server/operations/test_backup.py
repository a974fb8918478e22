"""Backups of a HOME that changes at the same time, and their restores."""

import gzip
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.catalog.records import Records
from adapters.peft.files import WEIGHTS_NAME
from server import database
from server.access.keys import Keys
from server.database import FILE_NAME, connect, schema_of
from server.errors import StartupError
from server.jobs.files import Retention
from server.jobs.jobs import Jobs, Status
from server.jobs.leases import Claim, Leases
from server.jobs.tables import jobs as job_table
from server.operations import backup as backups
from server.operations.backup import Made, back_up
from server.operations.doctor import examine
from server.operations.restore import restore
from server.storage.home import RESTORING, Home, make, serving
from server.training.datasets import DatasetStore
from tests.kits.migrations import LATER, NEWEST, upgrade_smolora
from tests.server.api.adapters.registry import Registry, digest_of, write_files
from tests.server.jobs.job_kit import submit

ROWS = b'{"text": "a"}\n'


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """Make a@2 and a@3 (a@1 and the newest, a@4, were deleted), b@1, mix@1 = a@2+b@1, an alias; latest is rolled
    back."""
    files = tmp_path / "files"
    files.mkdir()
    write_files(files)
    registry = Registry(tmp_path / "home", files)
    registry.do({"do": "upload", "name": "a", "seed": 3})
    registry.do({"do": "upload", "name": "a", "seed": 0})
    registry.do({"do": "train", "name": "a", "seed": 1, "alias": "prod", "job": "job-7"})
    registry.do({"do": "upload", "name": "a", "seed": 3})
    for version in (1, 4):
        registry.do({"do": "delete", "name": "a", "version": version, "force": False})
    registry.do({"do": "upload", "name": "b", "seed": 2})
    registry.do({"do": "compose", "name": "mix", "expression": "a@2+b"})
    registry.do({"do": "point", "name": "a", "alias": "latest", "version": 2})
    yield registry
    registry.close()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "backup.tar"


@pytest.fixture(autouse=True)
def kept(target: Path) -> None:
    target.parent.mkdir()


def contents(home: Path) -> dict[str, bytes]:
    """Return every file of a HOME except the database and locks."""
    paths = (path for path in home.rglob("*") if path.is_file() and not path.name.startswith((FILE_NAME, ".lock")))
    found = {path.relative_to(home).as_posix(): path.read_bytes() for path in paths}
    found.pop("server.lock", None)
    return found


def checkpoint(home: Path, job_id: str, name: str, content: bytes = b"state") -> None:
    place = home / "jobs" / job_id / "checkpoints" / name
    place.mkdir(parents=True)
    (place / "state.json").write_bytes(content)
    (place / "state.safetensors").write_bytes(content)


def rows(engine: sa.Engine, table: str) -> list[tuple[object, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(f"SELECT * FROM {table} ORDER BY 1, 2")]


@pytest.mark.parametrize("name", ["backup.tar", "backup.tar.gz"])
def test_a_restore_has_everything(registry: Registry, target: Path, tmp_path: Path, name: str) -> None:
    home, target, again = registry.home, target.with_name(name), tmp_path / "again"
    Keys(registry.engine, Home(home).keyed).create("ci", who="test")
    for project in ("default", "acme"):
        DatasetStore(Home(home).datasets(project)).put(BytesIO(ROWS), "rows.jsonl")
    (home / "jobs" / "job-7" / "model").mkdir(parents=True)
    (home / "jobs" / "job-7" / "log.txt").write_text("said")
    (home / "jobs" / "job-7" / "model" / "config.json").write_text("{}")
    before = contents(home)
    for left_out in ("models/base/weights", "native/step.so", "tmp/upload-1", "reserve", "serving", "hub/x"):
        (home / left_out).parent.mkdir(parents=True, exist_ok=True)
        (home / left_out).write_text("can be made again")

    made = back_up(home, target)
    assert made == Made(4, 3, 1, 0, 2, made.num_bytes, 1, ())
    assert target.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in target.parent.iterdir()] == [name]
    assert (target.read_bytes()[:2] == b"\x1f\x8b") is name.endswith(".gz")

    done = restore(target, again)
    assert done.diagnosis.is_sound
    assert (done.diagnosis.num_versions, done.diagnosis.num_adapters, done.going_on) == (4, 3, ())
    assert again.stat().st_mode & 0o777 == 0o700
    assert contents(again) == before
    assert (again / "keyed").exists()
    engine = connect(again)
    for table in ("adapters", "adapter_versions", "adapter_aliases", "jobs", "job_events", "api_keys", "audit"):
        assert rows(engine, table) == rows(registry.engine, table), table
    engine.dispose()
    returned = Registry(again, tmp_path / "files")
    returned.restart()
    assert contents(again) == before
    returned.do({"do": "upload", "name": "a", "seed": 3})
    assert returned.catalog.get("a").latest == 5, "no number is given out twice"
    returned.close()


def test_the_numbers_of_deleted_versions_survive_the_next_loss_of_the_database(
    registry: Registry, target: Path, tmp_path: Path
) -> None:
    back_up(registry.home, target)
    restore(target, tmp_path / "again")
    assert Records(tmp_path / "again" / "adapters").read().next_versions["a"] == 5


class Meddler:
    """Changes HOME just before the backup looks at the n-th folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, meddle: Callable[[], None]) -> None:
        self.num_looks = 0
        keep = backups._Backup._keep

        def watched(backup: backups._Backup, folder: Path, kept: set[str], grows: bool = False) -> bool:
            self.num_looks += 1
            if self.num_looks == at:
                meddle()
            return keep(backup, folder, kept, grows)

        monkeypatch.setattr(backups._Backup, "_keep", watched)


@pytest.mark.parametrize("at", range(1, 7))
def test_concurrent_deletes_and_publications_lose_nothing(
    registry: Registry, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    uploads = DatasetStore(Home(registry.home).datasets("default"))
    data = uploads.put(BytesIO(ROWS), "rows.jsonl")
    for folder in ("jobs/job-7", "jobs/job-7/model"):
        (registry.home / folder).mkdir(exist_ok=True, parents=True)
        (registry.home / folder / "file").write_text("content")

    def meddle() -> None:
        registry.do({"do": "delete", "name": "mix", "version": None, "force": True})
        registry.do({"do": "delete", "name": "a", "version": None, "force": True})
        registry.do({"do": "upload", "name": "c", "seed": 3})
        registry.do({"do": "compose", "name": "mix2", "expression": "b+c"})
        uploads.delete(data.id)
        registry.jobs.remove_files("job-7")
        for name in ("model/file", "file"):
            (registry.home / "jobs" / "job-7" / name).unlink()

    meddler = Meddler(monkeypatch, at, meddle)
    made = back_up(registry.home, target)
    assert meddler.num_looks >= at
    done = restore(target, tmp_path / "again")
    assert done.diagnosis.is_sound, done.diagnosis.findings
    engine = connect(tmp_path / "again")
    there = {name for name, *_ in rows(engine, "adapters")}
    assert made.num_rounds == 2, "the job's folder went"
    assert {"b", "c", "mix2"} <= there
    assert not (tmp_path / "again" / "jobs" / "job-7").exists()
    engine.dispose()


def test_a_version_that_is_published_and_deleted_repeatedly(
    registry: Registry, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five times the bytes are missing when the backup looks for them, each time of another version."""
    keep = backups._Backup._keep
    number = 0

    def watched(backup: backups._Backup, folder: Path, kept: set[str], grows: bool = False) -> bool:
        nonlocal number
        if folder.name == digest_of(3) and number < 5:
            number += 1
            registry.do({"do": "delete", "name": "c", "version": None, "force": True})
            found = keep(backup, folder, kept, grows)
            registry.do({"do": "upload", "name": "c", "seed": 3})
            return found
        return keep(backup, folder, kept, grows)

    registry.do({"do": "upload", "name": "c", "seed": 3})
    monkeypatch.setattr(backups._Backup, "_keep", watched)
    back_up(registry.home, target)
    assert restore(target, tmp_path / "again").diagnosis.is_sound


def running(registry: Registry, job_id: str, lease_seconds: float = 250.0) -> Claim:
    (registry.home / "jobs" / job_id).mkdir(parents=True)
    (registry.home / "jobs" / job_id / "data.json").write_text("{}")
    submit(registry.jobs, job_id)
    claim = Leases(registry.engine).claim("elsewhere:1", lease_seconds)
    assert claim is not None
    assert claim.job_id == job_id
    return claim


def test_a_running_job_resumes_in_the_restored_home(registry: Registry, target: Path, tmp_path: Path) -> None:
    """It resumes at once, although its lease hasn't expired, and the time in between doesn't count."""
    claim = running(registry, "job-8")
    running(registry, "job-9")
    registry.jobs.pause("job-9")
    with registry.engine.begin() as connection:
        long_ago = {"timed_at": 1e6, "run_seconds": 3.5}
        connection.execute(sa.update(job_table).where(job_table.c.id == "job-8").values(long_ago))
    checkpoint(registry.home, "job-8", "1-3", b"older")
    checkpoint(registry.home, "job-8", "1-4", b"newest")
    (registry.home / "jobs" / "job-8" / "checkpoints" / ".unfinished-1-5-x").mkdir()

    assert back_up(registry.home, target).num_unended_jobs == 2
    again = tmp_path / "again"
    assert restore(target, again).going_on == ("job-8", "job-9")
    assert [path.name for path in (again / "jobs" / "job-8" / "checkpoints").iterdir()] == ["1-4"]
    engine = connect(again)
    jobs, leases = Jobs(engine), Leases(engine)
    assert jobs.get("job-8").status is Status.QUEUED
    assert jobs.get("job-9").status is Status.PAUSED
    assert jobs.events("job-8")[-1].message == "restored from a backup, in which a worker had it"
    taken = leases.claim("here:1", 60)
    assert taken == Claim("job-8", claim.token + 1, "here:1")
    leases.fail(taken, "enough")
    with engine.connect() as connection:
        seconds = connection.execute(
            sa.select(job_table.c.run_seconds).where(job_table.c.id == "job-8")
        ).scalar_one()
    assert 3.5 <= seconds < 60
    engine.dispose()
    registry.jobs.get("job-8")  # the backed-up state is unchanged
    assert registry.jobs.get("job-8").status is Status.RUNNING


@pytest.mark.parametrize("at", range(1, 5))
def test_job_that_ends_during_a_backup_is_complete(
    registry: Registry, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    (registry.home / "jobs" / "job-8").mkdir(parents=True)
    (registry.home / "jobs" / "job-8" / "data.json").write_text("{}")
    submit(registry.jobs, "job-8")

    def meddle() -> None:
        Retention(registry.home, registry.jobs).cancel("job-8")

    meddler = Meddler(monkeypatch, at, meddle)
    back_up(registry.home, target)
    assert meddler.num_looks >= at
    again = tmp_path / "again"
    assert restore(target, again).diagnosis.is_sound
    engine = connect(again)
    has_ended = Jobs(engine).get("job-8").status is Status.CANCELLED
    engine.dispose()
    assert has_ended or (again / "jobs" / "job-8" / "data.json").exists()


def test_a_checkpoint_is_never_newer_than_the_database(
    registry: Registry, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the job's metrics would have a gap."""
    running(registry, "job-8")
    checkpoint(registry.home, "job-8", "1-4")
    copy = database.copy

    def then_trained(home: Path, copied: Path) -> None:
        copy(home, copied)
        if not (home / "jobs" / "job-8" / "checkpoints" / "1-5").exists():
            checkpoint(home, "job-8", "1-5")

    monkeypatch.setattr(backups, "copy", then_trained)
    back_up(registry.home, target)
    restore(target, tmp_path / "again")
    assert [path.name for path in (tmp_path / "again" / "jobs" / "job-8" / "checkpoints").iterdir()] == ["1-4"]


def test_damage_is_reported_and_restored_as_it_is(registry: Registry, target: Path, tmp_path: Path) -> None:
    of_a, of_b = (registry.home / "adapters" / d[:2] / d for d in (digest_of(0), digest_of(2)))
    content = bytearray((of_a / WEIGHTS_NAME).read_bytes())
    content[-1] ^= 1
    (of_a / WEIGHTS_NAME).write_bytes(content)
    of_b.rename(tmp_path / "gone")
    root = Home(registry.home).datasets("default")
    dataset = DatasetStore(root).put(BytesIO(b'{"text": "a"}'), "a.jsonl")
    (root / dataset.id / "rows.jsonl").write_bytes(b'{"text":"b"}\n')
    made = back_up(registry.home, target)
    assert len(made.damaged) == 3
    assert sum("no longer match" in line for line in made.damaged) == 2
    done = restore(target, tmp_path / "again")
    assert {finding.about for finding in done.diagnosis.findings} == {"a@2", "b@1", f"datasets/{dataset.id}"}
    again = tmp_path / "again" / of_a.relative_to(registry.home) / WEIGHTS_NAME
    assert again.read_bytes() == bytes(content)


def test_a_missing_home_and_a_damaged_database_are_refused(
    registry: Registry, target: Path, tmp_path: Path
) -> None:
    with pytest.raises(StartupError, match="isn't a server's home"):
        back_up(tmp_path / "kept", target)
    assert list(target.parent.iterdir()) == []
    registry.close()
    for path in registry.home.glob(f"{FILE_NAME}-*"):
        path.unlink()
    (registry.home / FILE_NAME).write_bytes(b"something else" * 1000)
    with pytest.raises(StartupError, match="not a database"):
        back_up(registry.home, target)
    with pytest.raises(StartupError, match=r"can't make .*No such file"):
        back_up(registry.home, tmp_path / "nowhere" / "backup.tar")
    assert list(target.parent.iterdir()) == []


def test_a_failing_backup_keeps_the_older_one(
    registry: Registry, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_up(registry.home, target)
    before = target.read_bytes()

    def full(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backups._Backup, "_keep", full)
    with pytest.raises(StartupError, match="No space left on device"):
        back_up(registry.home, target)
    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_only_an_empty_home_is_filled(registry: Registry, target: Path, tmp_path: Path) -> None:
    back_up(registry.home, target)
    before = contents(registry.home)
    with pytest.raises(StartupError, match=r"home isn't empty, it has adapters, backed-up, smolora\.db"):
        restore(target, registry.home)
    assert contents(registry.home) == before
    again = tmp_path / "again"
    again.mkdir()
    (again / "lost+found").mkdir()
    with serving(again), pytest.raises(StartupError, match="is served already"):
        restore(target, again)
    (again / "note").write_text("mine")
    with pytest.raises(StartupError, match="it has note"):
        restore(target, again)
    assert (again / "note").read_text() == "mine"
    (again / "note").unlink()
    assert restore(target, again).diagnosis.is_sound


VICTIM = """
import json, os, signal, sys
from pathlib import Path
from server.system.memory import exempt_from_gc
with exempt_from_gc():  # each child would otherwise collect all of it
    import alembic.command  # which a restore asks whether it knows the schema
    from server.operations import backup, restore

def run(what, home, target, step):
    steps = 0
    def hook(event, arguments):
        nonlocal steps
        if event in {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "fcntl.flock"}:
            steps += 1
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)
    work = backup.back_up if what == "backup" else restore.restore
    sys.addaudithook(hook)
    work(*(Path(path) for path in ((home, target) if what == "backup" else (target, home))))
    return steps

for line in sys.stdin:
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, b"%d" % run(*json.loads(line)))
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    print(os.read(reading, 99).decode() or 0, flush=True)
    os.close(reading)
"""
"""A script that runs the command in each line of JSON in a process that dies at its n-th step, and prints the
number of steps, or 0 if it died."""


class Victims:
    """Backups and restores that are killed."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", VICTIM]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, what: str, home: Path, target: Path, step: int = 0) -> int:
        """Return the number of steps, or 0 if it was killed at `step`."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps([what, str(home), str(target), step]) + "\n")
        stdin.flush()
        return int(stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    victims = Victims()
    yield victims
    victims.close()


def test_a_killed_backup_leaves_no_partial_file(registry: Registry, target: Path, victims: Victims) -> None:
    num_steps = victims.run("backup", registry.home, target)
    older = target.stat().st_size
    for step in [*range(1, num_steps - 8, num_steps // 12), *range(num_steps - 8, num_steps)]:
        assert victims.run("backup", registry.home, target, step) == 0
        with tarfile.open(target) as tar:
            assert tar.getnames()[-1] == "manifest.json"
        assert len(list(target.parent.iterdir())) <= 2, "a killed one can't tidy up, but the next one does"
    back_up(registry.home, target)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert target.stat().st_size == older
    assert examine(registry.home).is_sound


def test_a_backup_in_home_is_never_taken_for_a_restore(registry: Registry, victims: Victims) -> None:
    """An interrupted restore would keep servers from starting, and the next one would clear HOME."""
    target, kept = registry.home / "restore-point.tar", registry.home.with_name("kept.tar")
    back_up(registry.home, kept)
    before = contents(registry.home)
    assert victims.run("backup", registry.home, target, victims.run("backup", registry.home, target) // 2) == 0
    assert contents(registry.home).keys() > before.keys()
    make(registry.home)
    with pytest.raises(StartupError, match="isn't empty"):
        restore(kept, registry.home)
    assert contents(registry.home).items() >= before.items()


def test_a_killed_restore_leaves_no_home(
    registry: Registry, target: Path, tmp_path: Path, victims: Victims
) -> None:
    back_up(registry.home, target)
    num_steps = victims.run("restore", tmp_path / "again", target)
    whole = contents(tmp_path / "again")
    num_cut = 0
    for step in [*range(4, num_steps - 16, num_steps // 10), *range(num_steps - 16, num_steps + 1)]:
        place = tmp_path / f"again-{step}"
        assert victims.run("restore", place, target, step) == 0
        if any(place.glob(f"{RESTORING}*")):
            num_cut += 1
            with pytest.raises(StartupError, match="was interrupted: run it again"):
                make(place)
        elif (place / FILE_NAME).exists():
            assert contents(place) == whole
            continue
        assert victims.run("restore", place, target) > 0
        assert contents(place) == whole
        assert examine(place).is_sound
    assert num_cut > 16


class Elsewhere:
    """An object store, as the database remembers it."""

    is_home, url = False, "s3://bytes"

    def has_mark(self, place: str) -> bool:
        return True

    def mark(self, place: str) -> None:
        """Do nothing: the mark exists."""


def test_home_with_bytes_in_a_bucket_is_refused(registry: Registry, target: Path) -> None:
    """Even if the settings, as in another terminal, don't name the bucket: HOME is only a cache."""
    database.agree(registry.engine, Elsewhere())
    with pytest.raises(StartupError, match="are in s3://bytes: HOME only caches some of them"):
        back_up(registry.home, target)
    assert list(target.parent.iterdir()) == []


def test_a_backup_of_a_newer_release_is_refused(registry: Registry, target: Path, tmp_path: Path) -> None:
    back_up(registry.home, target)
    for field, value in (("schema", "9999"), ("format", 2)):
        newer = rewritten(target, field, value)
        with pytest.raises(StartupError, match=r"which is newer than this one .*restore it with that one"):
            restore(newer, tmp_path / "again")
        assert not (tmp_path / "again").exists()


def rewritten(target: Path, field: str, value: object) -> Path:
    """Rewrite the backup with another value in its header."""
    changed = target.with_name(f"{field}.tar.gz")
    with (
        tarfile.open(target) as old,
        gzip.open(changed, "wb") as file,
        tarfile.open(fileobj=file, mode="w|") as new,
    ):
        for entry in old:
            content = old.extractfile(entry)
            assert content is not None
            text = content.read()
            if entry.name == "backup.json":
                text = json.dumps({**json.loads(text), field: value}).encode()
                entry.size = len(text)
            new.addfile(entry, BytesIO(text))
    return changed


def test_a_backup_with_an_older_schema_is_migrated(
    registry: Registry, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backup was made by an older smolora."""
    back_up(registry.home, target)
    with tarfile.open(target) as tar:
        header = tar.extractfile("backup.json")
        assert header is not None
        found = json.loads(header.read())
    assert found["schema"] == NEWEST
    assert datetime.fromisoformat(found["created_at"]) <= datetime.now(UTC)
    upgrade_smolora(monkeypatch, tmp_path)
    assert restore(target, tmp_path / "again").diagnosis.is_sound
    assert schema_of(tmp_path / "again" / FILE_NAME) == LATER
    with registry.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() == NEWEST


def test_concurrent_backups_keep_each_others_folders(registry: Registry, target: Path) -> None:
    """The second begins while the first runs, and ends before it."""
    from server.operations.backup import workspace

    with workspace(target) as first:
        (first / "archive").write_text("first")
        back_up(registry.home, target)
        assert (first / "archive").read_text() == "first"
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert os.stat(target).st_size > 1000
