"""What torch's bf16 comes to, in a bearable time where the processor has no instructions for it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from server.model.ops.linear import can_pack

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


class _InFp32(TorchDispatchMode):
    """Products of bf16 matrices summed in fp32 and rounded once, as torch's are: but for the order of the sums."""

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
    """Whether this processor has instructions for torch's bf16 products."""
    return can_pack(torch.zeros(1, 1, dtype=torch.bfloat16))


@contextmanager
def torch_bf16() -> Iterator[None]:
    """For a reference that torch computes in bf16, whose products take 4 to 33 times as long as fp32's on an EPYC
    with AVX2: without the instructions it multiplies one number at a time. There they are fp32's, rounded.
    """
    if multiplies_bf16():
        yield
        return
    mode: TorchDispatchMode = _InFp32()  # type: ignore[no-untyped-call]  # torch's own `__init__`
    with mode:
        yield
