"""This machine's Ray node, a process that must not be left behind or confused with another one."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.cluster import node
from server.errors import StartupError

SLOW = """#!/bin/sh
echo $$ > {pid}
exec sleep 60
"""


@pytest.fixture
def slow_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make Ray slow to start; return the file that then has its process id."""
    program, pid = tmp_path / "ray", tmp_path / "pid"
    program.write_text(SLOW.format(pid=pid))
    program.chmod(0o755)
    monkeypatch.setattr(node, "_ray", lambda: str(program))
    monkeypatch.setattr(node, "refuse_unreachable", lambda _: None)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a token")
    return pid


def ends(pid: int) -> bool:
    """Return whether the process ends within moments."""
    deadline = time.monotonic() + 50
    while node.is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not node.is_alive(pid)


def test_an_interrupt_while_ray_starts_ends_ray(
    slow_ray: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = time.sleep

    def interrupted(seconds: float) -> None:
        if slow_ray.exists() and slow_ray.read_text():
            monkeypatch.setattr(time, "sleep", sleep)
            raise KeyboardInterrupt  # as Ctrl-C does
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        node.start_node("10.0.0.1:6379", tmp_path / "log", None)
    assert ends(int(slow_ray.read_text())), "it was left behind"


def test_the_error_says_why_ray_does_not_start(slow_ray: Path, tmp_path: Path) -> None:
    """The error is taken from this start's output; Ray's log also has those of earlier starts."""
    log = tmp_path / "log"
    log.write_text("OSError: of another time\n")
    (tmp_path / "ray").write_text(
        "#!/bin/sh\necho 'ValueError: port 16379 is used by others.'\necho 'Port information'\nexit 1\n"
    )
    with pytest.raises(StartupError, match=r"Ray doesn't start \(ValueError: port 16379 is used by others\): see"):
        node.start_node("10.0.0.1:6379", log, None)
    (tmp_path / "ray").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(StartupError, match="Ray doesn't start: see"):
        node.start_node("10.0.0.1:6379", log, None)


@pytest.fixture
def sleeping() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_a_mark_identifies_one_process(sleeping: "subprocess.Popen[bytes]") -> None:
    mark = node.mark_of(sleeping.pid)
    assert mark == node.mark_of(sleeping.pid) != node.mark_of(os.getpid())
    assert node.is_alive(sleeping.pid, mark)
    assert node.end(sleeping.pid, 5, mark)
    assert sleeping.wait() == -15


def test_ray_gets_neither_the_database_nor_keys(
    slow_ray: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas inherit Ray's environment, and need neither."""
    (tmp_path / "ray").write_text("#!/bin/sh\nenv\necho Ray runtime started\nexec sleep 60\n")
    secrets = {"SMOLORA_DATABASE_URL": "hunter1", "SMOLORA_API_KEYS": "hunter2", "SMOLORA_API_KEY": "hunter3"}
    for name, value in {**secrets, "SMOLORA_BYTES_URL": "s3://kept"}.items():
        monkeypatch.setenv(name, value)
    ray = node.start_node("10.0.0.1:6379", tmp_path / "log", None)
    ray.kill()
    ray.wait()
    said = (tmp_path / "log").read_text()
    assert "s3://kept" in said
    assert "hunter" not in said


def test_ray_is_given_up_while_it_starts(slow_ray: Path, tmp_path: Path) -> None:
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(StartupError, match="stopped while Ray started"):
        node.start_node("10.0.0.1:6379", tmp_path / "log", None, stopped)


def test_only_its_owner_reads_rays_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself creates the file for everybody to read."""
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    token = tmp_path / "new" / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    with pytest.raises(StartupError, match="auth_token is missing: copy it from the machine"):
        node.keep_token(creates=False)
    node.keep_token(creates=True)
    first = token.read_text()
    assert len(first) == 64
    token.chmod(0o644)
    node.keep_token(creates=False)
    assert (token.stat().st_mode & 0o777, token.read_text()) == (0o600, first)


@pytest.mark.parametrize(("port", "is_kept"), [(26413, False), (6413, True)])
def test_rays_note_of_a_former_head_is_removed(
    slow_ray: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int, is_kept: bool
) -> None:
    """Otherwise a head doesn't start again while another node of the former cluster runs on the same machine."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").rename(tmp_path / "program")
    monkeypatch.setattr(node, "_ray", lambda: str(tmp_path / "program"))
    (tmp_path / "program").write_text("#!/bin/sh\necho Ray runtime started\nexec sleep 60\n")
    note = tmp_path / "ray" / "ray_current_cluster"
    note.parent.mkdir()
    note.write_text("192.0.2.2:26413")
    process, _ = node.start_head(port, tmp_path / "log", None)
    process.kill()
    process.wait()
    assert note.exists() == is_kept
