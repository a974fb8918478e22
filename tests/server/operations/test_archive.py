"""Refusals of files to be restored, which leave nothing behind, inside HOME or outside."""

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli.main import app
from server.database import FILE_NAME, connect
from server.errors import StartupError
from server.operations.archive import is_place
from server.operations.backup import back_up
from server.operations.restore import restore
from server.storage.home import LOCK_NAME

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> Entry:
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.size = kind, link, len(content)
    return found, content


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Entry]:
    """Return the contents of a backup of a new HOME: header, database, manifest."""
    home = tmp_path_factory.mktemp("home")
    connect(home).dispose()
    back_up(home, home.with_name("sound.tar"))
    with tarfile.open(home.with_name("sound.tar")) as tar:
        found = [(member, tar.extractfile(member)) for member in tar]
        return [(member, content.read()) for member, content in found if content is not None]


def manifest(*named: Entry) -> Entry:
    members = {e.name: {"sha256": sha256(content).hexdigest(), "size": len(content)} for e, content in named}
    return entry("manifest.json", json.dumps({"members": members}).encode())


def packed(place: Path, entries: Sequence[Entry]) -> Path:
    file = place / "crafted.tar"
    with tarfile.open(file, "w") as tar:
        for member, content in entries:
            tar.addfile(member, BytesIO(content))
    return file


def refused(place: Path, entries: Sequence[Entry]) -> str:
    """Return the refusal; check that nothing was created."""
    file = packed(place, entries)
    before = sorted(path for path in place.rglob("*"))
    with pytest.raises(StartupError) as refusal:
        restore(file, place / "new" / "home")
    assert sorted(place.rglob("*")) in (before, sorted([*before, place / "new"]))
    (place / "empty").mkdir()
    with pytest.raises(StartupError):
        restore(file, place / "empty")
    assert [path.name for path in (place / "empty").iterdir()] == [LOCK_NAME]
    assert str(refusal.value).startswith(f"{file}: ")
    return str(refusal.value).removeprefix(f"{file}: ")


def test_a_valid_crafted_file_is_restored(tmp_path: Path, sound: Sequence[Entry]) -> None:
    """The refusals below are due to the faults, not to the way the file is made."""
    header, database, _ = sound
    log = entry("jobs/job-1/log.txt", b"said")
    done = restore(packed(tmp_path, [header, log, database, manifest(database, log)]), tmp_path / "new" / "home")
    assert done.diagnosis.is_sound
    assert (tmp_path / "new" / "home" / "jobs" / "job-1" / "log.txt").read_bytes() == b"said"


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../outside",
        "jobs/../../outside",
        "jobs/..",
        "jobs/./a",
        "jobs//a",
        "jobs/.hidden",
        "jobs/a/",
        "jobs",
        "adapters",
        "",
        ".",
        "jobs/a\\b",
        "jobs/a\nb",
        "jobs/ä",
        "server.lock",
        "smolora.db/x",
        "smolora.db-wal",
        "models/base/weights",
        "native/step.so",
        "jobs/" + "x" * 201,
        "jobs/" + "/".join("abcdefgh"),
        "C:/x",
    ],
)
def test_members_at_other_paths_are_refused(tmp_path: Path, sound: Sequence[Entry], name: str) -> None:
    assert not is_place(name)
    header, database, _ = sound
    trick = entry(name, b"x")
    why = refused(tmp_path, [header, trick, database, manifest(database, trick)])
    # Python's tar takes a name with a trailing slash for a folder.
    assert why in (f"{name!r} isn't a path that a HOME has", f"{name.rstrip('/')!r} isn't a regular file")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE],
)
def test_members_that_are_not_regular_files_are_refused(
    tmp_path: Path, sound: Sequence[Entry], kind: bytes
) -> None:
    header, database, _ = sound
    trick = entry("jobs/job-1", kind=kind, link="/etc")
    through = entry("jobs/job-1/passwd", b"x")
    entries = [header, trick, through, database, manifest(database, through)]
    assert refused(tmp_path, entries) == "'jobs/job-1' isn't a regular file"


def _twice(entries: list[Entry]) -> None:
    entries.insert(1, entries[1])


def _file_and_folder(entries: list[Entry]) -> None:
    entries[1:1] = [entry("jobs/a", b"x"), entry("jobs/a/b", b"x")]


def _folder_and_file(entries: list[Entry]) -> None:
    entries[1:1] = [entry("jobs/a/b", b"x"), entry("jobs/a", b"x")]


def _changed(entries: list[Entry]) -> None:
    found, content = entries[1]
    entries[1] = (found, content[:-1] + bytes([content[-1] ^ 1]))


def _missing(entries: list[Entry]) -> None:
    entries[-1] = manifest(entries[1], entry("jobs/a", b"x"))


def _no_database(entries: list[Entry]) -> None:
    entries[1:] = [manifest()]


def _unnamed_database(entries: list[Entry]) -> None:
    entries[-1] = manifest()


def _another_database(entries: list[Entry]) -> None:
    entries[1] = entry("smolora.db", b"no database" * 1000)
    entries[-1] = manifest(entries[1])


def _no_manifest(entries: list[Entry]) -> None:
    del entries[-1]


def _more(entries: list[Entry]) -> None:
    entries.append(entry("jobs/a", b"x"))


def _no_header(entries: list[Entry]) -> None:
    del entries[0]


def _bad_header(entries: list[Entry]) -> None:
    entries[0] = entry("backup.json", b'{"smolora": 1}')


def _deep_header(entries: list[Entry]) -> None:
    entries[0] = entry("backup.json", b"[" * 60_000)


def _large_header(entries: list[Entry]) -> None:
    entries[0] = entry("backup.json", b" " * 70_000)


def _bad_manifest(entries: list[Entry]) -> None:
    entries[-1] = entry("manifest.json", b'{"members": [1]}')


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_twice, "'smolora.db' is in it twice"),
        (_file_and_folder, "'jobs/a/b' is a file and a folder in it"),
        (_folder_and_file, "'jobs/a' is a file and a folder in it"),
        (_changed, "'smolora.db' doesn't match its manifest: it is damaged"),
        (_missing, "'jobs/a' is missing from it"),
        (_no_database, "it has no database"),
        (_unnamed_database, "it has no database"),
        (_no_manifest, "it ends before its manifest: it is truncated"),
        (_more, "there is more after its manifest"),
        (_no_header, "it isn't a backup of smolora"),
        (_bad_header, "its backup.json is unreadable"),
        (_deep_header, "its backup.json is unreadable"),
        (_large_header, "its backup.json isn't a regular file, or is too large"),
        (_bad_manifest, "its manifest.json is unreadable"),
    ],
)
def test_malformed_backups_are_refused_with_the_reason(
    tmp_path: Path, sound: Sequence[Entry], change: Callable[[list[Entry]], None], why: str
) -> None:
    entries = list(sound)
    change(entries)
    assert refused(tmp_path, entries) == why


def test_a_damaged_database_is_refused(tmp_path: Path, sound: Sequence[Entry]) -> None:
    entries = list(sound)
    _another_database(entries)
    assert "file is not a database" in refused(tmp_path, entries)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home"
    connect(home).dispose()
    back_up(home, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    last = content.rindex(b"manifest.json") if name.endswith(".tar") else len(content) * 9 // 10
    for size in (0, 1, 100, 600, len(content) // 2, last):
        (tmp_path / name).write_bytes(content[:size])
        with pytest.raises(StartupError, match=r"damaged or truncated|isn't a backup|before its manifest"):
            restore(tmp_path / name, tmp_path / "again")
        assert not (tmp_path / "again").exists()


def test_the_commands(tmp_path: Path) -> None:
    home, again, file = tmp_path / "home", tmp_path / "again", tmp_path / "kept.tar.gz"
    connect(home).dispose()
    made = CliRunner().invoke(app, ["backup", str(file), "--home", str(home)])
    counts = "0 versions, 0 stored adapters, 0 jobs (0 not ended), 0 uploads"
    size = (home / FILE_NAME).stat().st_size
    assert (made.exit_code, made.stdout) == (0, f"{file}: {counts}; {size:,} bytes\n")
    done = CliRunner().invoke(app, ["restore", str(file), "--home", str(again)])
    assert done.exit_code == 0
    assert done.stdout.startswith(f"{again} is as it was at 20")
    assert done.stdout.endswith("; sound: 0 versions, 0 stored adapters, 0 uploads checked\n")
    made = CliRunner().invoke(app, ["backup", str(file), "--home", str(again), "--json"])
    assert json.loads(made.stdout)["num_rounds"] == 1
    done = CliRunner().invoke(app, ["restore", str(file), "--home", str(tmp_path / "third"), "--json"])
    assert json.loads(done.stdout)["is_sound"] is True
    refusal = CliRunner().invoke(app, ["restore", str(file), "--home", str(again)])
    assert isinstance(refusal.exception, StartupError)  # `main` prints it in a line
    assert "isn't empty" in str(refusal.exception)


@pytest.mark.thorough
def test_a_backup_through_a_pipe(tmp_path: Path) -> None:
    """A broken pipe is reported, and a truncated backup is refused."""
    home, again = tmp_path / "home", tmp_path / "again"
    connect(home).dispose()
    command = [sys.executable, "-m", "server.cli"]
    made = subprocess.run([*command, "backup", "-", "--home", str(home)], capture_output=True, check=True)
    assert made.stderr.decode().startswith("-: 0 versions, ")
    assert list((home / "tmp").iterdir()) == []
    cut = subprocess.run(
        [*command, "restore", "-", "--home", str(again)],
        input=made.stdout[:-11000],
        capture_output=True,
        check=False,
    )
    assert cut.returncode == 1
    assert cut.stderr.startswith(b"smolora: standard input: it ")
    assert not again.exists()
    done = subprocess.run(
        [*command, "restore", "-", "--home", str(again)], input=made.stdout, capture_output=True, check=True
    )
    assert b"; sound: " in done.stdout
    with open("/dev/full", "w") as full:
        failed = subprocess.run(
            [*command, "backup", "-", "--home", str(home)], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert failed.returncode == 1
    assert failed.stderr == b"smolora: can't make standard output: No space left on device\n"
