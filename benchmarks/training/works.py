"""Work of the training benchmark, and its targets."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.training.peer import COMPILED, EAGER, PACKED
from benchmarks.training.runs import NATIVE, TORCH, WARM_UP, Side
from server.training.spec import Method


@dataclass(frozen=True)
class Work:
    """Rows, the sides that train on them, and the target of our speed relative to a side."""

    key: str
    title: str
    method: Method
    batch_size: int
    shortest: int
    longest: int
    steps: int  # timed steps
    sides: tuple[Side, ...]
    speeds: dict[Side, float]
    most_memory: float | None = None  # relative to the compiled peer

    def without(self, *left_out: Side) -> "Work":
        return replace(self, sides=tuple(side for side in self.sides if side not in left_out))


WORKS = (
    Work(
        "8x128", "LoRA, 8 × 128 tokens", "lora", 8, 128, 128, 6, (NATIVE, TORCH, EAGER, COMPILED), {COMPILED: 2.2}
    ),
    Work(
        *("4x512", "LoRA, 4 × 512 tokens", "lora", 4, 512, 512, 4),
        *((NATIVE, TORCH, EAGER, COMPILED), {COMPILED: 2.4}, 1 / 3),
    ),
    Work(
        "full",
        "full fine-tuning, 8 × 128 tokens",
        "full",
        8,
        128,
        128,
        4,
        (NATIVE, TORCH, EAGER, COMPILED),
        {COMPILED: 1.8},
    ),
    Work(
        *("short", "LoRA, 8 rows of 10–40 tokens", "lora", 8, 10, 40, 16),
        *((NATIVE, TORCH, EAGER, PACKED, COMPILED), {EAGER: 4.0, PACKED: 2.5, COMPILED: 3.0}),
    ),
)


def rows_of(work: Work, text: Sequence[int]) -> list[list[int]]:
    """Cut consecutive pieces of the text: batches for warm-up, then those of the timed steps."""
    lengths = random.Random(0)
    rows, place = [], 0
    for _ in range(work.batch_size * (work.steps + WARM_UP)):
        length = lengths.randint(work.shortest, work.longest)
        if place + length > len(text):
            place = 0
        rows.append(list(text[place : place + length]))
        place += length
    return rows


def reduced(work: Work) -> Work:
    """Return a reduced work for a quick run, without slow or redundant sides."""
    left = work.without(COMPILED, *([TORCH] if NATIVE in work.sides else []))
    shortest, longest = min(work.shortest, 8), min(work.longest, 24)
    return replace(left, batch_size=2, shortest=shortest, longest=longest, steps=1)
