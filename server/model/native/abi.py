"""What crosses the seam between Python and C++, as `abi.h` has it, and how its entries are called.

A library is taken only if sizes, offsets and constants are the same on both sides. A call that fails raises
MemoryError where there was no memory or no thread for it, ValueError for arguments that would have it read or
write outside of what it was given, RuntimeError for anything else; what was called can be used on after each.
"""

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from server.model.base.weights import LAYER_TENSORS
from server.model.row_layout import GROUPS

TILE = 32
"""Outputs that are computed together."""
ROW_UNIT = 16
"""A module's rows in a trained group's A and B begin at a multiple of it; those that fill it up are zero."""
MAX_GROUP = 8
"""Query heads that share a kv head, at most."""
POSITIONS = 16
"""A sequence's positions that lie together in the cache: a block's are a multiple of it."""

PHASES = ("embed", "norm", "qkv", "attention", "o", "gate_up", "down", "head", "sampling")
"""Of a step of serving."""
TRAIN_PHASES = (
    *("rows", "products", "attention", "loss"),
    *("rows backward", "products backward", "attention backward"),
)
"""Of a step of training. Rows: embeddings, norms, and x A (backward: the activation again, and dy B)."""

WEIGHT_TYPES = ("BF16", "Q4_1", "Q8_0")
"""What a matrix of a base may be stored as, by ggml's names."""

_ERROR_SIZE = 256  # bytes of an error's text
_FAILURES: tuple[tuple[str, type[Exception]], ...] = (
    ("kNoMemory", MemoryError),
    ("kInvalid", ValueError),
    ("kFailed", RuntimeError),
)  # of the statuses 1, 2, 3


class BaseTensor(ctypes.Structure):
    _fields_ = (("values", ctypes.c_void_p), ("type", ctypes.c_int64), ("blocks", ctypes.c_void_p))


class BaseSizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("vocab", "hidden", "intermediate", "layers", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_dim", "max_positions", "threads")),
        ("eps", ctypes.c_double),
    )


class ServeRun(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("start", "stop", "position", "first_block", "num_wanted"))


class LoraModule(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("rank", "row", "offset", "out_start", "out_features"))


class LoraPart(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("first_row", "num_rows", "first_module", "num_modules", "b_offset", "b_size")
    )


class LoraSegment(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("start", "stop", "first_part", "num_parts"))


class LoraPool(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b")),
        *((name, ctypes.c_int64) for name in ("layers", "rows", "b_size", "in")),
        ("parts", ctypes.c_void_p),
    )


class ServeStep(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_threads", "num_tokens", "num_runs")),
        *((name, ctypes.c_void_p) for name in ("token_ids", "runs", "blocks")),
        ("num_table_blocks", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("k", "v")),
        *((name, ctypes.c_int64) for name in ("num_blocks", "block_size")),
        *((name, ctypes.c_void_p) for name in ("pools", "modules", "segments", "weights")),
        *((name, ctypes.c_int64) for name in ("num_modules", "num_segments", "num_parts")),
        ("hidden", ctypes.c_void_p),
    )


class SampleRow(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("temperature", "top_p", "min_p")),
        *((name, ctypes.c_int64) for name in ("top_k", "key", "num_top")),
        ("forbidden", ctypes.c_void_p),
        ("repetition_penalty", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("first_seen", "num_seen", "first_added", "num_added")),
    )


class SampleStep(ctypes.Structure):
    _fields_ = (
        ("num_rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("hidden", "logits", "rows", "seen")),
        ("num_seen", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("added_ids", "added")),
        *((name, ctypes.c_int64) for name in ("num_added", "max_top")),
        *((name, ctypes.c_void_p) for name in ("token_ids", "logprobs", "top_ids")),
    )


class TrainModule(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("row", "rank", "out_start", "out_features")),
        *((name, ctypes.c_int64) for name in ("trained", "repeats", "a_start", "b_start")),
        ("scaling", ctypes.c_double),
    )


class TrainGroup(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b")),
        ("rows", ctypes.c_int64),
        ("modules", ctypes.c_void_p),
        ("num_modules", ctypes.c_int64),
        ("kept", ctypes.c_void_p),
    )


class TrainBatch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_texts")),
        *((name, ctypes.c_void_p) for name in ("token_ids", "starts", "lora", "gradients")),
        ("num_gradients", ctypes.c_int64),
        ("factor", ctypes.c_double),
        ("has_backward", ctypes.c_int64),
        ("d_weights", ctypes.c_void_p),
    )


class Number(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_int64))


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    *(BaseTensor, BaseSizes, ServeRun, LoraModule, LoraPart, LoraSegment, LoraPool),
    *(ServeStep, SampleRow, SampleStep, TrainModule, TrainGroup, TrainBatch),
)


def layout() -> dict[str, int]:
    """Offsets, sizes and constants as Python has them, by the names that `smolora_layout` gives them."""
    numbers = {
        "kTile": TILE,
        "kRowUnit": ROW_UNIT,
        "kMaxGroup": MAX_GROUP,
        "kPositions": POSITIONS,
        "kErrorSize": _ERROR_SIZE,
        "kOk": 0,
    }
    numbers |= {name: status for status, (name, _) in enumerate(_FAILURES, 1)}
    numbers |= {f"group {name}": index for index, name in enumerate(GROUPS)}
    numbers |= {f"weight type {name}": index for index, name in enumerate(WEIGHT_TYPES)}
    numbers |= {f"layer tensor {name}": index for index, name in enumerate(LAYER_TENSORS)}
    numbers |= {f"phase {name}": index for index, name in enumerate(PHASES)}
    numbers |= {f"train phase {name}": index for index, name in enumerate(TRAIN_PHASES)}
    for structure in STRUCTURES:
        numbers[structure.__name__] = ctypes.sizeof(structure)
        for name, *_ in structure._fields_:
            numbers[f"{structure.__name__}.{name}"] = getattr(structure, name).offset
    return numbers


def columns(structure: type[ctypes.Structure]) -> int:
    """Numbers of eight bytes that make one of it."""
    return ctypes.sizeof(structure) // 8


def packing(structure: type[ctypes.Structure]) -> struct.Struct:
    """Makes one of it from its numbers, in their order, in a third of the time that its class takes."""
    codes = {ctypes.c_int64: "q", ctypes.c_double: "d", ctypes.c_void_p: "P"}
    return struct.Struct("".join(codes[field[1]] for field in structure._fields_))


def declare(library: ctypes.CDLL) -> None:
    """Give the library's entries their types. Raises AttributeError where it lacks one."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.smolora_layout.restype = ctypes.POINTER(Number)
    library.smolora_layout.argtypes = []
    library.smolora_compiler.restype = ctypes.c_char_p
    library.smolora_compiler.argtypes = []
    for entry in (library.smolora_destroy, library.smolora_training_destroy):
        entry.restype = None
        entry.argtypes = [pointer]
    for entry in (library.smolora_create, library.smolora_training_create):
        entry.argtypes = [pointer] * 6
    for entry in (library.smolora_forward, library.smolora_sample):
        entry.argtypes = [pointer] * 3
    library.smolora_draw.argtypes = [pointer] * 4
    library.smolora_logits.argtypes = [pointer, pointer, number, pointer, pointer]
    for entry in (library.smolora_phases, library.smolora_training_phases):
        entry.argtypes = [pointer, number, pointer, pointer]
    library.smolora_training_forward.argtypes = [pointer] * 4
    library.smolora_training_loss.argtypes = [*[pointer] * 3, number, ctypes.c_double, *[pointer] * 4]
    library.smolora_training_measure.argtypes = [*[pointer] * 3, number, *[pointer] * 3]
    library.smolora_training_backward.argtypes = [pointer] * 3


def difference(library: ctypes.CDLL) -> str | None:
    """In what the layout of a library that was declared differs from this one; None where it is the same."""
    theirs, ours = dict(_numbers(library)), layout()
    for name in (*theirs, *ours):
        if theirs.get(name) != ours.get(name):
            return f"{name} is {theirs.get(name)}, not {ours.get(name)}"
    return None


def call(function: Callable[..., int], *arguments: object) -> None:
    """Call an entry that answers a status; the last argument, the error's text, is added here."""
    error = ctypes.create_string_buffer(_ERROR_SIZE)
    status = function(*arguments, error)
    if status:
        raise _FAILURES[status - 1][1](error.value.decode(errors="replace"))


def take_phases(function: Callable[..., int], owner: int, names: Sequence[str], count: bool) -> dict[str, float]:
    """Seconds of each phase, from an entry that answers nanoseconds."""
    spent = np.zeros(len(names), np.int64)
    call(function, owner, int(count), spent.ctypes.data)
    return dict(zip(names, (spent / 1e9).tolist(), strict=True))


def _numbers(library: ctypes.CDLL) -> Iterator[tuple[str, int]]:
    for number in library.smolora_layout():
        if number.name is None:
            return
        yield number.name.decode(), number.value
