"""What runs on this machine, as a file of HOME: for `status` and `down`, which are other processes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from adapters.durable import new_file, write_json
from server.errors import StartupError

FILE_NAME = "cluster.json"


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
