"""The real pool over small rank rows, with loads run step by step."""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from typing import Any

import torch

from adapters.lora import MODULES, AdapterRef, BaseShape, LoraModule, LoraWeights, ModuleKey
from server.engine.adapter_pool import AdapterHold, AdapterPool
from server.model.rank_rows import RankRows, RowFormat
from tests.kits.engines import check_pool

SHAPE = BaseShape(2, dict.fromkeys(MODULES, (4, 4)) | {"q_proj": (8, 4)})


class HandExecutor(Executor):
    """An executor whose tasks a test runs one by one, in any order."""

    def __init__(self) -> None:
        self.tasks: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.tasks.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run_one(self, index: int = 0) -> None:
        future, task = self.tasks.pop(index)
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = task()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    def run_all(self) -> None:
        while self.tasks:
            self.run_one()


def adapter(value: float, rank: int = 1, modules: tuple[str, ...] = MODULES, layers: int = 2) -> LoraWeights:
    """Return an adapter whose A and B are filled with `value`."""
    return LoraWeights(
        {
            ModuleKey(layer, name): LoraModule(
                torch.full((rank, SHAPE.features[name][1]), value),
                torch.full((SHAPE.features[name][0], rank), value),
                1.0,
            )
            for layer in range(layers)
            for name in modules
        }
    )


class Bench:
    """A pool with its executor. `library` holds the adapters that can be loaded, and may change."""

    def __init__(self, library: Mapping[str, LoraWeights | Exception], max_rank: int) -> None:
        self.library = dict(library)
        self.executor = HandExecutor()
        self.num_wakes = 0
        self.num_reads = 0
        rows = RankRows(
            SHAPE,
            max_rank=max_rank,
            row_format=RowFormat(torch.float32, torch.float32),
            device=torch.device("cpu"),
        )
        self.pool = AdapterPool(rows, self.load, self.executor, self.executor, self.wake)

    def wake(self) -> None:
        self.num_wakes += 1

    def load(self, digest: str) -> LoraWeights:
        self.num_reads += 1
        found = self.library[digest]
        if isinstance(found, Exception):
            raise found
        return found

    def hold(self, *digests: str) -> AdapterHold:
        return self.pool.hold(tuple(AdapterRef(digest) for digest in sorted(digests)))

    def ready(self, *digests: str) -> AdapterHold:
        """Return a hold once it is ready, however long that takes."""
        hold = self.hold(*digests)
        for _ in range(10):
            if hold.advance():
                self.check()
                return hold
            assert self.executor.tasks, "it waits for nothing"
            self.executor.run_all()
        raise AssertionError("it never became ready")

    def check(self) -> None:
        """Check that the extents are consistent, and that resident rows are where their placement says."""
        check_pool(self.pool)
        for digest in self.pool.resident:
            weights = self.library[digest]
            assert isinstance(weights, LoraWeights)
            placement = self.pool._adapters[digest].placement
            assert placement is not None
            for group, run in placement.items():
                for module in run.rows.modules:
                    expected = weights.modules[ModuleKey(1, module.module)]
                    first = run.first_row + module.row
                    assert torch.equal(self.pool.rows.a[group][1, first : first + module.rank], expected.a)
