"""torch's results in bf16, in reasonable time on processors without bf16 instructions."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from server.model.ops.linear import can_pack

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


class _InFp32(TorchDispatchMode):
    """Computes products of bf16 matrices in fp32 and rounds once, like torch, except for the order of the sums."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _PRODUCTS and args[0].dtype is torch.bfloat16:
            return func(*(matrix.float() for matrix in args), **(kwargs or {})).bfloat16()
        return func(*args, **(kwargs or {}))


def multiplies_bf16() -> bool:
    """Return whether this processor has instructions for torch's bf16 products."""
    return can_pack(torch.zeros(1, 1, dtype=torch.bfloat16))


def has_amx() -> bool:
    """Return whether this processor has AMX, with which torch and native code add in another order."""
    return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


@contextmanager
def torch_bf16() -> Iterator[None]:
    """Compute torch's bf16 products in fp32 during a block, if the processor has no instructions for them.

    Without the instructions, torch multiplies one number at a time: on an EPYC with AVX2 this takes 4 to 33 times
    as long as in fp32.
    """
    if multiplies_bf16():
        yield
        return
    mode: TorchDispatchMode = _InFp32()  # type: ignore[no-untyped-call]  # torch's own `__init__`
    with mode:
        yield
