"""Replicas reached by a handle of Ray Serve's. What Serve gives its handles besides is named here alone.

Calls go over gRPC, straight to the replica (`_by_reference=False`), and from this process's event loop. Over Ray's
object store a step's message costs five times as much, and a replica isn't told when an API process has died.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatusOverview

from adapters.errors import SmoloraError
from server.cluster import watchers
from server.cluster.messages import Batch, Welcome
from server.engine.request import GenerationRequest
from server.errors import StartupError

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
        watchers.watch(told)
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
