"""Compiles the native code, for a wheel or at a server's first start.

A library's name contains the digest of its source and flags, so a library of an older source is never loaded. A
library is compiled in a scratch directory and renamed when it is complete. This module imports only the standard
library: setup.py uses it before any dependency is installed.
"""

import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

SOURCE = Path(__file__).parent
UNITS = ("seam/abi.cpp", "seam/checks.cpp", "serve.cpp", "train.cpp")
HEADERS = tuple(sorted(str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.h")))
FLAGS = (
    *("-std=c++20", "-O3"),
    "-ffp-contract=off",  # no compiler may fuse a multiplication and an addition
    *("-fPIC", "-pthread", "-fvisibility=hidden"),
    "-ftls-model=initial-exec",  # else a thread's first use allocates, and glibc ends the process if that fails
)
_X86_FLAGS = ("-mamx-tile", "-mamx-bf16")  # chosen at run time; needs AVX-512's bf16 products
_ARM_FLAGS = (
    "-march=armv8-a",
    "-fno-schedule-insns",  # scheduling keeps more sums alive than there are registers
)
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
INSTRUCTIONS: Mapping[str, tuple[str, ...]] = {
    "avx512_bf16": (*_AVX512, "avx512_bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "neon": ("fp", "asimd"),
}
"""The instruction sets, best first, and the processor features that each needs, by Linux's names."""
_X86 = ("avx512_bf16", "avx512", "avx2")
MACHINES: Mapping[str, tuple[str, ...]] = {"x86_64": _X86, "AMD64": _X86, "aarch64": ("neon",), "arm64": ("neon",)}
"""The INSTRUCTIONS that a kind of machine may have, by `platform.machine`'s name."""
_EXPORTS = "seam/exports.map"
_LINK = ("-shared", "-pthread", "-static-libstdc++", "-static-libgcc")
COMPILERS = ("g++", "clang++", "c++")
NO_COMPILER = f"no C++ compiler ({', '.join(COMPILERS)})"
_COMPILE_TIMEOUT = 300.0  # seconds
DIGEST_SIZE = 32  # bytes; the digest is appended to a compiled library
_WRITABLE = 0o022  # by a group or by everyone


class NativeUnavailable(Exception):
    """The native code can't be used, for the reason in the message. torch computes instead."""


def machine_instructions() -> Sequence[str]:
    """Return the names in INSTRUCTIONS for this kind of machine, best first.

    Raise NativeUnavailable if there are none.
    """
    if platform.machine() not in MACHINES or platform.system() != "Linux":
        raise NativeUnavailable("it is written for Linux on x86-64 and 64-bit Arm")
    return MACHINES[platform.machine()]


def flags_for(name: str) -> tuple[str, ...]:
    """Return the compiler flags for the instruction set `name`, one of INSTRUCTIONS."""
    if name == "neon":
        return (*FLAGS, *_ARM_FLAGS)
    return (*FLAGS, *_X86_FLAGS, *("-m" + feature.replace("_bf16", "bf16") for feature in INSTRUCTIONS[name]))


def unit_flags(name: str, *more: str) -> list[str]:
    """Return the flags to compile a translation unit for the instruction set `name`, followed by `more`.

    The flags include two macros, which tell the library its own flags and the digest of its source.
    """
    flags = (*flags_for(name), *more)
    return [*flags, f'-DSMOLORA_FLAGS="{" ".join(flags)}"', f'-DSMOLORA_SOURCE="{source_digest(name)}"']


def source_digest(name: str) -> str:
    """Return a digest of the library's source and of its compiler flags for the instruction set `name`."""
    sha = hashlib.sha256(" ".join((*flags_for(name), *_LINK)).encode())
    for source in (*UNITS, *HEADERS, _EXPORTS):
        sha.update((SOURCE / source).read_bytes())
    return sha.hexdigest()[:16]


def library_name(name: str) -> str:
    """Return the file name of this source's library for the instruction set `name`."""
    return f"smolora-{source_digest(name)}.so"


def compile_libraries(directory: Path) -> None:
    """Compile a library into the directory for each of this machine's INSTRUCTIONS, even those that this processor
    lacks. Raise NativeUnavailable if compiling fails."""
    for name in machine_instructions():
        compile_library(directory, name, lambda path: None)


def compile_library(directory: Path, name: str, use: Callable[[Path], T]) -> T:
    """Compile a library for the instruction set `name` into the directory. Call `use` with the new file, then give
    the file its name, and return the result of `use`. Raise NativeUnavailable if compiling fails.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NativeUnavailable(NO_COMPILER)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _keep_others_out(directory)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".native-", ignore_cleanup_errors=True) as scratch:
            made = Path(scratch) / library_name(name)
            objects = [str(Path(scratch) / f"{Path(unit).stem}.o") for unit in UNITS]
            compiles = [
                [compiler, *unit_flags(name), f"-I{SOURCE}", "-c", str(SOURCE / unit), "-o", compiled]
                for unit, compiled in zip(UNITS, objects, strict=True)
            ]
            _run(compiles, scratch)
            exports = ("-Xlinker", f"--version-script={SOURCE / _EXPORTS}")  # -Wl, would split it at a comma
            _link(compiler, [*objects, *exports, "-o", str(made)], scratch)
            made.chmod(0o755)  # regardless of the umask
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


def check_owners(*paths: Path) -> None:
    """Raise NativeUnavailable if anyone except this user and root may write to one of the paths.

    Symbolic links are followed.
    """
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


def _keep_others_out(directory: Path) -> None:
    """Revoke others' write permission on the directory. Raise NativeUnavailable if it belongs to another user."""
    status = directory.stat()
    if status.st_uid == os.geteuid() and status.st_mode & _WRITABLE:
        directory.chmod(status.st_mode & 0o7777 & ~_WRITABLE)
    check_owners(directory)


def _link(compiler: str, arguments: Sequence[str], scratch: str) -> None:
    """Link with a static C++ standard library if the system has one. Fedora's compiler comes without one."""
    try:
        _run([[compiler, *_LINK, *arguments]], scratch)
    except subprocess.CalledProcessError:
        without = [flag for flag in _LINK if not flag.startswith("-static")]
        _run([[compiler, *without, *arguments]], scratch)


def _run(commands: Sequence[Sequence[str]], scratch: str) -> None:
    """Run the commands concurrently, and kill the rest if one fails. Raise CalledProcessError with the compiler's
    output, or TimeoutExpired. Temporary files go to `scratch`, since /tmp may be small."""
    with ExitStack() as stack:
        running = []
        for command in commands:
            process = subprocess.Popen(  # noqa: S603 (our source)
                ["/usr/bin/env", f"TMPDIR={scratch}", *command],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a compiler is several processes
            )
            running.append(stack.enter_context(process))
            stack.callback(_kill, process)
        for process in running:
            _, errors = process.communicate(timeout=_COMPILE_TIMEOUT)
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args, stderr=errors)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its children, unless the process has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
