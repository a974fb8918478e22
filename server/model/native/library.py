"""Compiles the native code once for this version of its source, and loads it.

The library is looked for in the directories given, and made in the last one where none has it: written beside
and renamed, under a name that changes with its source. Where it can't be had (no compiler, another kind of
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
from pathlib import Path

UNITS = ("step.cpp", "train.cpp")
HEADERS = (
    *("attention.h", "layers.h", "lora.h", "loss.h", "matrix.h", "numbers.h"),
    *("panels.h", "team.h", "text_attention.h"),
)
FLAGS = (
    "-std=c++20",
    "-O3",
    *("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
    *("-shared", "-fPIC", "-pthread", "-static-libstdc++", "-static-libgcc"),
)
COMPILERS = ("g++", "clang++", "c++")
_COMPILED_WITHIN = 300.0  # seconds


class NativeUnavailable(Exception):
    """Why the native code can't be used here; torch can."""


def load_library(directories: Sequence[Path], say: Callable[[str], None] = lambda line: None) -> ctypes.CDLL:
    """The library, compiled first where no directory has it. Raises NativeUnavailable."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        raise NativeUnavailable("it is written for Linux on x86-64")
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        raise NativeUnavailable("this processor has no AVX-512 bf16 products")
    name = library_name()
    path = next((directory / name for directory in directories if (directory / name).is_file()), None)
    if path is None:
        say("compiling the native code, once")
        path = compile_library(directories[-1])
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path.name} can't be loaded: {error}") from None
    library.smolora_create.restype = ctypes.c_void_p
    library.smolora_create.argtypes = [ctypes.c_void_p] * 4
    library.smolora_destroy.argtypes = [ctypes.c_void_p]
    library.smolora_destroy.restype = None
    library.smolora_forward.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.smolora_forward.restype = None
    library.smolora_logits.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    library.smolora_logits.restype = None
    library.smolora_training_create.restype = ctypes.c_void_p
    library.smolora_training_create.argtypes = [ctypes.c_void_p] * 4
    library.smolora_training_destroy.argtypes = [ctypes.c_void_p]
    library.smolora_training_destroy.restype = None
    for run in (library.smolora_training_forward, library.smolora_training_backward):
        run.argtypes = [ctypes.c_void_p] * 3
        run.restype = ctypes.c_int
    library.smolora_training_loss.restype = ctypes.c_int
    library.smolora_training_loss.argtypes = [
        *[ctypes.c_void_p] * 3,
        ctypes.c_int64,
        ctypes.c_double,
        *[ctypes.c_void_p] * 2,
    ]
    if not library.smolora_is_supported():
        raise NativeUnavailable("this processor or system lacks a part of AVX-512")
    return library


def source_digest() -> str:
    """What decides what the library computes: its source and how it is compiled."""
    sha = hashlib.sha256(" ".join(FLAGS).encode())
    for source in (*UNITS, *HEADERS):
        sha.update((Path(__file__).parent / source).read_bytes())
    return sha.hexdigest()[:16]


def library_name() -> str:
    """The file name of the library of this source."""
    return f"smolora-{source_digest()}.so"


def compile_library(directory: Path) -> Path:
    """Compile it into the directory. Raises NativeUnavailable where that fails."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NativeUnavailable(f"no C++ compiler ({', '.join(COMPILERS)})")
    target = directory / library_name()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".native-") as scratch:
            made = Path(scratch) / target.name
            units = [str(Path(__file__).parent / unit) for unit in UNITS]
            subprocess.run(  # noqa: S603 (our own source, a compiler from the path)
                [compiler, *FLAGS, *units, "-o", str(made)],
                check=True,
                capture_output=True,
                timeout=_COMPILED_WITHIN,
            )
            with made.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(made, target)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        raise NativeUnavailable(f"the compiler failed: {lines[0] if lines else error.returncode}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"it can't be compiled: {error}") from None
    return target


if __name__ == "__main__":  # as the image is built: python -m server.model.native.library DIRECTORY
    try:
        compile_library(Path(sys.argv[1]))
    except NativeUnavailable as failure:
        sys.exit(str(failure))
