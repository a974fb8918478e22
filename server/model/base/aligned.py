"""A safetensors file whose tensors all start on 64-byte borders, written in one pass.

Any safetensors reader can map it; aligned tensors can then be used where they lie, by vector instructions too.
The format allows no gaps between tensors, so one that does not end on a border is followed by a named filler.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
FILLER = "_filler."
"""The start of the names of tensors that are not part of the model."""

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: `make` builds it when its turn comes, so that only one is in memory at a time."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_aligned(path: Path, tensors: Iterable[PlannedTensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors in the order given and wait until they are on the disk. Raises OSError."""
    tensors = _with_fillers(tensors)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.num_bytes]
        header[tensor.name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": span}
        offset = span[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)  # the header's length is the file's first 8 bytes
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in tensors:
            made = tensor.make()
            assert made.dtype == tensor.dtype, tensor.name
            assert tuple(made.shape) == tensor.shape, tensor.name
            file.write(made.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _with_fillers(tensors: Iterable[PlannedTensor]) -> list[PlannedTensor]:
    filled: list[PlannedTensor] = []
    for tensor in tensors:
        filled.append(tensor)
        if gap := -tensor.num_bytes % ALIGNMENT:
            shape = (gap,)
            filled.append(PlannedTensor(f"{FILLER}{len(filled)}", shape, torch.uint8, _zeros(gap)))
    return filled


def _zeros(size: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.zeros(size, dtype=torch.uint8)
