"""This machine's part of a Ray cluster: Ray's process, and a file in HOME that says which processes run.

`smolora cluster up` writes the file; `smolora cluster status` and `smolora cluster down` read it. Ray's process
outlives the process that started it, and stops when it gets a signal; Ray then moves its work to other nodes.
Ray's dashboard and usage reports are off. Its object store, which smolora doesn't use, is as small as possible.
"""

import fcntl
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from adapters.storage.durable import new_file, write_json
from server.config.environment import ray_address_file, ray_token_path, without_service_secrets
from server.errors import StartupError

FILE_NAME = "cluster.json"
_LOCK_NAME = "cluster.lock"
LOG_NAME = "ray.log"


@dataclass(frozen=True)
class ClusterState:
    address: str
    pid: int  # of `smolora cluster up`
    ray_pid: int
    urls: tuple[str, ...]  # of the API processes
    num_workers: int
    num_restarts: int = 0  # finished restarts of all API processes and workers
    fault: str = ""  # why the last restart failed, or empty
    mark: str = ""  # `mark_of(pid)`, since a later process may get the same id
    ray_mark: str = ""  # `mark_of(ray_pid)`
    is_head: bool = False  # this machine's Ray is the cluster's head


def write_state(home: Path, state: ClusterState) -> None:
    with new_file(home / FILE_NAME) as place:
        write_json(place, asdict(state))


def read_state(home: Path) -> ClusterState:
    """Read the cluster's state. Raise StartupError if no cluster was started from this HOME."""
    try:
        fields = json.loads((home / FILE_NAME).read_text(encoding="utf-8"))
        return ClusterState(**{**fields, "urls": tuple(fields["urls"])})
    except FileNotFoundError:
        raise StartupError(f"no cluster was started with SMOLORA_HOME={home}") from None


def remove_state(home: Path) -> None:
    (home / FILE_NAME).unlink(missing_ok=True)


@contextmanager
def alone(home: Path) -> Iterator[ClusterState | None]:
    """Lock HOME during the `with` block, so that only one `smolora cluster up` uses it.

    Yield the state of a former `smolora cluster up` that was killed, if the Ray process that it started runs on.
    Raise StartupError if another `smolora cluster up` runs.
    """
    with (home / _LOCK_NAME).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = True
        except OSError as error:  # some file systems have no locks: assume that HOME is free
            is_free = not isinstance(error, BlockingIOError)
        if (state := _state_of(home)) is not None and is_alive(state.pid, state.mark):
            raise StartupError(
                f"smolora cluster up runs already with SMOLORA_HOME={home}, as process {state.pid}: end it "
                "(smolora cluster down), or choose another --home"
            )
        if not is_free:
            raise StartupError(f"another smolora cluster up with SMOLORA_HOME={home} is about to start, or to end")
        yield state if state is not None and is_alive(state.ray_pid, state.ray_mark) else None


def _state_of(home: Path) -> ClusterState | None:
    try:
        return read_state(home)
    except StartupError:  # nothing was started
        return None


Process = subprocess.Popen[bytes]

_STORE_BYTES = 100 << 20
_START_SECONDS = 60.0
_ANSWER_SECONDS = 10.0
STOP_SECONDS = 45.0  # more than Ray itself takes to drain a node
_TICK_SECONDS = 0.1
_ERROR = re.compile(r"[\w.]*(Error|Exception): ")  # the last line of a traceback


def start_head(
    port: int, log: Path, num_cpus: float | None, stopped: threading.Event | None = None
) -> tuple[Process, str]:
    """Start a Ray cluster. Return Ray's process and the cluster's address.

    Raise StartupError if the port is taken, if Ray doesn't start, or if `stopped` is set meanwhile.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            raise StartupError(
                f"port {port} is taken: join what is there (--address), or give --ray-port"
            ) from None
    keep_token(creates=True)
    _forget_former_head(port)
    process = _start(["--head", f"--port={port}"], log, num_cpus, stopped)
    return process, f"127.0.0.1:{port}"


def start_node(address: str, log: Path, num_cpus: float | None, stopped: threading.Event | None = None) -> Process:
    """Make this machine join the Ray cluster at `address`. Return Ray's process.

    Raise StartupError if nothing answers there, if Ray doesn't start, or if `stopped` is set meanwhile.
    """
    refuse_unreachable(address)
    keep_token(creates=False)
    return _start([f"--address={address}"], log, num_cpus, stopped)


def _forget_former_head(port: int) -> None:
    """Remove Ray's note of a head on this port, which is free.

    Ray refuses to start a head with the address in the note while a raylet of the former cluster runs here.
    """
    note = ray_address_file()
    with suppress(OSError):  # usually there is none
        if note.read_text(encoding="utf-8").strip().endswith(f":{port}"):
            note.unlink()


def keep_token(creates: bool) -> None:
    """Hide the token that all of Ray's processes need from other users. Create it if it is missing.

    All machines need the same token. Anyone who has it can run code on all of them. Raise StartupError if it is
    missing and `creates` is false, or if it can't be written.
    """
    if (path := ray_token_path()) is None:
        return
    if not creates and not path.exists():
        raise StartupError(
            f"{path} is missing: copy it from the machine on which the cluster began, with mode 0600"
        )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        with suppress(OSError):  # another user's file, or a secret that is mounted
            path.chmod(0o600)
    except OSError as error:
        raise StartupError(f"Ray's token can't be written to {path}: {error.strerror}") from None


def refuse_unreachable(address: str) -> None:
    """Raise StartupError if nothing listens at host:port. Ray itself would retry for over a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return  # another form of address: Ray checks it
    try:
        if len(port) > 5 or int(port) > 65535:
            raise ValueError(f"{port[:20]} is no port")
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:  # a name that can't be looked up raises UnicodeError, a ValueError
        raise StartupError(
            f"nothing answers at {address} ({error}): --address is the host and --ray-port of the machine "
            "on which the cluster began"
        ) from None


def mark_of(pid: int) -> str:
    """Return a text that no later process with the same id has, even after a reboot; or "" if it is unknown."""
    try:
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # starttime of proc(5)
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {began}"
    except (OSError, IndexError):
        return ""


def is_alive(pid: int, mark: str = "") -> bool:
    """Return whether the process is running and, if `mark` is given, has this mark (see `mark_of`)."""
    if mark and mark_of(pid) != mark:
        return False
    with suppress(OSError):  # a zombie counts as ended
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def end(pid: int, seconds: float = STOP_SECONDS, mark: str = "") -> bool:
    """Terminate a process that isn't a child of this one, and wait for it. Return whether it ended in time.

    If `mark` is given, a process with another mark (`mark_of`) counts as ended.
    """
    if is_alive(pid, mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while is_alive(pid, mark):
        if time.monotonic() > deadline:
            return False
        time.sleep(_TICK_SECONDS)
    return True


def _start(flags: list[str], log: Path, num_cpus: float | None, stopped: threading.Event | None) -> Process:
    limits = [] if num_cpus is None else [f"--num-cpus={num_cpus:g}"]
    command = [
        *(_ray(), "start", "--block", "--disable-usage-stats", "--include-dashboard=false"),
        *(f"--object-store-memory={_STORE_BYTES}", *flags, *limits),
    ]
    if "--head" not in flags:
        command.remove("--include-dashboard=false")  # only the head has this flag
    with log.open("ab") as output:
        begun = output.tell()
        process = subprocess.Popen(  # noqa: S603 it is ours
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=without_service_secrets(),  # replicas inherit it
            umask=0o077,  # replicas' logs
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            with log.open("rb") as written:
                written.seek(begun)
                if b"Ray runtime started" in written.read():
                    return process
            if stopped is not None and stopped.is_set():
                raise StartupError("stopped while Ray started")
            time.sleep(_TICK_SECONDS)
        raise StartupError(f"Ray doesn't start{_start_fault(log, begun)}: see {log}")
    except BaseException:  # also at Ctrl-C: Ray's process doesn't get its signal and would keep running
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        raise


def _start_fault(log: Path, begun: int) -> str:
    """Return the last error in Ray's log from offset `begun` on, in parentheses, or "" if there is no error."""
    with log.open("rb") as written:
        written.seek(begun)
        lines = written.read().decode(errors="replace").splitlines()
    errors = [line for line in lines if _ERROR.match(line)]
    return f" ({errors[-1].rstrip('.')})" if errors else ""


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))
