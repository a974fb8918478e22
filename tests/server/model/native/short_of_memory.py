"""A process that runs out of memory in native code: `test_memory` runs it and checks how it ends.

Memory is limited by the address space (RLIMIT_AS), which also includes stacks of new threads.
"""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from server.engine.request import GenerationRequest
from server.engine.scheduler import SchedulerLimits
from server.errors import GenerationFailed
from server.model.base.weights import load_base
from server.model.native.library import load_library
from server.model.native.load import load_native
from server.model.native.model import ROW_FORMAT, NativeLora, NativeModel, StepTables
from server.model.native.training import NativeTraining
from server.model.rank_rows import RankRows
from tests.kits.engines import GREEDY, build_engine, run

LONG = 16000  # tokens, whose data take some 25 MB
MB = 1 << 20


@contextmanager
def no_more_than(num_bytes: int) -> Iterator[None]:
    """Limit the process to `num_bytes` more than it has mapped already."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def said(what: str) -> None:
    sys.stdout.write(f"{what}\n")


def main(base_dir: str, library_dir: str) -> None:
    torch.set_num_threads(1)
    base, library = load_base(Path(base_dir), torch.bfloat16), load_library(Path(library_dir))
    config = base.config

    def model_of(num_threads: int) -> NativeModel:
        return NativeModel(library, config, base.weights, max_positions=LONG, num_threads=num_threads)

    model = model_of(2)
    with no_more_than(100 * MB), pytest.raises(MemoryError):
        model_of(64)  # stacks of 8 MB each: some threads start, and must end again
    reasons: list[str] = []
    with no_more_than(15 * MB):  # each packed matrix takes 2
        assert load_native(base, Path(library_dir), LONG, reasons.append) is None
    assert reasons == ["no native code: no memory for it in native code; torch computes instead, more slowly"]
    said("threads")

    rows = RankRows(config.shape, max_rank=1, row_format=ROW_FORMAT, device=torch.device("cpu"))
    shape = (LONG // 16, config.num_layers, 16, config.num_kv_heads, config.head_dim)
    k, v = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2))
    lora, blocks = NativeLora(rows, []), np.arange(LONG // 16, dtype=np.int32)

    def forward(model: NativeModel, length: int) -> torch.Tensor:
        runs = np.array([(0, length, 0, 0, length)], np.int64)
        token_ids = np.arange(length, dtype=np.int64) % config.vocab_size
        return model.forward(StepTables(token_ids, runs, blocks, k, v, lora))

    expected = forward(model, 20)
    for size in (5, 8, 11):  # the answer takes 3
        model = model_of(2)
        with no_more_than(size * MB), pytest.raises(MemoryError, match="no memory"):
            forward(model, LONG)
        assert torch.equal(forward(model, 20), expected)
    said("serving")

    limits = SchedulerLimits(chunk_size=LONG, max_prefill_tokens=LONG)
    engine = build_engine(base, num_blocks=LONG // 16, max_model_len=LONG, limits=limits, native=model_of(2))
    short = GenerationRequest("short", tuple(range(100, 105)), GREEDY)
    before = run(engine, [short])["short", 0]
    engine.add(GenerationRequest("long", tuple(range(100, 350)) * 60, GREEDY))
    with no_more_than(8 * MB):  # Python needs some of what the native call leaves
        outputs = engine.step()
    assert [type(output.error) for output in outputs] == [GenerationFailed]
    assert not engine.is_dead
    again = run(engine, [short])["short", 0]
    assert again.token_ids == before.token_ids != []
    assert again.error is None
    said("the engine")

    training = NativeTraining(library, config, base.weights, {}, max_positions=LONG, num_threads=2)
    token_ids = torch.arange(LONG) % config.vocab_size
    expected = training.forward(token_ids[:20], [20])
    with no_more_than(6 * MB), pytest.raises(MemoryError, match="no memory"):
        training.forward(token_ids, [LONG])
    with pytest.raises(ValueError, match="hidden states must be"):
        training.backward(expected)
    assert torch.equal(training.forward(token_ids[:20], [20]), expected)
    training.backward(expected)
    said("training")


if __name__ == "__main__":
    main(*sys.argv[1:])
