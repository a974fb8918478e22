"""Engines that always draft or never draft, whatever the machine's speed."""

from collections.abc import Sequence
from dataclasses import replace

from server.engine.cost_model import RowCosts
from server.engine.engine import Engine
from server.engine.request import GenerationRequest
from server.engine.runner import Drawn, Runner
from server.engine.sequence import Chunk
from tests.kits.engines import Results, run


class SetCosts(RowCosts):
    """Fixed costs instead of measured ones: 0 drafts every guess, 1 none."""

    def __init__(self, cost: float) -> None:
        super().__init__(64)
        self.cost = cost

    def of(self, num_sequences: int) -> float:
        return self.cost


def drafting(engine: Engine, cost: float = 0.0) -> Engine:
    """Set the cost of a drafted token, and return the engine."""
    engine.speculator.costs = SetCosts(cost)
    return engine


def without(requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
    """Return the requests with speculation off."""
    return [replace(r, sampling=replace(r.sampling, speculates=False)) for r in requests]


def check_identity(plain: Engine, engine: Engine, requests: Sequence[GenerationRequest]) -> Results:
    """Return the answers of `engine`, and check that they equal those of `plain` without drafts bit for bit.

    Between steps no blocks are held for drafts.
    """

    def check_blocks() -> None:
        for sequence in engine.scheduler.running:
            assert len(sequence.block_table) == engine.blocks.blocks_for(sequence.num_computed_tokens)

    expected = run(plain, without(requests))
    assert plain.stats.drafted_tokens == 0
    found = run(engine, requests, after_step=check_blocks)
    for key, result in expected.items():
        assert found[key] == result, key
    return found


class TimedRunner(Runner):
    """A runner with a clock by which a step takes a second, and each drafted token `cost` more."""

    def __init__(self, runner: Runner, cost: float) -> None:
        super().__init__(runner.backend)
        self.cost = cost
        self.now = 0.0

    def run(self, chunks: Sequence[Chunk]) -> list[Drawn]:
        self.now += 1 + self.cost * sum(len(chunk.draft) for chunk in chunks)
        return super().run(chunks)
