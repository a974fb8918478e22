"""Finds the native library for this processor, and loads it.

A wheel contains a library for every instruction set of its kind of machine. A checkout has none: the library is
compiled once, into HOME. A file in HOME that other users may have written is refused. A library that can't be
loaded, because it is truncated or needs another C library, is compiled again. Each instruction set has a library
of its own, so machines with different processors can share a HOME. If no library is possible (no compiler, another
kind of processor), `NativeUnavailable` says why, and torch computes instead.
"""

import ctypes
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from server.config.environment import wanted_instructions
from server.model.native.abi import declare
from server.model.native.build import (
    COMPILERS,
    DIGEST_SIZE,
    INSTRUCTIONS,
    NO_COMPILER,
    SOURCE,
    NativeUnavailable,
    check_owners,
    compile_library,
    library_name,
    machine_instructions,
    source_digest,
)

PREBUILT = SOURCE / "prebuilt"
"""The libraries that setup.py puts into a wheel."""


def load_library(directory: Path, say: Callable[[str], None] = lambda line: None) -> ctypes.CDLL:
    """Load the prebuilt library or the one in `directory`, or compile one into `directory`.

    Raise NativeUnavailable if all of this fails.
    """
    name = library_name(instructions())
    for place in (PREBUILT, directory):
        if not os.path.lexists(place / name):
            continue
        try:
            if place != PREBUILT:  # a user who may write to PREBUILT may change our Python code, too
                check_owners(place, place / name)
            return _load(place / name)
        except NativeUnavailable as reason:
            say(f"native code is not taken from {place}: {reason}")
    say("compiling the native code, once")
    return compile_library(directory, instructions(), _load)


def why_unavailable(directory: Path) -> str | None:
    """Return why `load_library` can't succeed, or None if there is a library or a compiler."""
    try:
        name = library_name(instructions())
    except NativeUnavailable as reason:
        return str(reason)
    is_there = any((place / name).exists() for place in (PREBUILT, directory)) or any(map(shutil.which, COMPILERS))
    return None if is_there else NO_COMPILER


def instructions() -> str:
    """Return the best of INSTRUCTIONS that this processor has, or the one that NATIVE_INSTRUCTIONS names.

    Raise NativeUnavailable if the processor has none of INSTRUCTIONS, or lacks the named one.
    """
    candidates, wanted = machine_instructions(), wanted_instructions()
    features = frozenset(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    for name in candidates if wanted is None else [wanted]:
        if name not in candidates:
            raise NativeUnavailable(f"NATIVE_INSTRUCTIONS must be one of {', '.join(candidates)}, not {name!r}")
        if features.issuperset(INSTRUCTIONS[name]):
            return name
    raise NativeUnavailable(f"this processor has no {wanted or candidates[-1].upper()}")


def computed_by(library: ctypes.CDLL) -> str:
    """Describe everything that the bits of the library's results depend on: the source, the compiler with its
    version and flags, and whether the processor has AMX."""
    return f"{source_digest(instructions())} ({library.smolora_compiler().decode()})"


def _load(path: Path) -> ctypes.CDLL:
    try:
        if not _is_whole(path):
            raise NativeUnavailable("it can't be loaded: a part of the file is missing or damaged")
        library = ctypes.CDLL(str(path))
        declare(library)
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"it can't be loaded: {error}") from None
    if library.smolora_source().decode() != source_digest(instructions()):
        raise NativeUnavailable("it was compiled from another source")
    if not library.smolora_is_supported():
        raise NativeUnavailable("this processor or system lacks an instruction")
    return library


def _is_whole(path: Path) -> bool:
    """Return whether the file ends in its own digest. A truncated library may load, and crash the process
    later."""
    content = path.read_bytes()
    return hashlib.sha256(content[:-DIGEST_SIZE]).digest() == content[-DIGEST_SIZE:]
