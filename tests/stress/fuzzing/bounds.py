"""The cost of an input, and whether it is within its target's bounds.

Time is processor time, so that a busy machine fails nothing. Memory is the growth of the resident set's peak; if
the kernel can't reset the peak (`/proc/self/clear_refs`), it is the growth beyond all earlier inputs.
"""

import os
import resource
import time
from contextlib import suppress
from dataclasses import dataclass

from tests.stress.fuzzing.target import Target

_TRIES = 3
"""Runs of an input that exceeded its bounds; the least cost counts, as the first run may have imported a
module."""


class TooMuchError(Exception):
    """An input exceeded its time or memory."""


@dataclass(frozen=True)
class Cost:
    """The cost of an input."""

    cpu_seconds: float
    memory: int  # bytes


class Meter:
    """Runs inputs of one target within its bounds."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._refs: int | None = None
        with suppress(OSError):
            self._refs = os.open("/proc/self/clear_refs", os.O_WRONLY)

    def run(self, data: bytes) -> tuple[str, Cost]:
        """Run an input; return its outcome and cost. Raise TooMuchError, or any exception of the target."""
        outcome, cost = self._once(data)
        for _ in range(_TRIES - 1):
            if self._fault(data, cost) is None:
                break
            _, again = self._once(data)
            cost = Cost(min(cost.cpu_seconds, again.cpu_seconds), min(cost.memory, again.memory))
        if (fault := self._fault(data, cost)) is not None:
            raise TooMuchError(fault)
        return outcome, cost

    def close(self) -> None:
        if self._refs is not None:
            os.close(self._refs)

    def _once(self, data: bytes) -> tuple[str, Cost]:
        if self._refs is not None:
            os.pwrite(self._refs, b"5", 0)
        memory, begun = _peak(), _cpu_seconds()
        outcome = self._target.run(data)
        return outcome, Cost(_cpu_seconds() - begun, max(0, _peak() - memory))

    def _fault(self, data: bytes, cost: Cost) -> str | None:
        most = self._target.memory + 8 * len(data)
        if cost.cpu_seconds > self._target.cpu_seconds:
            return f"took {cost.cpu_seconds:.2f} s of a processor, {self._target.cpu_seconds:g} s is the most"
        if cost.memory > most:
            return f"took {cost.memory >> 20} MiB of memory, {most >> 20} MiB is the most"
        return None


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
