"""Ray Serve's router in an API process: a call goes to the replica that its first argument names.

Which one that should be is decided where the knowledge is, by `client`: what each replica has arrives with its
outputs, on the API process's own event loop, long before Serve's controller would tell.
"""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from server.cluster import watchers


class ReplicaGoneError(Exception):
    """A call was for a replica that isn't there any more."""


class AddressedRouter(RequestRouter):  # type: ignore[misc]  # Ray's types are not looked at
    """One a process: it is made by the process's only handle."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve tells which replicas run; those that are to stop are no longer among them."""
        super().update_replicas(replicas)
        watchers.tell(frozenset(replica.replica_id.unique_id for replica in replicas))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The one that is meant; where it is gone, the call fails at once."""
        assert pending_request is not None
        meant = pending_request.args[0]
        for replica in candidate_replicas:
            if replica.replica_id.unique_id == meant:
                pending_request.routing_context.should_backoff = True  # if it doesn't take the call at once
                return [[replica]]
        if not pending_request.future.done():
            pending_request.future.set_exception(ReplicaGoneError(meant))
        return [candidate_replicas]  # of which none is asked: the call has ended
