"""fp32 in Triton's interpreter: `TRITON_INTERPRET=1 python -m tests.server.model.cuda.interpreted PART`.

It is a process of its own, since Triton decides at its import whether it interprets. The interpreter's bf16 is
wrong in every version so far, so it proves nothing there. Its fp32 products are numpy's, which round by the place
of a row. Here each dot is summed in fp64 and rounded once, so that equal bits mean that the kernel's own order is
the same.
"""
# ruff: noqa: T201

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from server.engine.cuda_backend import CudaBackend, Launch
from server.engine.request import EngineStats, GenerationRequest
from server.model.base.config import ModelConfig
from server.model.base.weights import BaseModel
from server.model.cuda.variants import variants
from server.model.rank_rows import GROUPS
from tests.kits import kernels as kit
from tests.kits.engines import GREEDY, Results, build_engine, refs, run
from tests.kits.kernels import FAMILY, PAGE, SMALL, interpreted
from tests.server.engine.traffic import TIGHT, assert_same, library
from tests.server.model.cuda.bases import two_layers


def _dot(self: object, a: Any, b: Any, d: Any, *_: object) -> Any:
    total = a.data.astype(np.float64) @ b.data.astype(np.float64) + d.data
    return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)


def answered(
    base: BaseModel, requests: Sequence[GenerationRequest], num_blocks: int, launch: Launch | None = interpreted
) -> tuple[Results, EngineStats]:
    """Answer requests over a cache of this many blocks, with torch if `launch` is None. Return the counts, too."""
    cuda = launch and CudaBackend(base.config, base.weights, max_positions=512, launch=launch)
    engine = build_engine(
        base,
        library(base),
        num_blocks=num_blocks,
        max_rank=64,
        limits=TIGHT,
        other=cuda,
        loads_at_once=True,  # otherwise the number of preemptions depends on threads
    )
    found, stats = run(engine, requests), engine.stats
    engine.close()
    return found, stats


def compared(base: BaseModel, requests: Sequence[GenerationRequest], num_blocks: int) -> tuple[float, EngineStats]:
    """Answer requests with the cuda backend and torch's, over a cache of this many blocks.

    Return the largest relative difference of log-probabilities, and the cuda backend's counts. Answer each request
    alone, too, over another number of blocks: the cuda backend's bits must be the same.
    """
    (ours, stats), (torchs, _) = (answered(base, requests, num_blocks, of) for of in (interpreted, None))
    errors = []
    for key, expected in torchs.items():
        assert_same(ours[key], expected)
        pairs = zip(ours[key].logprobs, expected.logprobs, strict=True)
        errors += [abs(found - torchs_own) / abs(torchs_own) for found, torchs_own in pairs]
    for request in requests:
        alone, _ = answered(base, [request], num_blocks + 9)
        for key, found in alone.items():
            assert (found.token_ids, found.logprobs) == (ours[key].token_ids, ours[key].logprobs), key
    return max(errors), stats


SHARED = tuple(range(20, 57))
REQUESTS = (
    GenerationRequest("base", SHARED, replace(GREEDY, max_tokens=3)),
    GenerationRequest("prefix", (*SHARED, 9), replace(GREEDY, max_tokens=3)),
    GenerationRequest("one", (7, 8, 9), replace(GREEDY, max_tokens=4), refs(**{"00": 1.0})),
    GenerationRequest("blend", (5, 4, 3, 2) * 3, replace(GREEDY, max_tokens=3), refs(**{"02": 0.6, "03": -0.5})),
)
PREEMPTED = tuple(
    GenerationRequest(f"long {i}", tuple(range(90 + i, 104 + i)), replace(GREEDY, max_tokens=5), adapters)
    for i, adapters in enumerate((refs(**{"00": 0.5}), (), (), refs(**{"02": 0.6, "03": -0.5})))
)


def check_engine(base: BaseModel) -> float:
    """Check mixed steps: prompts are computed while others decode, one with a blend. One prefix is cached."""
    error, stats = compared(base, REQUESTS, 32)
    assert stats.prefix_cached_tokens >= 32
    return error


def check_preemption(base: BaseModel) -> float:
    """Check an engine that preempts sequences, since its cache has too few blocks. Two have adapters."""
    error, stats = compared(base, PREEMPTED, 4)
    assert stats.preemptions
    return error


def check_kernels(sizes: Mapping[str, ModelConfig]) -> None:
    for name, config in sizes.items():
        of_config = variants(config, PAGE)
        print("attention", name, kit.check_attention(interpreted, of_config, config, torch.float32))
        print("rows", name, kit.check_rows(interpreted, of_config, config, torch.float32))


def main() -> None:
    """Print each error of one part of the checks, relative to the largest number."""
    np.seterr(all="ignore")
    interpreter.InterpreterBuilder.create_dot = _dot
    part, names = sys.argv[1], variants(SMALL, PAGE)
    if part == "small":
        for product in ("qkv", "o", "gate_up", "down", "head"):
            print(product, kit.check_linear(interpreted, names, torch.float32, product, 19))
        for group in GROUPS:
            print("lora", group, kit.check_lora(interpreted, names, SMALL, torch.float32, group))
        check_kernels({"small": SMALL})
        kit.check_tokens(interpreted, names, SMALL)
        kit.check_lists(interpreted, names)
    elif part == "family":
        check_kernels(FAMILY)
    else:
        check = {"engine": check_engine, "preemption": check_preemption}[part]
        with tempfile.TemporaryDirectory() as directory:
            print(part, check(two_layers(Path(directory))))


if __name__ == "__main__":
    main()
