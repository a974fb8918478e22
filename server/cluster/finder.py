"""What Ray Serve knows of the engine replicas, for processes that have joined the Ray cluster.

An API process must not join Ray: Ray ends a process that has joined when Ray's head is gone for a minute. So an
API process starts this module as a process of its own, which joins Ray and prints the running replicas, one line
of JSON whenever they change. The API process starts it again if it ends, and keeps the known replicas meanwhile.
"""

import json
import os
import socket
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import ray
from ray import serve
from ray.serve._private.common import DeploymentID, ReplicaState
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.long_poll import LongPollNamespace
from ray.serve.context import _get_global_client
from ray.serve.schema import DeploymentStatusOverview

from server.cluster.messages import APP, DEPLOYMENT
from server.cluster.node import refuse_unreachable
from server.config.environment import set_up_ray
from server.errors import StartupError
from server.jobs.pipe import end_with_parent
from server.system.messages import plural

NAMESPACE = "smolora"
_HEAD = "node:__internal_head__"  # a resource that Ray gives to its head
_LOOK_SECONDS = 2.0  # between two looks at this machine's Ray: a call doesn't notice its end

Addresses = dict[str, str]
"""The host:port at which each replica answers, by the replica's id."""


def join(address: str) -> None:
    """Join the Ray cluster at this address ("auto": this machine's). Raise StartupError if that fails."""
    refuse_unreachable(address)
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="warning")
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise StartupError(f"no Ray cluster at {address}: {error}") from error


def leave() -> None:
    """Leave the Ray cluster. Deployments keep running."""
    ray.shutdown()


def has_room(num_cpus: float, num_gpus: float) -> bool:
    """Return whether all machines together have this many CPUs and GPUs free."""
    free = ray.available_resources()
    return bool(free.get("CPU", 0.0) >= num_cpus and free.get("GPU", 0.0) >= num_gpus)


def is_too_small(num_cpus: float, num_gpus: float) -> bool:
    """Return whether all machines together have fewer CPUs or GPUs than these numbers, free or in use."""
    there = ray.cluster_resources()
    return bool(there.get("CPU", 0.0) < num_cpus or there.get("GPU", 0.0) < num_gpus)


def replica_counts() -> dict[str, int]:
    """Return the number of replicas in each of Ray Serve's replica states, such as "running"."""
    deployment = _deployment()
    states = {} if deployment is None else deployment.replica_states
    return {str(state).lower(): number for state, number in states.items()}


@dataclass(frozen=True)
class Machine:
    """A machine of the Ray cluster, and the replicas on it."""

    address: str
    host: str
    is_head: bool
    num_cpus: float
    num_gpus: float
    replicas: tuple["ReplicaPlace", ...]

    def line(self) -> str:
        """Return a line for a person."""
        gpus = f", {plural(int(self.num_gpus), 'GPU')}" if self.num_gpus else ""
        head = ", Ray's head" if self.is_head else ""
        return f"machine {self.address} ({self.host}{head}): {self.num_cpus:g} cores for replicas{gpus}"


@dataclass(frozen=True)
class ReplicaPlace:
    """Where a replica runs. `log` is the path of its log on that machine, or "" if it has none yet."""

    id: str
    state: str
    pid: int | None
    log: str

    def line(self) -> str:
        """Return a line for a person."""
        process = "" if self.pid is None else f", process {self.pid}"
        return f"replica {self.id}: {self.state}{process}{f', log {self.log}' if self.log else ''}"


def machines() -> list[Machine]:
    """Return the machines of the Ray cluster, ordered by address. Those that have left aren't included."""
    joined = ray._private.worker._global_node
    assert joined is not None
    logs = joined.get_logs_dir_path()  # the same on all machines
    client = _get_global_client(raise_if_no_controller_running=False)
    details = {} if client is None else client.get_serve_details()
    app = details.get("applications", {}).get(APP) or {}
    found = (app.get("deployments", {}).get(DEPLOYMENT) or {}).get("replicas", [])
    places = defaultdict[str, list[ReplicaPlace]](list)
    for replica in sorted(found, key=lambda replica: str(replica["replica_id"])):
        log = f"{logs}/{str(replica['log_file_path']).lstrip('/')}" if replica.get("log_file_path") else ""
        place = ReplicaPlace(
            replica["replica_id"], ReplicaState(replica["state"]).value.lower(), replica.get("pid"), log
        )
        places[str(replica.get("node_id"))].append(place)
    return [
        Machine(
            *(node["NodeManagerAddress"], node["NodeManagerHostname"], _HEAD in node["Resources"]),
            *(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)),
            tuple(places[node["NodeID"]]),
        )
        for node in sorted(ray.nodes(), key=lambda node: str(node["NodeManagerAddress"]))
        if node["Alive"]
    ]


def start_fault() -> str:
    """Return why a replica doesn't start: the last line of Serve's message, or "" if there is no message."""
    deployment = _deployment()
    lines = [] if deployment is None else deployment.message.splitlines()
    return lines[-1].removeprefix(f"{StartupError.__module__}.{StartupError.__name__}: ") if lines else ""


def _deployment() -> DeploymentStatusOverview | None:
    found = serve.status().applications.get(APP)
    return None if found is None else found.deployments.get(DEPLOYMENT)


def running_replicas() -> Iterator[Addresses]:
    """Yield the running replicas, and again whenever they change. Replicas that are stopping aren't included.

    Raise ValueError if Serve hasn't started, OSError if this machine's Ray has ended, and an exception of Ray if
    Serve's controller is lost.
    """
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    key = (LongPollNamespace.DEPLOYMENT_TARGETS, DeploymentID(name=DEPLOYMENT, app_name=APP))
    snapshot = -1
    while True:
        answer = controller.listen_for_change.remote({key: snapshot})
        while not ray.wait([answer], timeout=_LOOK_SECONDS)[0]:
            _check_node()
        changed = ray.get(answer)
        if isinstance(changed, dict) and key in changed:  # else nothing has changed for a while
            snapshot = changed[key].snapshot_id
            targets = changed[key].object_snapshot
            yield {
                info.replica_id.unique_id: f"{info.node_ip}:{info.port}"
                for info in targets.running_replicas
                if info.node_ip is not None and info.port is not None
            }


def _check_node() -> None:
    """Raise OSError if the Ray node through which this process joined has ended."""
    joined = ray._private.worker._global_node
    assert joined is not None
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_LOOK_SECONDS)
        probe.connect(joined.raylet_socket_name)


def main(address: str, parent: int) -> int:
    """Print the running replicas until Ray is lost. Return the exit code."""
    end_with_parent(parent)
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints must not be between the lines
    set_up_ray()
    try:
        join(address)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Ray writes many lines about a head that is gone
        for replicas in running_replicas():
            print(json.dumps({"replicas": replicas}), file=lines, flush=True)
    except Exception as error:
        print(json.dumps({"fault": " ".join(str(error).split())[:300]}), file=lines, flush=True)
    os._exit(1)  # Ray's own clean-up waits for a head that is gone


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
