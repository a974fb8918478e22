"""fp32 in Triton's interpreter: `TRITON_INTERPRET=1 python -m tests.server.model.cuda.interpreted`.

It is a process of its own, since Triton decides at its import whether it interprets. The interpreter's bf16 is
wrong in every version so far, so it proves nothing there. Its fp32 products are numpy's, which round by the place
of a row. Here each dot is summed in fp64 and rounded once, so that equal bits mean that the kernel's own order is
the same.
"""
# ruff: noqa: T201

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from server.engine.cuda_backend import CudaBackend, Launch
from server.engine.request import GenerationRequest
from server.model.base.weights import BaseModel
from server.model.cuda.variants import variants
from server.model.rank_rows import GROUPS
from tests.kits import kernels as kit
from tests.kits.engines import GREEDY, build_engine, refs, run
from tests.kits.kernels import FAMILY, PAGE, SMALL, interpreted
from tests.server.engine.traffic import TIGHT, assert_same, library
from tests.server.model.cuda.bases import two_layers


def _dot(self: object, a: Any, b: Any, d: Any, *_: object) -> Any:
    total = a.data.astype(np.float64) @ b.data.astype(np.float64) + d.data
    return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)


def check_engine(base: BaseModel, launch: Launch) -> float:
    """Answer requests with the cuda backend and torch's.

    Return the largest relative difference of log-probabilities. Prompts are computed while others decode, one of
    them with a blend, and one prefix is cached.
    """
    shared = tuple(range(20, 57))
    requests = [
        GenerationRequest("base", shared, replace(GREEDY, max_tokens=3)),
        GenerationRequest("prefix", (*shared, 9), replace(GREEDY, max_tokens=3)),
        GenerationRequest("one", (7, 8, 9), replace(GREEDY, max_tokens=4), refs(**{"00": 1.0})),
        GenerationRequest(
            "blend", (5, 4, 3, 2) * 3, replace(GREEDY, max_tokens=3), refs(**{"02": 0.6, "03": -0.5})
        ),
    ]
    cuda = CudaBackend(base.config, base.weights, max_positions=512, launch=launch)
    answers = []
    for backend in (cuda, None):
        engine = build_engine(base, library(base), num_blocks=32, max_rank=64, limits=TIGHT, other=backend)
        answers.append(run(engine, requests))
        assert engine.stats.prefix_cached_tokens >= 32
        engine.close()
    for key, expected in answers[1].items():
        assert_same(answers[0][key], expected)
    pairs = [
        (found, expected)
        for key in answers[1]
        for found, expected in zip(answers[0][key].logprobs, answers[1][key].logprobs, strict=True)
    ]
    return max(abs(found - expected) / abs(expected) for found, expected in pairs)


def main() -> None:
    """Print each check's largest error, relative to the largest number."""
    np.seterr(all="ignore")
    interpreter.InterpreterBuilder.create_dot = _dot
    names = variants(SMALL, PAGE)
    for product in ("qkv", "o", "gate_up", "down", "head"):
        print(product, kit.check_linear(interpreted, names, torch.float32, product, 19))
    for group in GROUPS:
        print("lora", group, kit.check_lora(interpreted, names, SMALL, torch.float32, group))
    sizes = {"small": SMALL, **(FAMILY if "--all" in sys.argv else {})}
    for name, config in sizes.items():
        of_config = variants(config, PAGE)
        print("attention", name, kit.check_attention(interpreted, of_config, config, torch.float32))
        print("rows", name, kit.check_rows(interpreted, of_config, config, torch.float32))
    kit.check_tokens(interpreted, names, SMALL)
    kit.check_lists(interpreted, names)
    with tempfile.TemporaryDirectory() as directory:
        print("engine", check_engine(two_layers(Path(directory)), interpreted))


if __name__ == "__main__":
    main()
