"""What runs on this machine, as a file of HOME: for `status` and `down`, which are other processes.

This machine's part of a Ray cluster: a process of Ray's that runs as long as the node does.

It outlives the process that started it, and is ended by a signal: Ray then hands what runs here to other nodes.
Ray's own page and its reports home are off, and its object store, which nothing here uses, is as small as may be.
"""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from adapters.storage.durable import new_file, write_json
from server.errors import StartupError

FILE_NAME = "cluster.json"
_LOCK_NAME = "cluster.lock"


@dataclass(frozen=True)
class ClusterState:
    address: str
    pid: int  # of `smolora cluster up`
    ray_pid: int  # of this machine's part of Ray
    urls: tuple[str, ...]  # of the API processes
    num_workers: int
    num_restarts: int = 0  # that ended, of API processes and workers one after the other
    fault: str = ""  # of the last one
    mark: str = ""  # of `pid`, as `mark_of` has it: another process may have that id once this one has ended
    ray_mark: str = ""  # of `ray_pid`


def write_state(home: Path, state: ClusterState) -> None:
    """Replaces what was there."""
    with new_file(home / FILE_NAME) as place:
        write_json(place, asdict(state))


def read_state(home: Path) -> ClusterState:
    """Raises StartupError where nothing was started from this HOME."""
    try:
        fields = json.loads((home / FILE_NAME).read_text(encoding="utf-8"))
        return ClusterState(**{**fields, "urls": tuple(fields["urls"])})
    except FileNotFoundError:
        raise StartupError(f"no cluster was started with SMOLORA_HOME={home}") from None


def remove_state(home: Path) -> None:
    """Nothing runs any more."""
    (home / FILE_NAME).unlink(missing_ok=True)


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """A block in which no other `up` begins with this HOME: `down` knows of one alone.

    Raises StartupError where one runs or is about to, or a killed one left Ray.
    """
    with (home / _LOCK_NAME).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = True
        except OSError as error:  # or of file systems without locks
            is_free = not isinstance(error, BlockingIOError)
        if (state := _state_of(home)) is not None:
            _refuse_running(home, state)
        if not is_free:
            raise StartupError(f"another smolora cluster up with SMOLORA_HOME={home} is about to start, or to end")
        yield


def _state_of(home: Path) -> ClusterState | None:
    try:
        return read_state(home)
    except StartupError:  # nothing was started
        return None


def _refuse_running(home: Path, state: ClusterState) -> None:
    if is_alive(state.pid, state.mark):
        raise StartupError(
            f"smolora cluster up runs already with SMOLORA_HOME={home}, as process {state.pid}: end it (smolora "
            "cluster down), or choose another --home"
        )
    if is_alive(state.ray_pid, state.ray_mark):
        raise StartupError(
            f"a smolora cluster up with SMOLORA_HOME={home} was killed, and its Ray runs on: end that (smolora "
            "cluster down)"
        )


Process = subprocess.Popen[bytes]

_STORE_BYTES = 100 << 20
_START_SECONDS = 60.0
_ANSWER_SECONDS = 10.0
STOP_SECONDS = 45.0  # more than Ray itself takes to drain a node
_TICK_SECONDS = 0.1
_ERROR = re.compile(r"[\w.]*(Error|Exception): ")  # how a traceback ends


def start_head(port: int, log: Path, num_cpus: float | None) -> tuple[Process, str]:
    """Start a cluster; its process and address. Raises StartupError."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            raise StartupError(
                f"port {port} is taken: join what is there (--address), or give --ray-port"
            ) from None
    # The secret that all of Ray's processes need, unless there is one; other machines need it as well.
    subprocess.run([_ray(), "get-auth-token", "--generate"], capture_output=True, check=False)  # noqa: S603
    process = _start(["--head", f"--port={port}"], log, num_cpus)
    return process, f"127.0.0.1:{port}"


def start_node(address: str, log: Path, num_cpus: float | None) -> Process:
    """Have this machine join the cluster at `address`. Raises StartupError."""
    return _start([f"--address={address}"], log, num_cpus)


def refuse_unreachable(address: str) -> None:
    """Raise StartupError where nothing listens at host:port, for which Ray itself would look for over a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return  # Ray's to understand
    try:
        if len(port) > 5 or int(port) > 65535:
            raise ValueError(f"{port[:20]} is no port")
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:  # UnicodeError is one: a name that can't be looked up
        raise StartupError(
            f"nothing answers at {address} ({error}): --address is the host and --ray-port of the machine "
            "on which the cluster began"
        ) from None


def mark_of(pid: int) -> str:
    """What no other process has that is given the same id later, as after a start of the machine; "" where that
    can't be told.
    """
    try:
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # starttime of proc(5)
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {began}"
    except (OSError, IndexError):
        return ""


def is_alive(pid: int, mark: str = "") -> bool:
    """Whether there is such a process, which has that mark where one is given, and it hasn't ended."""
    if mark and mark_of(pid) != mark:
        return False
    with suppress(OSError):  # Linux tells of those that only wait to be looked at
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
    """Tell another process's child to end, and wait for it; whether it did in time. Nothing where the process of
    that id hasn't the mark.
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


def _start(flags: list[str], log: Path, num_cpus: float | None) -> Process:
    limits = [] if num_cpus is None else [f"--num-cpus={num_cpus:g}"]
    command = [
        *(_ray(), "start", "--block", "--disable-usage-stats", "--include-dashboard=false"),
        *(f"--object-store-memory={_STORE_BYTES}", *flags, *limits),
    ]
    if "--head" not in flags:
        command.remove("--include-dashboard=false")  # the head's to say
    with log.open("ab") as output:
        begun = output.tell()
        process = subprocess.Popen(  # noqa: S603 it is ours
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            with log.open("rb") as written:
                written.seek(begun)
                if b"Ray runtime started" in written.read():
                    return process
            time.sleep(_TICK_SECONDS)
        raise StartupError(f"Ray doesn't start{_fault_told(log, begun)}: see {log}")
    except BaseException:  # Ctrl-C, too, which doesn't reach it: it would stay, and nobody would know of it
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        raise


def _fault_told(log: Path, begun: int) -> str:
    """The error with which Ray ended, as it told it in its log from there on, if it did."""
    with log.open("rb") as written:
        written.seek(begun)
        lines = written.read().decode(errors="replace").splitlines()
    told = [line for line in lines if _ERROR.match(line)]
    return f" ({told[-1].rstrip('.')})" if told else ""


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))
