"""Parts of an engine that fail on demand."""

import math
import threading
from collections.abc import Sequence as Seq
from dataclasses import replace

from adapters.lora import LoraWeights
from server.engine.engine import Engine
from server.engine.runner import Drawn, Runner
from server.engine.scheduler import Scheduler, Step
from server.engine.sequence import Chunk
from server.model.base.weights import BaseModel
from server.model.smollm import SmolLM
from tests.server.engine.traffic import library


class FailingRunner(Runner):
    """The engine's runner, but steps named in `failing` (counted from 0) raise."""

    def __init__(self, runner: Runner, failing: set[int]) -> None:
        super().__init__(runner.backend)
        self.failing = failing
        self.num_runs = 0

    def run(self, chunks: Seq[Chunk]) -> list[Drawn]:
        self.num_runs += 1
        if self.num_runs - 1 in self.failing:
            raise RuntimeError("a secret of the device")
        return super().run(chunks)


def overflowing(base: BaseModel) -> SmolLM:
    """Return a model of the base whose final hidden states are infinite."""
    weights = replace(base.weights, final_norm=base.weights.final_norm * math.inf)
    return SmolLM(base.config, weights, max_positions=512)


class BrokenScheduler(Scheduler):
    """The engine's scheduler, but it raises."""

    def __init__(self, engine: Engine) -> None:
        self.__dict__ = vars(engine.scheduler)

    def schedule(self) -> Step:
        raise AssertionError("an invariant is broken")


class SlowLoad:
    """Loads that wait for `go`, except those of `quick` adapters."""

    def __init__(self, base: BaseModel) -> None:
        self.adapters = library(base, 4)
        self.quick: frozenset[str] = frozenset()
        self.go = threading.Event()
        self.num_started = 0

    def __call__(self, digest: str) -> LoraWeights:
        self.num_started += 1
        assert digest in self.quick or self.go.wait(100)
        return self.adapters[digest]
