"""HOME is private, and served by one process at a time, however that process ends."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from server.database import connect
from server.errors import StartupError
from server.storage.home import LOCK_NAME, make, prepare, serving


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.fixture(autouse=True)
def scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what `prepare` changes for the whole process."""
    monkeypatch.setattr(tempfile, "tempdir", tempfile.tempdir)


def test_home_is_private_to_its_owner(tmp_path: Path) -> None:
    assert make(tmp_path / "new" / "home")
    assert mode(tmp_path / "new" / "home") == 0o700
    old = tmp_path / "old"
    old.mkdir()
    old.chmod(0o755)
    connect(old).dispose()  # as workers and all other commands do
    assert mode(old) == 0o700


def test_a_sticky_folder_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    assert not make(tmp_path)
    assert mode(tmp_path) == 0o1777
    tmp_path.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_a_folder_of_another_user_keeps_its_mode(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o750)
    os.chown(home, 12345, 12345)
    assert not make(home)
    assert mode(home) == 0o750


def test_one_process_serves_at_a_time(tmp_path: Path) -> None:
    refused = f"SMOLORA_HOME={tmp_path} is served already, by process {os.getpid()} on "
    with serving(tmp_path), pytest.raises(StartupError, match=refused), serving(tmp_path):
        pass
    with serving(tmp_path):
        pass


HOLDER = """
import subprocess, sys, time
from pathlib import Path
from server.storage.home import serving
with serving(Path(sys.argv[1])):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_a_killed_server_releases_the_lock_although_its_children_live(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(StartupError, match=f"process {holder.pid} "), serving(tmp_path):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it is alive
        with serving(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_an_empty_lock_file_names_another_process(tmp_path: Path) -> None:
    """The process that has the lock may not have written its name yet."""
    with serving(tmp_path):
        (tmp_path / LOCK_NAME).write_bytes(b"")
        with pytest.raises(StartupError, match="by another process"), serving(tmp_path):
            pass


def test_a_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example a network file system."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    refused = f"SMOLORA_HOME={tmp_path}: can't lock a file there: No locks available; choose another --home"
    with pytest.raises(StartupError, match=refused), serving(tmp_path):
        pass


def test_uploads_that_killed_servers_left_are_removed(tmp_path: Path) -> None:
    left = tmp_path / "tmp" / "upload-x"
    left.mkdir(parents=True)
    (left / "adapter_model.safetensors").write_bytes(b"half")
    with serving(tmp_path):
        prepare(tmp_path)
    assert not left.exists()
    assert tempfile.gettempdir() == str(tmp_path / "tmp")
