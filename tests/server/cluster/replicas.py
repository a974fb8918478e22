"""Replicas in this process: real engines, with messages that are pickled in transit."""

import asyncio
import pickle
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

from adapters.errors import SmoloraError
from adapters.lora import LoraWeights
from server.cluster.client import ReplicatedEngine
from server.cluster.messages import Batch, Welcome
from server.cluster.replica import EngineReplica
from server.engine.adapter_pool import Load
from server.engine.request import GenerationRequest
from server.model.base.weights import BaseModel
from server.serve.engine import guidance_of
from tests.server.engine.async_bench import Bench, eventually

T = TypeVar("T")


class CutError(Exception):
    """The replica is gone."""


class LocalTransport:
    """A `fleet.Transport`. A replica can be lost at any time, as by kill -9, and return as a new one."""

    def __init__(self) -> None:
        self.replicas: dict[str, EngineReplica] = {}
        self.submitted: list[tuple[str, str]] = []  # (replica, request)
        self.num_messages = 0
        self._on_change: Callable[[frozenset[str]], None] | None = None
        self._cuts: dict[str, asyncio.Event] = {}
        self._known: dict[str, EngineReplica] = {}  # includes replicas that are leaving

    def watch(self, on_change: Callable[[frozenset[str]], None]) -> None:
        self._on_change = on_change
        self.tell()

    def tell(self) -> None:
        """Notify the client, as Serve does when replicas come or go."""
        if self._on_change is not None:
            self._on_change(frozenset(self.replicas))

    def add(self, name: str, replica: EngineReplica) -> None:
        self.replicas[name] = self._known[name] = replica
        self._cuts[name] = asyncio.Event()
        self.tell()

    def cut(self, name: str) -> None:
        """Lose the connection; the replica isn't notified."""
        self._cuts[name].set()

    def remove(self, name: str) -> None:
        """Remove the replica, as Serve does when it stops it; its requests continue."""
        del self.replicas[name]
        self.tell()

    async def follow(self, replica: str, client: str) -> AsyncGenerator[Welcome | Batch, None]:
        messages = self._replica(replica).follow(client)
        cut = asyncio.ensure_future(self._cuts[replica].wait())
        coming = None
        try:
            while True:
                coming = asyncio.ensure_future(anext(messages, None))
                await asyncio.wait({coming, cut}, return_when=asyncio.FIRST_COMPLETED)
                if cut.done():
                    raise CutError
                if (message := coming.result()) is None:
                    return
                self.num_messages += isinstance(message, Batch) and bool(message.outputs)
                yield sent(message)
        finally:
            cut.cancel()
            if coming is not None and not coming.done():
                coming.cancel()
                await asyncio.wait({coming})
            await messages.aclose()

    async def submit(self, replica: str, client: str, request: GenerationRequest) -> SmoloraError | None:
        self.submitted.append((replica, request.request_id))
        await asyncio.sleep(0)
        return sent(await self._replica(replica).submit(client, sent(request)))

    async def abort(self, replica: str, client: str, request_id: str) -> None:
        await self._replica(replica).abort(client, request_id)

    async def close(self) -> None:
        pass

    def _replica(self, name: str) -> EngineReplica:
        if self._cuts[name].is_set():
            raise CutError
        return self._known[name]


def sent(message: T) -> T:
    """Return the message as it arrives."""
    arrived: T = pickle.loads(pickle.dumps(message))
    return arrived


class Local:
    """A client of `num` replicas, each with its own engine over `base`; ready when entered."""

    def __init__(
        self,
        base: BaseModel,
        adapters: dict[str, LoraWeights] | Load | None = None,
        num: int = 2,
        **options: object,
    ) -> None:
        self._base = base
        self.benches = {
            f"replica-{index}": Bench(base, adapters, **options)  # type: ignore[arg-type]  # Bench's own
            for index in range(num)
        }
        self.transport = LocalTransport()
        self.client = ReplicatedEngine(self.transport, base.digest, lambda digest: 1)
        self._running: list[EngineReplica] = []

    async def __aenter__(self) -> ReplicatedEngine:
        self.client.start()
        for name in self.benches:
            self.bring(name)
        await eventually(lambda: len(self.client._ready_links()) == len(self.benches))
        return self.client

    async def __aexit__(self, *_: object) -> None:
        await self.client.stop()
        for replica in self._running:
            await replica.stop()

    def bring(self, name: str) -> None:
        """Start the replica's engine, and announce it."""
        bench = self.benches[name]
        replica = EngineReplica(
            bench.asynchronous, guidance_of(self._base), self._base.digest, self._base.config.vocab_size
        )
        self._running.append(replica)
        self.transport.add(name, replica)

    def place_of(self, request_id: str) -> str:
        """Return the replica to which the request was sent last."""
        return next(place for place, name in reversed(self.transport.submitted) if name == request_id)
