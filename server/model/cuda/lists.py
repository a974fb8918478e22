"""The copy of a step's lists from where one upload put them to the places that a CUDA graph reads."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201, N803
import torch
import triton
import triton.language as tl

HEADER = 3
"""A list's int32 at the beginning of the upload: where the list begins in it, its words, and its fixed place."""


@triton.jit
def place_lists(packed, lists, BLOCK: tl.constexpr):
    """lists[place : place + words] = packed[begin : begin + words] for each list. Grid: (any number, lists).

    packed begins with HEADER int32 for each list. So a list's length may change from step to step, but no address.
    """
    own = tl.program_id(1)
    begin = tl.load(packed + own * 3)
    num_words = tl.load(packed + own * 3 + 1)
    place = tl.load(packed + own * 3 + 2)
    for start in range(tl.program_id(0) * BLOCK, num_words, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        words = tl.load(packed + begin + i, mask=i < num_words, other=0)
        tl.store(lists + place + i, words, mask=i < num_words)


def place_lists_in_torch(packed: torch.Tensor, lists: torch.Tensor, num_lists: int) -> None:
    for begin, num_words, place in packed[: HEADER * num_lists].view(num_lists, HEADER).tolist():
        lists[place : place + num_words] = packed[begin : begin + num_words]
