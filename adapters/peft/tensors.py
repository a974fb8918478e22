"""The tensors of adapter_model.safetensors, each checked for itself: its name, dtype, shape and values."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from adapters.errors import FieldError
from adapters.lora import MODULES, BaseShape, ModuleKey
from adapters.peft.guess import place_of
from adapters.peft.tensor_file import DTYPES, TensorEntry
from adapters.strict_json import printable

Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")

_PREFIX = "base_model.model."
_NAME = re.compile(re.escape(_PREFIX) + r"(model\.layers\.(\d{1,6})\.\w+\.(\w+))\.lora_([AB])\.weight", re.ASCII)

_COMPILED = "take '_orig_mod.' out of all names: the model was compiled before it got the adapter"
_SAVE = "save the adapter with PEFT's model.save_pretrained(folder), not from its state_dict()"
_UNTRAINED = (
    "where they weren't trained (PEFT saves them, too, when tokens were added), save the adapter anew, with "
    "save_pretrained(folder, save_embedding_layers=False)"
)


def tensor_name(key: ModuleKey, side: Side) -> str:
    """PEFT's name of a module's A or B."""
    return f"{_PREFIX}{key.path}.lora_{side}.weight"


@dataclass
class FoundTensors:
    """What a file holds: the names of the tensors that belong to a module of the base, and the sound tensors."""

    names: dict[tuple[ModuleKey, Side], str] = field(default_factory=dict)
    tensors: dict[tuple[ModuleKey, Side], torch.Tensor] = field(default_factory=dict)  # A (r, in), B (out, r)


def collect(
    entries: Mapping[str, TensorEntry], buffer: torch.Tensor, base: BaseShape, errors: list[FieldError]
) -> FoundTensors:
    """Sorts the tensors by module; those at fault are appended to `errors`, by name."""
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
    """Which module's A or B the tensor is, or why it is none."""
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
    """PEFT's name of an A or B that is called otherwise here, as in a live or a compiled model; else None."""
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
