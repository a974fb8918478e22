"""fp32 in Triton's interpreter: `TRITON_INTERPRET=1 python -m tests.server.model.cuda.interpreted`.

It is a process of its own, since Triton decides at its import whether it interprets. The interpreter's bf16 is
wrong in every version so far, so it proves nothing there. Its fp32 products are numpy's, which round by the place
of a row. Here each dot is summed in fp64 and rounded once, so that equal bits mean that the kernel's own order is
the same.
"""
# ruff: noqa: T201

import sys
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from server.model.cuda.variants import variants
from server.model.rank_rows import GROUPS
from tests.kits import kernels as kit
from tests.kits.kernels import FAMILY, MAX_PAGES, PAGE, SMALL, interpreted


def _dot(self: object, a: Any, b: Any, d: Any, *_: object) -> Any:
    total = a.data.astype(np.float64) @ b.data.astype(np.float64) + d.data
    return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)


def main() -> None:
    """Print each check's largest error, relative to the largest number."""
    np.seterr(all="ignore")
    interpreter.InterpreterBuilder.create_dot = _dot
    names = variants(SMALL, PAGE, MAX_PAGES)
    for product in ("qkv", "o", "gate_up", "down", "head"):
        print(product, kit.check_linear(interpreted, names, torch.float32, product, 19))
    for group in GROUPS:
        print("lora", group, kit.check_lora(interpreted, names, SMALL, torch.float32, group))
    sizes = {"small": SMALL, **(FAMILY if "--all" in sys.argv else {})}
    for name, config in sizes.items():
        of_config = variants(config, PAGE, MAX_PAGES)
        print("attention", name, kit.check_attention(interpreted, of_config, config, torch.float32))
        print("rows", name, kit.check_rows(interpreted, of_config, config, torch.float32))
    kit.check_tokens(interpreted, names, SMALL)


if __name__ == "__main__":
    main()
