"""Read, check and write adapter_model.safetensors, and guess what is wrong with an invalid file.

The format is read strictly: 8 bytes with the header's length, the header in JSON, and the tensors' bytes without
gaps. Reading copies nothing, as tensors are views of the given buffer. The file isn't trusted: anything that
doesn't fit the format raises TensorFileError before a tensor is created.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import torch

from adapters.errors import FieldError
from adapters.lora import MODULES, BaseShape, ModuleKey
from adapters.strict_json import BadJsonError, parse_object, printable

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that adapters may have. `TensorEntry.view` raises KeyError for others."""

SAVE_AGAIN = "load the adapter with PEFT and save it again, with save_pretrained(folder, safe_serialization=True)"
"""What to do with an adapter_model.bin, which isn't read because that may execute code."""

_INSTEAD = {
    b"PK\3\4": f"is a zip, or an adapter_model.bin, and not a safetensors file: {SAVE_AGAIN}",
    b"\x80\2": f"is an adapter_model.bin, and not a safetensors file: {SAVE_AGAIN}",
    b"version https://git-lfs": "is a Git LFS pointer instead of the file: run git lfs pull",
}
"""The first bytes of wrong files that people upload, each with an error message."""

MAX_HEADER_BYTES = 8 << 20
_ALIGNMENT = 64  # of the first tensor within the file


class TensorFileError(ValueError):
    """Bytes that aren't a safetensors file. The message is safe to show."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file; `start` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return the tensor as a view of `buffer` (the whole file, uint8), or as a copy if it isn't aligned."""
        dtype = DTYPES[self.dtype]
        part = buffer[self.start : self.end]
        if self.start % dtype.itemsize:
            part = part.clone()
        return part.view(dtype).view(self.shape)


def map_file(path: Path) -> torch.Tensor:
    """Map the file as uint8: pages are read on first access, and writes stay in this process.

    The file may be unlinked later, but must not shrink. Raise OSError if the file can't be read, or
    TensorFileError if it is empty.
    """
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        raise TensorFileError("is empty")
    return torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8)


def copy_bytes(data: bytes) -> torch.Tensor:
    """Return `data` as uint8. Raise TensorFileError if it is empty."""
    if not data:
        raise TensorFileError("is empty")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def read_header(buffer: torch.Tensor) -> dict[str, TensorEntry]:
    """Return the tensors of a file by name. `buffer` is the whole file as uint8.

    Raise TensorFileError if the file doesn't follow the format.
    """
    size = buffer.numel()
    if size < 8:
        raise TensorFileError("is too short for a safetensors file")
    length = int.from_bytes(_bytes(buffer[:8]), "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        start = _bytes(buffer[: max(map(len, _INSTEAD))])
        messages = (message for beginning, message in _INSTEAD.items() if start.startswith(beginning))
        raise TensorFileError(next(messages, "is not a safetensors file, or is cut short"))
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
    """Write `tensors` in the given order, but larger dtypes first, so that each tensor is aligned."""
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


Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")

_PREFIX = "base_model.model."
_NAME = re.compile(re.escape(_PREFIX) + r"(model\.layers\.(\d{1,6})\.\w+\.(\w+))\.lora_([AB])\.weight", re.ASCII)

_COMPILED = "take '_orig_mod.' out of all names: the model was compiled before it got the adapter"
_SAVE = "save the adapter with PEFT's model.save_pretrained(folder), not from its state_dict()"
_UNTRAINED = (
    "if they weren't trained (PEFT saves them, too, when tokens were added), save the adapter again, with "
    "save_pretrained(folder, save_embedding_layers=False)"
)


def tensor_name(key: ModuleKey, side: Side) -> str:
    """Return PEFT's name of a module's A or B."""
    return f"{_PREFIX}{key.path}.lora_{side}.weight"


@dataclass
class FoundTensors:
    """A file's tensors for modules of the base model: `names` has the names of all, `tensors` the valid ones."""

    names: dict[tuple[ModuleKey, Side], str] = field(default_factory=dict)
    tensors: dict[tuple[ModuleKey, Side], torch.Tensor] = field(default_factory=dict)  # A (r, in), B (out, r)


def collect(
    entries: Mapping[str, TensorEntry], buffer: torch.Tensor, base: BaseShape, errors: list[FieldError]
) -> FoundTensors:
    """Return the tensors by module. Append an error to `errors` for each invalid tensor."""
    found = FoundTensors()
    for name, entry in entries.items():
        place = _place(name, base)
        if isinstance(place, str):
            errors.append(tensor_error(name, place))
            continue
        found.names[place] = name
        fault = _wrong_form(place, entry, base)
        if fault is None:
            tensor = entry.view(buffer)
            if bool(torch.isfinite(tensor).all()):
                found.tensors[place] = tensor
                continue
            fault = "holds NaN or infinite values"
        errors.append(tensor_error(name, fault))
    return found


def tensor_error(name: str, message: str) -> FieldError:
    return FieldError(("adapter_model", printable(name)), message)


def _place(name: str, base: BaseShape) -> tuple[ModuleKey, Side] | str:
    """Return which module's A or B the tensor `name` is, or an error message if the tensor is neither."""
    match = _NAME.fullmatch(name)
    if match is not None and match[3] in MODULES:
        key = ModuleKey(int(match[2]), match[3])
        if key.path == match[1]:
            if key.layer >= base.num_layers:
                return f"is for layer {key.layer}, but the base has {base.num_layers} layers, counted from 0"
            return key, "A" if match[4] == "A" else "B"
    if "lora_magnitude_vector" in name:
        return "belongs to DoRA, which plain LoRA can't honour"
    if "lm_head" in name or "embed" in name:
        advice = f"; {_UNTRAINED}" if name.endswith((".lm_head.weight", ".embed_tokens.weight")) else ""
        return f"belongs to the embeddings, which can't be adapted{advice}"
    if name.endswith("bias"):
        return "is a bias, which plain LoRA doesn't have"
    if (meant := _meant(name)) is not None:
        why = _COMPILED if "_orig_mod." in name else _SAVE
        return f"is no A or B of a file by its name: it must be {meant}; {why}"
    return f"is no A or B of a layer's linear module, such as {tensor_name(ModuleKey(0, 'q_proj'), 'A')}"


def _meant(name: str) -> str | None:
    """Return the name that PEFT's files use for an A or B whose name in a model's state_dict is `name`.

    The model may also be compiled. Return None if `name` isn't such a name.
    """
    place = place_of(name)
    if place is None or place[1] not in MODULES:
        return None
    key = ModuleKey(place[0], place[1])
    return tensor_name(key, "A" if place[2] else "B") if f".{key.path}." in f".{name}" else None


def _wrong_form(place: tuple[ModuleKey, Side], entry: TensorEntry, base: BaseShape) -> str | None:
    key, side = place
    if entry.dtype not in DTYPES:
        return f"has the dtype {printable(entry.dtype, 20)}; it must be one of {', '.join(DTYPES)}"
    num_out, num_in = base.features[key.module]
    wanted = f"(rank, {num_in})" if side == "A" else f"({num_out}, rank)"
    fits = len(entry.shape) == 2 and entry.shape[1 if side == "A" else 0] == (num_in if side == "A" else num_out)
    if not fits or 0 in entry.shape:
        return f"has the shape {entry.shape}, this base needs {wanted}"
    return None


_LORA = re.compile(r"([AB])(?:\.\w+)?\.weight", re.ASCII)  # after ".lora_"
_LAYER = re.compile(r"\d{1,6}", re.ASCII)
_MODULE = re.compile(r"\w{1,64}", re.ASCII)
_SHOWN = 3


def guess(
    entries: Mapping[str, TensorEntry], base: BaseShape, ranks: Mapping[ModuleKey, int] | None
) -> str | None:
    """Describe how the tensors differ from the configuration and from the base model.

    `ranks` are the configuration's, or None if it is invalid. If hundreds of tensors are wrong, they have one
    cause: another rank, other modules, or another base model. The cause is guessed from the tensors' names and
    shapes, which may be those of any model's adapter.
    """
    found: dict[str, set[int]] = {}
    layers: set[int] = set()
    widths: set[int] = set()
    for name, entry in entries.items():
        place = place_of(name)
        if place is None or len(entry.shape) != 2:
            continue
        layer, module, is_a = place
        layers.add(layer)
        found.setdefault(module, set()).add(entry.shape[0 if is_a else 1])
        if is_a and module in base.features:
            widths.add(entry.shape[1] - base.features[module][1])
    if not found:
        if not entries:
            return "has no tensors: was the adapter saved before it was trained?"
        example = printable(next(iter(entries)), 80)
        return f"its tensors don't look like LoRA's: none has lora_A or lora_B in its name, such as {example}"
    looks = f"the tensors look like {_modules(found)}"
    if widths and 0 not in widths:
        width = base.features["q_proj"][1]
        return f"{looks}, for another base: this one's modules read {width} numbers, these {_wide(widths, width)}"
    if max(layers) >= base.num_layers:
        return (
            f"{looks}, for another base: they go up to layer {max(layers)}, this one's up to {base.num_layers - 1}"
        )
    if ranks is None:
        return looks
    said: dict[str, set[int]] = {}
    for key, rank in ranks.items():
        said.setdefault(key.module, set()).add(rank)
    advice = "use the adapter_config.json that was saved with them, or set r and target_modules to match"
    if said != found:
        return f"{looks}; adapter_config.json says {_modules(said)}: {advice}"
    wanted = {key.layer for key in ranks}
    if wanted != layers:
        return f"{looks}, {_layers(layers)}; adapter_config.json says {_layers(wanted)}: set layers_to_transform"
    return looks


def place_of(name: str) -> tuple[int, str, bool] | None:
    """Return (layer, module, whether it is A) of a LoRA tensor's name, or None for any other name.

    The time is linear in the length of the name, which may be megabytes in an untrusted file.
    """
    path, _, end = name.rpartition(".lora_")
    *above, module = path.split(".")
    layer = next(filter(_LAYER.fullmatch, above[1:]), None)
    lora = _LORA.fullmatch(end)
    if lora is None or layer is None or not _MODULE.fullmatch(module):
        return None
    return int(layer), module, lora[1] == "A"


def _wide(differences: Iterable[int], width: int) -> str:
    return _list([str(width + difference) for difference in sorted(differences)])


def _modules(ranks: Mapping[str, set[int]]) -> str:
    """Return text such as "rank 8 on q_proj and v_proj, ranks 4 and 16 on o_proj"."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for module in sorted(ranks, key=lambda name: (MODULES.index(name) if name in MODULES else len(MODULES), name)):
        alike.setdefault(tuple(sorted(ranks[module])), []).append(module)
    described = [
        f"{'rank' if len(numbers) == 1 else 'ranks'} {_list(list(map(str, numbers)))} on {_list(modules, 7)}"
        for numbers, modules in alike.items()
    ]
    return _list(described)


def _layers(numbers: set[int]) -> str:
    first, last = min(numbers), max(numbers)
    if len(numbers) == 1:
        return f"layer {first}"
    return f"layers {first} to {last}" + ("" if len(numbers) == last - first + 1 else ", not all of them")


def _list(words: Sequence[str], limit: int = _SHOWN) -> str:
    """Return text such as "a, b and c", or "a, b and 7 more"."""
    if len(words) > limit:
        words = [*words[: limit - 1], f"{len(words) - limit + 1} more"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
