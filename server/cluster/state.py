"""What runs on this machine, as a file of HOME: for `status` and `down`, which are other processes."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from adapters.durable import new_file, write_json
from server.cluster import node
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
    mark: str = ""  # of `pid`, as `node.mark_of` has it: another process may have that id once this one has ended
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
    if node.is_alive(state.pid, state.mark):
        raise StartupError(
            f"smolora cluster up runs already with SMOLORA_HOME={home}, as process {state.pid}: end it (smolora "
            "cluster down), or choose another --home"
        )
    if node.is_alive(state.ray_pid, state.ray_mark):
        raise StartupError(
            f"a smolora cluster up with SMOLORA_HOME={home} was killed, and its Ray runs on: end that (smolora "
            "cluster down)"
        )
