"""The interface between Python and C++: the structs, constants and functions that `seam/abi.h` declares.

This module parses the header, so nothing is declared twice. Every field takes eight bytes, so structs have no
padding. A compiled library contains the digest of its source, and `library.py` loads it only if the source still
has that digest.

A failed call raises MemoryError if memory or threads ran out, ValueError if its arguments would cause an access
out of bounds, and RuntimeError for other failures. The native object can be used again after any of these errors.
"""

import ctypes
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from server.model.base.weights import LAYER_TENSORS
from server.model.rank_rows import GROUPS

_HEADER = re.sub(r"//.*", "", (Path(__file__).parent / "seam" / "abi.h").read_text(encoding="utf-8"))
_ENTRY = r"^SMOLORA_ENTRY ([\w *]+?)\s*(\w+)\((.*?)\);"
_Type = type[ctypes.c_int64 | ctypes.c_double | ctypes.c_void_p]
_NUMBERS: dict[str, _Type] = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}
_RESULTS = {"int": ctypes.c_int, "const char*": ctypes.c_char_p, "void": None}


def find_declared(pattern: str) -> str:
    """Return what the first group of the regular expression `pattern` matches in the header.

    Raise LookupError if the header has no match.
    """
    found = re.search(pattern, _HEADER, re.MULTILINE | re.DOTALL)
    if found is None:
        raise LookupError(f"abi.h declares nothing like {pattern}")
    return str(found[1])


def parse_fields(declarations: str) -> list[tuple[str, _Type]]:
    """Return the names and types in C declarations that end in semicolons.

    Raise KeyError if a type isn't a pointer, int64_t or double.
    """
    fields: list[tuple[str, _Type]] = []
    for type_name, declarators in re.findall(r"(?:const )?(\w+)([^;]+)", declarations):
        for declarator in declarators.split(","):
            name = re.findall(r"\w+", declarator)[-1]
            fields.append((name, ctypes.c_void_p if "*" in declarator else _NUMBERS[type_name]))
    return fields


def enum_names(enum: str) -> tuple[str, ...]:
    """Return an enum's names in order, such as "gate_up" for Phase's kGateUpPhase.

    A last enumerator that counts the others, such as kPhases, is left out.
    """
    enumerators = [name.strip() for name in find_declared(rf"^enum {enum} {{(.*?)}}").split(",")]
    suffix = re.findall("[A-Z][a-z]+", enum)[-1]
    words = (name.removeprefix("k").removesuffix(suffix) for name in enumerators if name not in ("", f"k{enum}s"))
    return tuple(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() for name in words)


def _constant(name: str) -> int:
    return int(find_declared(rf"^constexpr int {name} = (\d+);"))


def _fields(name: str) -> list[tuple[str, _Type]]:
    return parse_fields(find_declared(rf"^struct {name} {{(.*?)}};"))


TILE = _constant("kTile")
ROW_UNIT = _constant("kRowUnit")
MAX_GROUP = _constant("kMaxGroup")
POSITIONS = _constant("kPositions")
DROPOUT_SHARES = _constant("kDropoutShares")
DROPOUT_STEP = _constant("kDropoutStep")
DROPOUT_MULTIPLIERS = (_constant("kDropoutFirst"), _constant("kDropoutSecond"))
_ERROR_SIZE = _constant("kErrorSize")

PHASES = enum_names("Phase")
TRAIN_PHASES = enum_names("TrainPhase")
WEIGHT_TYPES = tuple(name.upper() for name in enum_names("WeightType"))
_STATUSES = enum_names("Status")
_FAILURES = {"no_memory": MemoryError, "invalid": ValueError, "failed": RuntimeError}

assert enum_names("Group") == tuple(GROUPS)
assert enum_names("LayerTensor") == LAYER_TENSORS


class BaseTensor(ctypes.Structure):
    _fields_ = _fields("BaseTensor")


class BaseSizes(ctypes.Structure):
    _fields_ = _fields("BaseSizes")


class ServeRun(ctypes.Structure):
    _fields_ = _fields("ServeRun")


class LoraModule(ctypes.Structure):
    _fields_ = _fields("LoraModule")


class LoraPart(ctypes.Structure):
    _fields_ = _fields("LoraPart")


class LoraSegment(ctypes.Structure):
    _fields_ = _fields("LoraSegment")


class LoraPool(ctypes.Structure):
    _fields_ = _fields("LoraPool")


class ServeStep(ctypes.Structure):
    _fields_ = _fields("ServeStep")


class SampleRow(ctypes.Structure):
    _fields_ = _fields("SampleRow")


class SampleStep(ctypes.Structure):
    _fields_ = _fields("SampleStep")


class TrainModule(ctypes.Structure):
    _fields_ = _fields("TrainModule")


class TrainGroup(ctypes.Structure):
    _fields_ = _fields("TrainGroup")


class TrainBatch(ctypes.Structure):
    _fields_ = _fields("TrainBatch")


def columns(structure: type[ctypes.Structure]) -> int:
    """Return the number of fields of a structure. Each takes eight bytes."""
    return ctypes.sizeof(structure) // 8


def packing(structure: type[ctypes.Structure]) -> struct.Struct:
    """Return a packer for a structure's numbers, in order. The packer is three times as fast as creating the
    structure.
    """
    codes = {ctypes.c_int64: "q", ctypes.c_double: "d", ctypes.c_void_p: "P"}
    return struct.Struct("".join(codes[field[1]] for field in structure._fields_))


def declare(library: ctypes.CDLL) -> None:
    """Set the types of the library's functions. Raise AttributeError if the library lacks a function."""
    for result, name, parameters in re.findall(_ENTRY, _HEADER, re.MULTILINE | re.DOTALL):
        entry = getattr(library, name)
        entry.restype = _RESULTS[result]
        entry.argtypes = [type_ for _, type_ in parse_fields(parameters.replace(",", ";"))]


def call(function: Callable[..., int], *arguments: object) -> None:
    """Call a native function that returns a status. Raise the exception for its status if it failed.

    The call adds a buffer for the error's text as the last argument.
    """
    error = ctypes.create_string_buffer(_ERROR_SIZE)
    status = _STATUSES[function(*arguments, error)]
    if status != "ok":
        raise _FAILURES[status](error.value.decode(errors="replace"))


def take_phases(function: Callable[..., int], owner: int, names: Sequence[str], count: bool) -> dict[str, float]:
    """Return the seconds that the native object `owner` has spent in each phase since the last call.

    `names` are the phases. `function` gets the times, in nanoseconds. `count` turns measuring on or off.
    """
    spent = np.zeros(len(names), np.int64)
    call(function, owner, int(count), spent.ctypes.data)
    return dict(zip(names, (spent / 1e9).tolist(), strict=True))
