"""The safetensors format, strictly: 8 bytes of length, a JSON header, and the tensors' bytes without a gap.

Reading copies nothing: tensors are views of the given buffer. It never trusts the file: whatever doesn't fit the
format raises TensorFileError, before any tensor is made.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from adapters.strict_json import BadJsonError, parse_object, printable

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that adapters may have. Entries of others are listed, but `TensorEntry.view` refuses them."""

SAVE_ANEW = "load the adapter with PEFT and save it anew, with save_pretrained(folder, safe_serialization=True)"
"""What to do with an adapter_model.bin, which isn't read: to do so may run code."""

_INSTEAD = {
    b"PK\3\4": f"is a zip, or an adapter_model.bin, and not a safetensors file: {SAVE_ANEW}",
    b"\x80\2": f"is an adapter_model.bin, and not a safetensors file: {SAVE_ANEW}",
    b"version https://git-lfs": "is what git keeps in the file's place, of a clone without LFS: run git lfs pull",
}
"""How files begin that are sent for one, and what to say of them."""

MAX_HEADER_BYTES = 8 << 20
_ALIGNMENT = 64  # of the first tensor within the file


class TensorFileError(ValueError):
    """The bytes are no safetensors file. The message is safe to show."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: `start` and `end` are bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor, within `buffer`, the whole file as uint8; a copy where it isn't aligned."""
        dtype = DTYPES[self.dtype]
        part = buffer[self.start : self.end]
        if self.start % dtype.itemsize:
            part = part.clone()
        return part.view(dtype).view(self.shape)


def map_file(path: Path) -> torch.Tensor:
    """The file as uint8, mapped: pages are read when they are touched, and writes stay in this process.

    The file may be unlinked meanwhile, but must not shrink. Raises OSError, or TensorFileError if it is empty.
    """
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        raise TensorFileError("is empty")
    return torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8)


def copy_bytes(data: bytes) -> torch.Tensor:
    """`data` as uint8. Raises TensorFileError if it is empty."""
    if not data:
        raise TensorFileError("is empty")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def read_header(buffer: torch.Tensor) -> dict[str, TensorEntry]:
    """The tensors of a file by name. `buffer` is the whole file as uint8. Raises TensorFileError."""
    size = buffer.numel()
    if size < 8:
        raise TensorFileError("is too short for a safetensors file")
    length = int.from_bytes(_bytes(buffer[:8]), "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        start = _bytes(buffer[: max(map(len, _INSTEAD))])
        told = (message for beginning, message in _INSTEAD.items() if start.startswith(beginning))
        raise TensorFileError(next(told, "is not a safetensors file, or is cut short"))
    try:
        members = parse_object(_bytes(buffer[8 : 8 + length]))
    except BadJsonError as error:
        raise TensorFileError(f"has a header that {error}") from None
    _check_metadata(members.pop("__metadata__", None))
    entries = {name: _entry(name, value, 8 + length) for name, value in members.items()}
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            raise TensorFileError(f"has a gap or an overlap before the tensor '{printable(name)}'")
        at = entry.end
    if at != size:
        raise TensorFileError(f"has {size} bytes, but its header describes {at}")
    return entries


def write(file: IO[bytes], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes `tensors`, those of larger items first (so that each is aligned), else in the order given."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in ordered:
        end = at + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _entry(name: str, value: object, origin: int) -> TensorEntry:
    if isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2:
            entry = TensorEntry(dtype, tuple(shape), origin + offsets[0], origin + offsets[1])
            if offsets[0] <= offsets[1] and _fits(entry):
                return entry
    raise TensorFileError(f"describes the tensor '{printable(name)}' wrongly")


def _fits(entry: TensorEntry) -> bool:
    if entry.dtype not in DTYPES:
        return True
    return entry.end - entry.start == math.prod(entry.shape) * DTYPES[entry.dtype].itemsize


def _are_sizes(value: object) -> bool:
    if not isinstance(value, list) or len(value) > 8:
        return False
    return all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _check_metadata(value: object) -> None:
    if value is not None and not (isinstance(value, dict) and all(isinstance(v, str) for v in value.values())):
        raise TensorFileError("has metadata that isn't text")


def _bytes(part: torch.Tensor) -> bytes:
    return part.numpy().tobytes()
