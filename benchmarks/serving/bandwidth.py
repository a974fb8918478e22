"""Memory bandwidth, which bounds a single stream: each token reads every weight once."""

import time

import torch

TRIES = 5


def bandwidth(threads: int, size: int) -> float:
    """Return the bytes per second of reading `size` bytes, more than any cache holds: the best of several
    tries."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        memory = torch.zeros(size // 8, dtype=torch.int64)
        return size / min(_seconds(memory) for _ in range(TRIES))
    finally:
        torch.set_num_threads(before)


def _seconds(memory: torch.Tensor) -> float:
    started = time.perf_counter()
    memory.sum()
    return time.perf_counter() - started
