"""`fleet.Transport` over Ray Serve, and Serve's router in an API process. Only this file uses Serve's handles.

The router sends a call to the replica that the call's first argument names. `client.py` chooses that replica,
since `client.py` receives the replicas' reports with the outputs, long before Serve's controller has them.

Calls go from this event loop over gRPC directly to the replica (`_by_reference=False`). Over Ray's object store, a
message for a step would cost five times as much, and a replica wouldn't notice when an API process has died.
"""

import asyncio
from collections.abc import AsyncGenerator
from functools import lru_cache

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from ray.serve.schema import DeploymentStatusOverview

from adapters.errors import SmoloraError
from adapters.store.store import AdapterStore
from server.cluster import fleet
from server.cluster.client import ReplicatedEngine
from server.cluster.messages import Batch, Welcome
from server.engine.request import GenerationRequest
from server.errors import StartupError
from server.model.base.weights import BaseModel
from server.serve.startup import Connect

APP = "smolora"
DEPLOYMENT = "engine"
NAMESPACE = "smolora"
_MAX_SIZES = 100_000  # cached sizes of adapters
_MAX_LEAVING = 64  # stopping replicas that are remembered


class ReplicaGoneError(Exception):
    """A call named a replica that doesn't exist any more."""


class AddressedRouter(RequestRouter):  # type: ignore[misc]  # mypy doesn't see Ray's types
    """A router for Ray Serve. Each process has one instance, created by its only deployment handle."""

    _leaving: dict[str, RunningReplica] | None = None  # by id: replicas that Serve is stopping, the latest last

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Handle Serve's new list of running replicas. Replicas that are stopping aren't in the list."""
        former = list(self.curr_replicas.values())
        super().update_replicas(replicas)
        ids = frozenset(_id_of(replica) for replica in replicas)
        left = {_id_of(replica): replica for replica in former if _id_of(replica) not in ids}
        kept = [*((self._leaving or {}) | left).items()]
        self._leaving = dict(kept[-_MAX_LEAVING:])
        fleet.notify(ids)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica that a call found dead."""
        super().on_replica_actor_died(replica_id)
        if self._leaving is not None:
            self._leaving.pop(replica_id.unique_id, None)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replica that the call names. If the replica is gone, the call fails at once.

        A call to a stopping replica still reaches it, since the call may abort a request that the replica runs.
        """
        assert pending_request is not None
        meant = pending_request.args[0]
        for replica in candidate_replicas:
            if _id_of(replica) == meant:
                pending_request.routing_context.should_backoff = True  # if the replica doesn't accept at once
                return [[replica]]
        if not pending_request.future.done():
            leaving = (self._leaving or {}).get(meant)
            if leaving is None:
                pending_request.future.set_exception(ReplicaGoneError(meant))
            else:
                pending_request.future.set_result(leaving)
            self._remove_pending_request_from_indices(pending_request)
        return [candidate_replicas]  # none is called: the call has its result already


def _id_of(replica: RunningReplica) -> str:
    found: str = replica.replica_id.unique_id
    return found


def join(address: str) -> None:
    """Join the Ray cluster at this address ("auto": this machine's). Raise StartupError if that fails."""
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


def start_fault() -> str:
    """Return why a replica doesn't start: the last line of Serve's message, or "" if there is no message."""
    deployment = _deployment()
    lines = [] if deployment is None else deployment.message.splitlines()
    return lines[-1].removeprefix(f"{StartupError.__module__}.{StartupError.__name__}: ") if lines else ""


def _deployment() -> DeploymentStatusOverview | None:
    found = serve.status().applications.get(APP)
    return None if found is None else found.deployments.get(DEPLOYMENT)


class ServeTransport:
    """An implementation of `fleet.Transport` for the deployment's replicas."""

    def __init__(self) -> None:
        self._handle: DeploymentHandle | None = None
        self._finding: asyncio.Task[None] | None = None

    def watch(self, on_change: fleet.OnChange) -> None:
        fleet.watch(on_change)
        self._finding = asyncio.create_task(self._find())

    async def follow(self, replica: str, client: str) -> AsyncGenerator[Welcome | Batch, None]:
        response = self._method("follow", stream=True).remote(replica, client)
        try:
            async for message in response:
                yield message
        finally:
            response.cancel()

    async def submit(self, replica: str, client: str, request: GenerationRequest) -> SmoloraError | None:
        answer: SmoloraError | None = await self._method("submit").remote(replica, client, request)
        return answer

    async def abort(self, replica: str, client: str, request_id: str) -> None:
        await self._method("abort").remote(replica, client, request_id)

    async def close(self) -> None:
        if self._finding is not None:
            self._finding.cancel()
        if self._handle is not None:
            await self._handle.shutdown_async()

    async def _find(self) -> None:
        """Wait until the deployment exists, and then get its handle, which creates the router."""
        while self._handle is None:
            try:
                handle = serve.get_deployment_handle(DEPLOYMENT, APP)
                handle._init(_run_router_in_separate_loop=False)
                self._handle = handle
            except Exception:  # Serve raises various exceptions while it starts
                await asyncio.sleep(0.5)

    def _method(self, name: str, stream: bool = False) -> DeploymentHandle:
        if self._handle is None:
            raise ConnectionError("no replica is known")
        return self._handle.options(
            method_name=name,
            stream=stream,
            _by_reference=False,
            request_serialization="pickle",
            response_serialization="pickle",
        )


def connect_to(address: str) -> Connect:
    """Return a function for `startup.build` that joins the Ray cluster at `address`.

    The function returns all replicas as one engine, or raises StartupError if it can't join.
    """

    def connect(base: BaseModel, store: AdapterStore) -> ReplicatedEngine:
        @lru_cache(_MAX_SIZES)
        def size_of(digest: str) -> int:
            return store.num_bytes(digest) or 1  # adapters of unknown size count alike

        join(address)
        return ReplicatedEngine(ServeTransport(), base.digest, size_of)

    return connect
