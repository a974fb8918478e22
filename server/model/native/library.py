"""Compiles the native code once for this version of its source, and loads it.

The library is looked for in the directories given, and made in the last one where none has one to use: one that
others may have written is refused, one that can't be loaded (half a file, another system's C library) is made
anew. It is compiled in a directory of its own and renamed once it could be loaded, under a name that changes with
its source and flags. The flags name the instructions, and none is taken from the machine that compiles: a HOME may
be shared by machines whose processors differ. Where there can be no library (no compiler, another kind of
processor) the torch path serves; `NativeUnavailable` says why.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from server.model.native.abi import declare, difference

T = TypeVar("T")

SOURCE = Path(__file__).parent
UNITS = ("seam/abi.cpp", "serving/step.cpp", "train.cpp")
HEADERS = tuple(sorted(str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.h")))
FLAGS = (
    *("-std=c++20", "-O3"),
    "-ffp-contract=off",  # a multiplication and an addition are rounded apart, whatever the compiler
    *("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
    *("-mamx-tile", "-mamx-bf16"),  # used where the processor has them
    *("-fPIC", "-pthread", "-fvisibility=hidden"),
    "-ftls-model=initial-exec",  # else a thread's first use may need memory, and glibc ends the process without
)
_EXPORTS = "seam/exports.map"
_LINK = ("-shared", "-pthread", "-static-libstdc++", "-static-libgcc")
COMPILERS = ("g++", "clang++", "c++")
_COMPILED_WITHIN = 300.0  # seconds
_DIGEST_SIZE = 32  # bytes, after a library that was compiled
_WRITABLE = 0o022  # by a group or by everyone


class NativeUnavailable(Exception):
    """Why the native code can't be used here; torch can."""


def load_library(directories: Sequence[Path], say: Callable[[str], None] = lambda line: None) -> ctypes.CDLL:
    """The library, compiled first where no directory has one to use. Raises NativeUnavailable."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        raise NativeUnavailable("it is written for Linux on x86-64")
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        raise NativeUnavailable("this processor has no AVX-512 bf16 products")
    for path in (directory / library_name() for directory in directories):
        if not os.path.lexists(path):
            continue
        try:
            _check_owners(path.parent, path)
            return _load(path)
        except NativeUnavailable as reason:
            say(f"native code is not taken from {path.parent}: {reason}")
    say("compiling the native code, once")
    return _compile(directories[-1], _load)


def compile_library(directory: Path) -> None:
    """Compile it into the directory, for another process to load. Raises NativeUnavailable where that fails."""
    _compile(directory, lambda path: None)


def source_digest() -> str:
    """What decides what the library computes: its source and how it is compiled."""
    sha = hashlib.sha256(" ".join((*FLAGS, *_LINK)).encode())
    for source in (*UNITS, *HEADERS, _EXPORTS):
        sha.update((SOURCE / source).read_bytes())
    return sha.hexdigest()[:16]


def library_name() -> str:
    """The file name of the library of this source."""
    return f"smolora-{source_digest()}.so"


def computed_by(library: ctypes.CDLL) -> str:
    """What its results' bits depend on: the source, the compiler with its version and flags, and whether the
    processor has AMX."""
    return f"{source_digest()} ({library.smolora_compiler().decode()})"


def flags_of_units(flags: Sequence[str] = FLAGS) -> list[str]:
    """Those with which each unit is compiled, so that it can say so."""
    return [*flags, f'-DSMOLORA_FLAGS="{" ".join(flags)}"']


def _load(path: Path) -> ctypes.CDLL:
    try:
        if not _is_whole(path):
            raise NativeUnavailable("it can't be loaded: a part of the file is missing or damaged")
        library = ctypes.CDLL(str(path))
        declare(library)
        other = difference(library)
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"it can't be loaded: {error}") from None
    if other is not None:
        raise NativeUnavailable(f"it was made for another layout: {other}")
    if not library.smolora_is_supported():
        raise NativeUnavailable("this processor or system lacks a part of AVX-512")
    return library


def _is_whole(path: Path) -> bool:
    """Whether it ends in the digest of what is before: half a library may load, and end the process later."""
    content = path.read_bytes()
    return hashlib.sha256(content[:-_DIGEST_SIZE]).digest() == content[-_DIGEST_SIZE:]


def _check_owners(*paths: Path) -> None:
    """Raises NativeUnavailable where others than this user and root may write to one of them, links followed."""
    try:
        for place in (path.resolve(strict=True) for path in paths):
            for real in (place, place.parent) if place.is_file() else (place,):
                status = real.stat()
                if status.st_uid not in (0, os.geteuid()):
                    raise NativeUnavailable(f"{real} belongs to another user")
                if status.st_mode & _WRITABLE:
                    raise NativeUnavailable(f"others may write to {real}")
    except (OSError, RuntimeError) as error:
        raise NativeUnavailable(f"it can't be read: {error}") from None


def _compile(directory: Path, use: Callable[[Path], T]) -> T:
    """Compile into the directory; what `use` makes of the new file, which gets its name after that."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NativeUnavailable(f"no C++ compiler ({', '.join(COMPILERS)})")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _keep_others_out(directory)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".native-") as scratch:
            made = Path(scratch) / library_name()
            objects = [str(Path(scratch) / f"{Path(unit).stem}.o") for unit in UNITS]
            compiles = [
                [compiler, *flags_of_units(), f"-I{SOURCE}", "-c", str(SOURCE / unit), "-o", to]
                for unit, to in zip(UNITS, objects, strict=True)
            ]
            with ThreadPoolExecutor(len(UNITS)) as threads:
                list(threads.map(_run, compiles))
            _run([compiler, *objects, *_LINK, f"-Wl,--version-script={SOURCE / _EXPORTS}", "-o", str(made)])
            made.chmod(0o755)  # whatever the umask is
            with made.open("r+b") as file:
                digest = hashlib.sha256(file.read()).digest()
                file.write(digest)
                file.flush()
                os.fsync(file.fileno())
            found = use(made)
            os.replace(made, directory / made.name)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        raise NativeUnavailable(f"the compiler failed: {lines[0] if lines else error.returncode}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"it can't be compiled: {error}") from None
    return found


def _run(command: Sequence[str]) -> None:
    """Raises CalledProcessError with what the compiler said, or TimeoutExpired."""
    subprocess.run(command, check=True, capture_output=True, timeout=_COMPILED_WITHIN)  # noqa: S603 (our source)


def _keep_others_out(directory: Path) -> None:
    """Take others' right to write away from a directory of this user's; raises NativeUnavailable for another's."""
    status = directory.stat()
    if status.st_uid == os.geteuid() and status.st_mode & _WRITABLE:
        directory.chmod(status.st_mode & 0o7777 & ~_WRITABLE)
    _check_owners(directory)


if __name__ == "__main__":  # as the image is built: python -m server.model.native.library DIRECTORY
    try:
        compile_library(Path(sys.argv[1]))
    except NativeUnavailable as failure:
        sys.exit(str(failure))
