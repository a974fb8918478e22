"""`smolora doctor` finds every damaged byte, and rebuilds the catalog from the directories alone."""

import json
import shutil
import threading
from contextlib import closing
from io import BytesIO
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from adapters.expression import parse
from adapters.peft.files import CONFIG_NAME, WEIGHTS_NAME
from adapters.store.store import AdapterStore
from server.cli.main import app
from server.database import FILE_NAME
from server.database.file import driver
from server.errors import StartupError
from server.model.packed_adapters import PackedAdapters
from server.model.rank_rows import RowFormat, RowLayout
from server.operations.doctor import examine, rebuild
from server.storage.home import Home, serving
from server.training.datasets import FACTS, ROWS, DatasetStore
from server.training.files import CONTENT, FileStore
from tests.adapters.samples import SHAPE, sample_adapter
from tests.kits.small_disk import fill, make_room, mounted
from tests.server.api.adapters.registry import Registry, digest_of, write_files


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Make a@1, a@2 (trained by a job), b@1, and mix@1 = a@1*0.5+b@1, with an alias; latest is rolled back."""
    files = tmp_path / "files"
    files.mkdir()
    write_files(files)
    registry = Registry(tmp_path / "home", files)
    registry.do({"do": "upload", "name": "a", "seed": 0})
    registry.do({"do": "train", "name": "a", "seed": 1, "alias": "prod", "job": "job-7"})
    registry.do({"do": "upload", "name": "b", "seed": 2})
    registry.do({"do": "compose", "name": "mix", "expression": "a@1*0.5+b"})
    registry.do({"do": "point", "name": "a", "alias": "latest", "version": 1})
    registry.close()
    return tmp_path / "home"


def found(home: Path) -> dict[str, str]:
    return {finding.about: finding.message for finding in examine(home).findings}


def place(home: Path, seed: int) -> Path:
    digest = digest_of(seed)
    return home / "adapters" / digest[:2] / digest


def doctor(home: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", "--home", str(home), *arguments])
    return result.exit_code, result.stdout


def lose(home: Path) -> None:
    for path in home.glob(f"{FILE_NAME}*"):
        path.unlink()


def test_a_sound_home_has_no_findings(home: Path) -> None:
    diagnosis = examine(home)
    assert diagnosis.is_sound
    assert (diagnosis.num_versions, diagnosis.num_adapters) == (4, 3)
    database = f"SQLite {driver.sqlite_version} with a "
    code, output = doctor(home)
    assert code == 0
    first, last = output.splitlines()
    assert first.startswith(f"database: {database}")
    assert last == "sound: 4 versions, 3 stored adapters, 0 uploads checked"
    code, output = doctor(home, "--json")
    assert code == 0
    document = json.loads(output)
    assert document.pop("database").startswith(database)
    assert document == {
        "findings": [],
        "num_versions": 4,
        "num_adapters": 3,
        "num_uploads": 0,
        "is_sound": True,
        "rebuilt": None,
    }


def test_bytes_that_changed_are_found(home: Path) -> None:
    weights = place(home, 1) / WEIGHTS_NAME
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (place(home, 2) / CONFIG_NAME).unlink()
    messages = found(home)
    assert messages.keys() == {"a@2", "b@1"}
    assert "no longer matches its digest" in messages["a@2"]
    assert "incomplete" in messages["b@1"]
    code, output = doctor(home)
    assert code == 1
    assert "2 findings" in output


def test_changed_packed_files_are_found(home: Path) -> None:
    """Answers are computed from the packed form alone."""
    store = AdapterStore(home / "adapters")
    packed = PackedAdapters(store, RowLayout(SHAPE, RowFormat(torch.bfloat16, torch.bfloat16)))
    digest = digest_of(1)
    packed.load(digest)
    for thread in threading.enumerate():
        if thread.name == "adapter-packer":
            thread.join()
    file = home / "adapters" / "packed" / digest
    assert examine(home).is_sound
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    messages = found(home)
    assert messages.keys() == {f"adapters/packed/{digest}"}
    assert "delete it" in messages[f"adapters/packed/{digest}"]
    assert doctor(home)[0] == 1
    file.unlink()
    assert examine(home).is_sound


@pytest.mark.parametrize("project", ["default", "acme"])
def test_uploads_that_changed_are_found(home: Path, project: str) -> None:
    """Rows, their metadata, and a job's results."""
    of = Home(home)
    datasets, files = DatasetStore(of.datasets(project)), FileStore(of.files(project))
    sets = [datasets.put(BytesIO(b'{"text": "%d"}' % i), "a.jsonl").id for i in range(4)]
    file, results = files.put(BytesIO(b'{"text": "a"}'), "a.jsonl").id, files.put_results("job-1", b"step,loss").id
    assert doctor(home)[1].endswith("sound: 4 versions, 3 stored adapters, 6 uploads checked\n")
    for place, damage in (
        (of.datasets(project) / sets[1] / ROWS, b'{"text":"7"}\n'),
        (of.datasets(project) / sets[2] / FACTS, b""),
        (of.files(project) / results / CONTENT, b"step,less"),
    ):
        place.write_bytes(damage)
    (of.files(project) / file / CONTENT).unlink()
    under = of.files(project).parent.relative_to(home)
    damaged = {f"datasets/{sets[1]}", f"datasets/{sets[2]}", f"files/{results}", f"files/{file}"}
    messages = found(home)
    assert messages.keys() == {str(under / name) for name in damaged}
    assert all(": delete it" in message for message in messages.values())
    code, output = doctor(home)
    assert code == 1
    assert "4 findings: 4 versions, 3 stored adapters, 6 uploads checked" in output


def test_missing_bytes_are_found(home: Path) -> None:
    place(home, 0).rename(home / "elsewhere")
    messages = found(home)
    assert messages.keys() == {"a@1"}
    assert "missing" in messages["a@1"]


def test_unnamed_bytes_are_found_and_collected(home: Path, tmp_path: Path) -> None:
    registry = Registry(home, tmp_path / "files")
    orphan = sample_adapter(9)
    registry.store.put(orphan)
    (home / "adapters" / ".tmp-left").mkdir()
    digest = orphan.weights.digest
    assert found(home).keys() == {f"adapters/{digest[:2]}/{digest}", "adapters/.tmp-left"}
    with registry.store.publishing(orphan, registry.catalog.in_use):  # a publisher is about to name it
        assert found(home).keys() == {"adapters/.tmp-left"}
    registry.restart()
    registry.close()
    assert found(home) == {}


def test_records_that_differ_from_rows_are_found_and_repaired(home: Path, tmp_path: Path) -> None:
    records = home / "adapters" / "names"
    (records / "a" / "1.json").unlink()
    (records / "a" / "7.json").write_bytes((records / "a" / "2.json").read_bytes())
    (records / "b" / "1.json").write_bytes(b"{")
    assert found(home).keys() == {"a@1", "b@1", "adapters/names/a/7.json", "adapters/names/b/1.json"}
    (records / "a" / "7.json").unlink()
    registry = Registry(home, tmp_path / "files")
    registry.restart()
    registry.close()
    assert found(home) == {}


def test_rebuild_names_losses(home: Path, tmp_path: Path) -> None:
    registry = Registry(home, tmp_path / "files")
    before = {adapter.name: adapter.versions for adapter in registry.catalog.list()}
    (home / "jobs" / "job-8" / "model").mkdir(parents=True)
    registry.close()
    lose(home)
    code, output = doctor(home)
    assert code == 1
    assert "database: is missing" in output
    assert "smolora doctor --rebuild" in output
    assert not (home / FILE_NAME).exists()

    code, output = doctor(home, "--rebuild")
    assert code == 0, output
    lines = output.splitlines()
    assert lines[0] == "published again from the directories: a@1, a@2, b@1, mix@1"
    assert any(line.startswith("lost: all aliases; latest is") for line in lines)
    assert any(line.startswith("lost: all jobs") and line.endswith("job-7, job-8") for line in lines)
    assert "models of full fine-tuning are kept until you remove them: jobs/job-8/model" in lines
    assert lines[-1] == "sound: 4 versions, 3 stored adapters, 0 uploads checked"
    registry = Registry(home, tmp_path / "files")
    registry.restart()
    after = registry.catalog.list()
    assert {adapter.name: adapter.versions for adapter in after} == before
    assert {adapter.name: (adapter.latest, adapter.aliases) for adapter in after} == {
        "a": (2, {}),
        "b": (1, {}),
        "mix": (1, {}),
    }
    lease = registry.library.pin(parse("mix"))
    assert [part.digest for part in lease.parts] == [digest_of(0), digest_of(2)]
    lease.release()
    registry.do({"do": "upload", "name": "a", "seed": 3})
    assert registry.catalog.get("a").latest == 3
    registry.close()


def test_a_damaged_database_is_set_aside(home: Path) -> None:
    (home / FILE_NAME).write_bytes(b"something else" * 1000)
    code, output = doctor(home)
    assert code == 1
    assert "database: file is not a database" in output
    rebuilt = rebuild(home)
    assert rebuilt.is_new
    assert rebuilt.set_aside[0] == f"{FILE_NAME}.damaged-1"
    assert (home / rebuilt.set_aside[0]).read_bytes().startswith(b"something else")
    assert rebuilt.recovered.adopted == ("a@1", "a@2", "b@1", "mix@1")
    assert examine(home).is_sound


def test_a_full_disk_is_not_reported_as_damage(home: Path, tmp_path: Path) -> None:
    """SQLite, which can't create temporary files then, calls it an I/O error."""
    (disk := tmp_path / "disk").mkdir()
    with mounted(disk, 4):
        shutil.copytree(home, disk / "home")
        before = (disk / "home" / FILE_NAME).read_bytes()
        fill(disk)
        for look in (examine, rebuild):
            with pytest.raises(StartupError, match=r"smolora\.db: the disk is full"):
                look(disk / "home")
        make_room(disk)
        assert (disk / "home" / FILE_NAME).read_bytes() == before
        assert examine(disk / "home").is_sound


def test_a_locked_database_is_not_reported_as_damage(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.database.file.BUSY_SECONDS", 0)
    with closing(driver.connect(home / FILE_NAME, isolation_level=None)) as stranger:
        stranger.execute("PRAGMA locking_mode=EXCLUSIVE")
        stranger.execute("BEGIN EXCLUSIVE")
        for look in (examine, rebuild):
            with pytest.raises(StartupError, match=r"can't look at the database .*: database is locked"):
                look(home)
    assert examine(home).is_sound


def test_a_rebuild_names_damaged_adapters(home: Path) -> None:
    weights = place(home, 0) / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    lose(home)
    code, output = doctor(home, "--rebuild", "--json")
    assert code == 1
    document = json.loads(output)
    assert document["rebuilt"]["recovered"]["lost"] == ["a@1", "mix@1"]
    assert document["rebuilt"]["recovered"]["adopted"] == ["a@2", "b@1"]
    assert not document["is_sound"]


def test_a_rebuild_keeps_a_sound_database(home: Path, tmp_path: Path) -> None:
    code, output = doctor(home, "--rebuild")
    assert code == 0
    assert output.startswith("the database is sound: it was kept")
    registry = Registry(home, tmp_path / "files")
    assert registry.catalog.get("a").aliases == {"prod": 2}
    assert registry.catalog.get("a").latest == 1
    registry.close()


def test_a_rebuild_is_refused_while_a_server_runs(home: Path, tmp_path: Path) -> None:
    registry = Registry(home, tmp_path / "files")
    with pytest.raises(StartupError, match="stop it first"):
        rebuild(home)
    assert examine(home).is_sound
    assert registry.catalog.get("a").latest == 1
    registry.close()
    with (
        serving(home),
        pytest.raises(StartupError, match="is served already"),
    ):  # a starting server
        rebuild(home)


def test_a_folder_that_is_no_home_is_refused(tmp_path: Path) -> None:
    for call in (examine, rebuild):
        with pytest.raises(StartupError, match="isn't a server's home"):
            call(tmp_path)
    assert list(tmp_path.iterdir()) == []
