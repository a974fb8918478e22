"""This machine's part of a Ray cluster: a process of Ray's that runs as long as the node does.

It outlives the process that started it, and is ended by a signal: Ray then hands what runs here to other nodes.
Ray's own page and its reports home are off, and its object store, which nothing here uses, is as small as may be.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from server.errors import StartupError

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
