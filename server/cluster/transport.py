"""Ray Serve's router in an API process: a call goes to the replica that its first argument names.

Which one that should be is decided where the knowledge is, by `client`: what each replica has arrives with its
outputs, on the API process's own event loop, long before Serve's controller would tell.

Replicas reached by a handle of Ray Serve's. What Serve gives its handles besides is named here alone.

Calls go over gRPC, straight to the replica (`_by_reference=False`), and from this process's event loop. Over Ray's
object store a step's message costs five times as much, and a replica isn't told when an API process has died.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from ray.serve.schema import DeploymentStatusOverview

from adapters.errors import SmoloraError
from server.cluster import fleet
from server.cluster.messages import Batch, Welcome
from server.engine.request import GenerationRequest
from server.errors import StartupError

_MAX_LEAVING = 64  # of those that are to stop: as many are remembered


class ReplicaGoneError(Exception):
    """A call was for a replica that isn't there any more."""


class AddressedRouter(RequestRouter):  # type: ignore[misc]  # Ray's types are not looked at
    """One a process: it is made by the process's only handle."""

    _leaving: dict[str, RunningReplica] | None = None  # by id, those that Serve told to stop, the latest last

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve tells which replicas run; those that are to stop are no longer among them."""
        former = list(self.curr_replicas.values())
        super().update_replicas(replicas)
        ids = frozenset(_id_of(replica) for replica in replicas)
        left = {_id_of(replica): replica for replica in former if _id_of(replica) not in ids}
        kept = [*((self._leaving or {}) | left).items()]
        self._leaving = dict(kept[-_MAX_LEAVING:])
        fleet.tell(ids)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A call has found that it is dead."""
        super().on_replica_actor_died(replica_id)
        if self._leaving is not None:
            self._leaving.pop(replica_id.unique_id, None)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The one that is meant, one that is to stop as well: what runs there may be aborted.

        Where it is gone, the call fails at once.
        """
        assert pending_request is not None
        meant = pending_request.args[0]
        for replica in candidate_replicas:
            if _id_of(replica) == meant:
                pending_request.routing_context.should_backoff = True  # if it doesn't take the call at once
                return [[replica]]
        if not pending_request.future.done():
            leaving = (self._leaving or {}).get(meant)
            if leaving is None:
                pending_request.future.set_exception(ReplicaGoneError(meant))
            else:
                pending_request.future.set_result(leaving)
            self._remove_pending_request_from_indices(pending_request)
        return [candidate_replicas]  # of which none is asked: the call has its answer


def _id_of(replica: RunningReplica) -> str:
    found: str = replica.replica_id.unique_id
    return found


APP = "smolora"
DEPLOYMENT = "engine"
NAMESPACE = "smolora"


def join(address: str) -> None:
    """Become a part of the Ray cluster at this address, or "auto" for this machine's. Raises StartupError."""
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="warning")
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise StartupError(f"no Ray cluster at {address}: {error}") from error


def leave() -> None:
    """Be no part of it any more; what was deployed stays."""
    ray.shutdown()


def has_room(num_cpus: float, num_gpus: float) -> bool:
    """Whether so much is free, all machines together."""
    free = ray.available_resources()
    return bool(free.get("CPU", 0.0) >= num_cpus and free.get("GPU", 0.0) >= num_gpus)


def is_too_small(num_cpus: float, num_gpus: float) -> bool:
    """Whether all machines together haven't so much, free or not."""
    there = ray.cluster_resources()
    return bool(there.get("CPU", 0.0) < num_cpus or there.get("GPU", 0.0) < num_gpus)


def replicas_told() -> dict[str, int]:
    """How many replicas there are, by what Serve says of them."""
    deployment = _deployment_told()
    states = {} if deployment is None else deployment.replica_states
    return {str(state).lower(): number for state, number in states.items()}


def fault_told() -> str:
    """The last line of what Serve says of the replicas, which is how one ended that doesn't start, if any does."""
    deployment = _deployment_told()
    lines = [] if deployment is None else deployment.message.splitlines()
    return lines[-1].removeprefix(f"{StartupError.__module__}.{StartupError.__name__}: ") if lines else ""


def _deployment_told() -> DeploymentStatusOverview | None:
    found = serve.status().applications.get(APP)
    return None if found is None else found.deployments.get(DEPLOYMENT)


class ServeTransport:
    """The replicas of the deployment; `fleet.Transport`."""

    def __init__(self) -> None:
        self._handle: DeploymentHandle | None = None
        self._finding: asyncio.Task[None] | None = None

    def watch(self, told: Callable[[frozenset[str]], None]) -> None:
        """Have `told` called with the replicas' ids, now and whenever they change."""
        fleet.watch(told)
        self._finding = asyncio.create_task(self._find())

    async def follow(self, replica: str, client: str) -> AsyncGenerator[Welcome | Batch, None]:
        """The replica's `follow`."""
        response = self._method("follow", stream=True).remote(replica, client)
        try:
            async for message in response:
                yield message
        finally:
            response.cancel()

    async def submit(self, replica: str, client: str, request: GenerationRequest) -> SmoloraError | None:
        """The replica's `submit`."""
        answer: SmoloraError | None = await self._method("submit").remote(replica, client, request)
        return answer

    async def abort(self, replica: str, client: str, request_id: str) -> None:
        """The replica's `abort`."""
        await self._method("abort").remote(replica, client, request_id)

    async def close(self) -> None:
        """End what watches."""
        if self._finding is not None:
            self._finding.cancel()
        if self._handle is not None:
            await self._handle.shutdown_async()

    async def _find(self) -> None:
        """Get the handle, which tells the router of the replicas, as soon as the deployment is there."""
        while self._handle is None:
            try:
                handle = serve.get_deployment_handle(DEPLOYMENT, APP)
                handle._init(_run_router_in_separate_loop=False)
                self._handle = handle
            except Exception:  # whatever Serve has while it starts
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
