"""Ray Serve's router in an API process: a call goes to the replica that its first argument names.

Which one that should be is decided where the knowledge is, by `client`: what each replica has arrives with its
outputs, on the API process's own event loop, long before Serve's controller would tell.
"""

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from server.cluster import watchers

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
        watchers.tell(ids)

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
