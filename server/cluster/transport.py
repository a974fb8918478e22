"""`fleet.Transport` over gRPC, directly to the servers that Ray Serve runs in the replicas for its own calls.

An API process isn't part of the Ray cluster. It learns of replicas from a child process (`finder.py`), and calls
them without Serve's router, since `client.py` chooses the replica. So it outlives Ray's head: replicas that still
run keep answering. Calls carry Ray's token.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import cast

from ray._private.grpc_utils import init_grpc_channel
from ray.serve._private.common import RequestMetadata
from ray.serve._private.constants import RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH
from ray.serve._private.serialization import RPCSerializer
from ray.serve.generated.serve_pb2 import ASGIRequest, ASGIResponse
from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

from adapters.errors import SmoloraError
from adapters.store.store import AdapterStore
from server.cluster import fleet
from server.cluster.client import ReplicatedEngine
from server.cluster.messages import APP, Batch, Welcome
from server.engine.request import GenerationRequest
from server.model.base.weights import BaseModel
from server.serve.startup import Connect

_MAX_SIZES = 100_000  # cached sizes of adapters
_RESTART_SECONDS = 1.0  # between the end of a finder and the start of the next one
_APP = "smolora"
_MAX_LINE = 1 << 24  # bytes of a finder's line
_PICKLE = "pickle"
_OPTIONS = [
    ("grpc.max_receive_message_length", RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH),
    ("grpc.max_reconnect_backoff_ms", 1000),  # else a network that was cut for long isn't tried for two minutes
    ("grpc.use_local_subchannel_pool", 1),
]

log = logging.getLogger(__name__)


class _Replica:
    """The connection to one replica."""

    def __init__(self, address: str) -> None:
        self.channel = init_grpc_channel(address, _OPTIONS, asynchronous=True)
        self.stub = ASGIServiceStub(self.channel)


class ReplicaTransport:
    """An implementation of `fleet.Transport` for the replicas of the Ray cluster at `address`.

    `running` are the addresses by id of replicas that are known without `watch`.
    """

    def __init__(self, address: str, running: Mapping[str, str] | None = None) -> None:
        self._address = address
        self._serializer = RPCSerializer.get_cached_serializer(_PICKLE, _PICKLE)
        self._running = dict(running or {})  # addresses by id, of the replicas that aren't stopping
        self._replicas: dict[str, _Replica] = {}  # connections by id; also to stopping replicas that are followed
        self._followed: set[str] = set()
        self._finding: asyncio.Task[None] | None = None
        self._fault = ""

    def watch(self, on_change: fleet.OnChange) -> None:
        self._finding = asyncio.create_task(self._find(on_change))

    async def follow(self, replica: str, client: str) -> AsyncGenerator[Welcome | Batch, None]:
        call = self._stub(replica).HandleRequestStreaming(self._request("follow", client, streams=True))
        self._followed.add(replica)
        try:
            async for response in call:
                yield cast("Welcome | Batch", self._content_of(response))
        finally:
            call.cancel()
            self._followed.discard(replica)
            self._drop_unused()

    async def submit(self, replica: str, client: str, request: GenerationRequest) -> SmoloraError | None:
        return await self._call(replica, "submit", client, request)

    async def abort(self, replica: str, client: str, request_id: str) -> None:
        await self._call(replica, "abort", client, request_id)

    async def close(self) -> None:
        if self._finding is not None:
            self._finding.cancel()
            with suppress(asyncio.CancelledError):
                await self._finding
        for replica in self._replicas.values():
            await replica.channel.close()

    def _stub(self, name: str) -> ASGIServiceStub:
        if name not in self._replicas:
            if name not in self._running:
                raise ConnectionError("the replica is gone")
            self._replicas[name] = _Replica(self._running[name])
        return self._replicas[name].stub

    def _drop_unused(self) -> None:
        """Close the connections to replicas that have stopped."""
        for name in self._replicas.keys() - self._running.keys() - self._followed:
            del self._replicas[name]  # without a reference, gRPC closes it

    async def _call(self, replica: str, method: str, *arguments: object) -> SmoloraError | None:
        response = await self._stub(replica).HandleRequest(self._request(method, *arguments))
        return cast("SmoloraError | None", self._content_of(response))

    def _request(self, method: str, *arguments: object, streams: bool = False) -> ASGIRequest:
        """Return a call of the replica's method in the form in which Serve's handles send it."""
        metadata = RequestMetadata(
            request_id=(number := uuid.uuid4().hex),
            internal_request_id=number,
            call_method=method,
            app_name=APP,
            is_streaming=streams,
            _by_reference=False,
            _on_separate_loop=False,
            request_serialization=_PICKLE,
            response_serialization=_PICKLE,
        )
        dumps = self._serializer.dumps_request
        return ASGIRequest(
            pickled_request_metadata=dumps(metadata), request_args=dumps(arguments), request_kwargs=dumps({})
        )

    def _content_of(self, response: ASGIResponse) -> object:
        content = self._serializer.loads_response(response.serialized_message)
        if response.is_error:  # it may be a CancelledError, which must not end a task of this process
            raise ConnectionError(f"{type(content).__name__}: {content}")
        return content

    async def _find(self, on_change: fleet.OnChange) -> None:
        """Run finders, one after the other, and report the replicas that they find."""
        while True:
            try:
                await self._run_finder(on_change)
            except (OSError, ValueError) as error:
                self._note(f"{type(error).__name__}: {error}")
            await asyncio.sleep(_RESTART_SECONDS)

    async def _run_finder(self, on_change: fleet.OnChange) -> None:
        """Report the replicas that one finder finds, until it ends.

        Raise OSError if it can't be started, or ValueError if it prints anything else.
        """
        finder = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "server.cluster.finder", self._address, str(os.getpid())),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_LINE,
        )
        try:
            assert finder.stdout is not None
            async for line in finder.stdout:
                self._take(json.loads(line), on_change)
        finally:
            if finder.returncode is None:
                with suppress(ProcessLookupError):
                    os.kill(finder.pid, signal.SIGKILL)  # `finder.kill` may reap it, which asyncio reports
            await finder.wait()

    def _take(self, found: dict[str, object], on_change: fleet.OnChange) -> None:
        replicas = found.get("replicas")
        if not isinstance(replicas, dict):
            self._note(str(found.get("fault")))
            return
        self._note("")
        self._running = replicas
        self._drop_unused()
        on_change(frozenset(replicas))

    def _note(self, fault: str) -> None:
        """Log that Ray is lost, once for each reason, or that it is there again."""
        if fault and fault != self._fault:
            log.warning("Ray's head can't be asked for engine replicas, and is tried again: %s", fault)
        elif self._fault and not fault:
            log.warning("Ray's head answers again")
        self._fault = fault


def connect_to(address: str) -> Connect:
    """Return a function for `startup.build` that returns all replicas of the Ray cluster as one engine.

    The cluster at `address` needn't run yet.
    """

    def connect(base: BaseModel, store: AdapterStore) -> ReplicatedEngine:
        @lru_cache(_MAX_SIZES)
        def size_of(digest: str) -> int:
            return store.num_bytes(digest) or 1  # adapters of unknown size count alike

        return ReplicatedEngine(ReplicaTransport(address), base.digest, size_of)

    return connect
