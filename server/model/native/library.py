"""Compiles the native code once for each version of its source, and loads it.

`load_library` takes the library from the first directory that has a usable one, and else compiles it into the last
directory. A library that other users may have written is refused. One that can't be loaded (half a file, another
system's C library) is compiled again. A new library is compiled in a scratch directory and renamed after it was
loaded. Its name contains the digest of its source and flags. The flags select the best of INSTRUCTIONS that this
processor has, so machines with different processors can share a HOME. If no library is possible (no compiler,
another kind of processor), `NativeUnavailable` says why, and torch computes instead.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from server.config.environment import wanted_instructions, with_scratch
from server.model.native.abi import declare

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
"""What the code can be compiled for, best first, and the processor features that it needs, by Linux's names."""
_X86 = ("avx512_bf16", "avx512", "avx2")
MACHINES: Mapping[str, tuple[str, ...]] = {"x86_64": _X86, "AMD64": _X86, "aarch64": ("neon",), "arm64": ("neon",)}
"""The INSTRUCTIONS that a kind of machine may have, by `platform.machine`'s name."""
_EXPORTS = "seam/exports.map"
_LINK = ("-shared", "-pthread", "-static-libstdc++", "-static-libgcc")
COMPILERS = ("g++", "clang++", "c++")
_NO_COMPILER = f"no C++ compiler ({', '.join(COMPILERS)})"
_COMPILE_TIMEOUT = 300.0  # seconds
_DIGEST_SIZE = 32  # bytes; the digest is appended to a compiled library
_WRITABLE = 0o022  # by a group or by everyone


class NativeUnavailable(Exception):
    """The native code can't be used here, for the reason given; torch can."""


def load_library(directories: Sequence[Path], say: Callable[[str], None] = lambda line: None) -> ctypes.CDLL:
    """Load the library, and compile it first if no directory has a usable one. Raise NativeUnavailable."""
    name = library_name(instructions())
    for path in (directory / name for directory in directories):
        if not os.path.lexists(path):
            continue
        try:
            _check_owners(path.parent, path)
            return _load(path)
        except NativeUnavailable as reason:
            say(f"native code is not taken from {path.parent}: {reason}")
    say("compiling the native code, once")
    return _compile(directories[-1], instructions(), _load)


def why_not(directories: Sequence[Path]) -> str | None:
    """Return why the library is unavailable, or None if a directory has it or a compiler can make it."""
    try:
        name = library_name(instructions())
    except NativeUnavailable as reason:
        return str(reason)
    is_there = any((directory / name).exists() for directory in directories) or any(map(shutil.which, COMPILERS))
    return None if is_there else _NO_COMPILER


def compile_libraries(directory: Path) -> None:
    """Compile the library into the directory, for every processor of this kind of machine. Raise NativeUnavailable
    if that fails."""
    for name in _of_this_machine():
        _compile(directory, name, lambda path: None)


def instructions() -> str:
    """Return the best of INSTRUCTIONS that this processor has, or the ones that NATIVE_INSTRUCTIONS names. Raise
    NativeUnavailable if it doesn't have them."""
    candidates, wanted = _of_this_machine(), wanted_instructions()
    features = frozenset(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    for name in candidates if wanted is None else [wanted]:
        if name not in candidates:
            raise NativeUnavailable(f"NATIVE_INSTRUCTIONS must be one of {', '.join(candidates)}, not {name!r}")
        if features.issuperset(INSTRUCTIONS[name]):
            return name
    raise NativeUnavailable(f"this processor has no {wanted or candidates[-1].upper()}")


def _of_this_machine() -> Sequence[str]:
    if platform.machine() not in MACHINES or platform.system() != "Linux":
        raise NativeUnavailable("it is written for Linux on x86-64 and 64-bit Arm")
    return MACHINES[platform.machine()]


def flags_for(name: str) -> tuple[str, ...]:
    """Return the compiler flags for one of INSTRUCTIONS."""
    if name == "neon":
        return (*FLAGS, *_ARM_FLAGS)
    return (*FLAGS, *_X86_FLAGS, *("-m" + feature.replace("_bf16", "bf16") for feature in INSTRUCTIONS[name]))


def source_digest(name: str) -> str:
    """Return a digest of the library's source and of its compiler flags for one of INSTRUCTIONS."""
    sha = hashlib.sha256(" ".join((*flags_for(name), *_LINK)).encode())
    for source in (*UNITS, *HEADERS, _EXPORTS):
        sha.update((SOURCE / source).read_bytes())
    return sha.hexdigest()[:16]


def library_name(name: str) -> str:
    """Return the file name of this source's library for one of INSTRUCTIONS."""
    return f"smolora-{source_digest(name)}.so"


def computed_by(library: ctypes.CDLL) -> str:
    """Describe what the bits of its results depend on: the source, the compiler with its version and flags, and
    whether the processor has AMX."""
    return f"{source_digest(instructions())} ({library.smolora_compiler().decode()})"


def unit_flags(name: str, *more: str) -> list[str]:
    """Return the flags to compile a unit with for one of INSTRUCTIONS, and `more`. They tell the library its flags
    and its source."""
    flags = (*flags_for(name), *more)
    return [*flags, f'-DSMOLORA_FLAGS="{" ".join(flags)}"', f'-DSMOLORA_SOURCE="{source_digest(name)}"']


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
    """Return whether the file ends in its own digest: half a library may load, and end the process later."""
    content = path.read_bytes()
    return hashlib.sha256(content[:-_DIGEST_SIZE]).digest() == content[-_DIGEST_SIZE:]


def _check_owners(*paths: Path) -> None:
    """Raise NativeUnavailable if a user other than this one and root may write to a path. Links are followed."""
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


def _compile(directory: Path, name: str, use: Callable[[Path], T]) -> T:
    """Compile into the directory for one of INSTRUCTIONS, and return what `use` returns for the new file. The file
    gets its name after that."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NativeUnavailable(_NO_COMPILER)
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


def _link(compiler: str, arguments: Sequence[str], scratch: str) -> None:
    """Link with the C++ library inside if the system has a static one: Fedora's compiler comes without."""
    try:
        _run([[compiler, *_LINK, *arguments]], scratch)
    except subprocess.CalledProcessError:
        without = [flag for flag in _LINK if not flag.startswith("-static")]
        _run([[compiler, *without, *arguments]], scratch)


def _run(commands: Sequence[Sequence[str]], scratch: str) -> None:
    """Run the commands concurrently, and kill the rest if one fails. Raise CalledProcessError with the compiler's
    output, or TimeoutExpired. Their temporary files are in `scratch`, since /tmp may be small.
    """
    with ExitStack() as stack:
        running = []
        for command in commands:
            process = subprocess.Popen(  # noqa: S603 (our source)
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=with_scratch(scratch),
                start_new_session=True,  # a compiler is several processes
            )
            running.append(stack.enter_context(process))
            stack.callback(_kill, process)
        for process in running:
            _, errors = process.communicate(timeout=_COMPILE_TIMEOUT)
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args, stderr=errors)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its children, unless it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def _keep_others_out(directory: Path) -> None:
    """Revoke others' write permission on a directory of this user. Raise NativeUnavailable for another user's."""
    status = directory.stat()
    if status.st_uid == os.geteuid() and status.st_mode & _WRITABLE:
        directory.chmod(status.st_mode & 0o7777 & ~_WRITABLE)
    _check_owners(directory)


if __name__ == "__main__":  # as the image is built: python -m server.model.native.library DIRECTORY
    try:
        compile_libraries(Path(sys.argv[1]))
    except NativeUnavailable as failure:
        sys.exit(str(failure))
