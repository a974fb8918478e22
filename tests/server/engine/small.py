"""Small simulations with few blocks, places and adapters."""

import random

from server.engine.kv_cache import BlockManager
from server.engine.scheduler import SchedulerLimits
from tests.server.engine.fake_adapters import FakeAdapters
from tests.server.engine.simulation import Simulation

SIZE = 4


def simulation(
    *,
    num_blocks: int = 40,
    capacity: int = 4,
    max_load_steps: int = 1,
    failing: frozenset[str] = frozenset(),
    seed: int = 0,
    max_num_seqs: int = 4,
    chunk_size: int = 8,
    max_prefill_tokens: int = 16,
    max_bypass: int = 3,
    drafts: bool = False,
) -> tuple[Simulation, FakeAdapters]:
    rng = random.Random(seed)
    gate = FakeAdapters(capacity, rng, max_load_steps, failing)
    limits = SchedulerLimits(max_num_seqs, chunk_size, max_prefill_tokens, max_bypass)
    blocks = BlockManager(num_blocks + 1, SIZE)
    sim = Simulation(limits, blocks, gate, lambda: bool(gate.loading), rng, on_step=gate.tick, drafts=drafts)
    return sim, gate


def prompt(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(2) for _ in range(length))


def unlike(number: int, length: int) -> tuple[int, ...]:
    """Return a prompt that shares no prefix with those of other numbers."""
    return tuple(1000 * number + i for i in range(length))
