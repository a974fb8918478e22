"""What an API process has in the place of an engine."""

from functools import lru_cache

from adapters.store.store import AdapterStore
from server.cluster.client import ReplicatedEngine
from server.cluster.serve_transport import ServeTransport, join
from server.model.base.weights import BaseModel
from server.serve.startup import Connect

_MAX_SIZES = 100_000


def connect_to(address: str) -> Connect:
    """For `startup.build`: joins the Ray cluster at `address`. Raises StartupError where there is none."""

    def connect(base: BaseModel, store: AdapterStore) -> ReplicatedEngine:
        @lru_cache(_MAX_SIZES)
        def size_of(digest: str) -> int:
            return store.num_bytes(digest) or 1  # of those that aren't here, each counts for as much

        join(address)
        return ReplicatedEngine(ServeTransport(), base.digest, size_of)

    return connect
