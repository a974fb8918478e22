"""Compiles the native code once for this version of its source, and loads it.

The library is looked for in the directories given, and made in the last one where none has one to use: one that
others may have written is refused, one that can't be loaded (half a file, another system's C library) is made
anew. It is compiled in a directory of its own and renamed once it could be loaded, under a name that changes with
its source and flags. The flags name the instructions, the best of INSTRUCTIONS that this processor has: a HOME may
be shared by machines whose processors differ. Where there can be no library (no compiler, another kind of
processor) the torch path serves; `NativeUnavailable` says why.
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

from server.config.environment import with_scratch
from server.config.instructions import wanted_instructions
from server.model.native.abi import declare, difference

T = TypeVar("T")

SOURCE = Path(__file__).parent
UNITS = ("seam/abi.cpp", "serving/step.cpp", "train.cpp")
HEADERS = tuple(sorted(str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.h")))
FLAGS = (
    *("-std=c++20", "-O3"),
    "-ffp-contract=off",  # a multiplication and an addition are rounded apart, whatever the compiler
    *("-fPIC", "-pthread", "-fvisibility=hidden"),
    "-ftls-model=initial-exec",  # else a thread's first use may need memory, and glibc ends the process without
)
_X86_FLAGS = ("-mamx-tile", "-mamx-bf16")  # used where the processor has them, beside AVX-512's bf16 products
_ARM_FLAGS = (
    "-march=armv8-a",
    "-fno-schedule-insns",  # which has more sums wait at once than there are registers
)
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
INSTRUCTIONS: Mapping[str, tuple[str, ...]] = {
    "avx512_bf16": (*_AVX512, "avx512_bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "neon": ("fp", "asimd"),
}
"""What the code can be compiled for, the best first, with what a processor must have for it as Linux names it."""
_X86 = ("avx512_bf16", "avx512", "avx2")
MACHINES: Mapping[str, tuple[str, ...]] = {"x86_64": _X86, "AMD64": _X86, "aarch64": ("neon",), "arm64": ("neon",)}
"""Which of INSTRUCTIONS a kind of machine may have, as `platform.machine` names it."""
_EXPORTS = "seam/exports.map"
_LINK = ("-shared", "-pthread", "-static-libstdc++", "-static-libgcc")
COMPILERS = ("g++", "clang++", "c++")
_NO_COMPILER = f"no C++ compiler ({', '.join(COMPILERS)})"
_COMPILED_WITHIN = 300.0  # seconds
_DIGEST_SIZE = 32  # bytes, after a library that was compiled
_WRITABLE = 0o022  # by a group or by everyone


class NativeUnavailable(Exception):
    """Why the native code can't be used here; torch can."""


def load_library(directories: Sequence[Path], say: Callable[[str], None] = lambda line: None) -> ctypes.CDLL:
    """The library, compiled first where no directory has one to use. Raises NativeUnavailable."""
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


def may_be_had(directories: Sequence[Path]) -> bool:
    """Whether a directory has the library for this processor, or there is a compiler to make it."""
    return why_not(directories) is None


def why_not(directories: Sequence[Path]) -> str | None:
    """Why it may not be had; None where it may."""
    try:
        name = library_name(instructions())
    except NativeUnavailable as reason:
        return str(reason)
    is_there = any((directory / name).exists() for directory in directories) or any(map(shutil.which, COMPILERS))
    return None if is_there else _NO_COMPILER


def compile_libraries(directory: Path) -> None:
    """Compile it into the directory, for other processes on any processor of this kind of machine. Raises
    NativeUnavailable where that fails."""
    for name in _of_this_machine():
        _compile(directory, name, lambda path: None)


def instructions() -> str:
    """The best of INSTRUCTIONS that this processor has, or that NATIVE_INSTRUCTIONS names. Raises
    NativeUnavailable."""
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
    """With which the library is compiled for one of INSTRUCTIONS."""
    if name == "neon":
        return (*FLAGS, *_ARM_FLAGS)
    return (*FLAGS, *_X86_FLAGS, *("-m" + feature.replace("_bf16", "bf16") for feature in INSTRUCTIONS[name]))


def source_digest(name: str) -> str:
    """What decides what the library computes: its source and how it is compiled, for one of INSTRUCTIONS."""
    sha = hashlib.sha256(" ".join((*flags_for(name), *_LINK)).encode())
    for source in (*UNITS, *HEADERS, _EXPORTS):
        sha.update((SOURCE / source).read_bytes())
    return sha.hexdigest()[:16]


def library_name(name: str) -> str:
    """The file name of the library of this source, for one of INSTRUCTIONS."""
    return f"smolora-{source_digest(name)}.so"


def computed_by(library: ctypes.CDLL) -> str:
    """What its results' bits depend on: the source, the compiler with its version and flags, and whether the
    processor has AMX."""
    return f"{source_digest(instructions())} ({library.smolora_compiler().decode()})"


def flags_of_units(flags: Sequence[str]) -> list[str]:
    """These flags as each unit is compiled with them, so that it can say so."""
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
        raise NativeUnavailable("this processor or system lacks an instruction")
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


def _compile(directory: Path, name: str, use: Callable[[Path], T]) -> T:
    """Compile into the directory for one of INSTRUCTIONS; what `use` makes of the new file, which gets its name
    after that."""
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
                [compiler, *flags_of_units(flags_for(name)), f"-I{SOURCE}", "-c", str(SOURCE / unit), "-o", to]
                for unit, to in zip(UNITS, objects, strict=True)
            ]
            _run(compiles, scratch)
            exports = ("-Xlinker", f"--version-script={SOURCE / _EXPORTS}")  # -Wl, would part it at a comma
            _link(compiler, [*objects, *exports, "-o", str(made)], scratch)
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


def _link(compiler: str, arguments: Sequence[str], scratch: str) -> None:
    """`_run`, with the C++ library inside where the system has it for that: Fedora's compiler comes without."""
    try:
        _run([[compiler, *_LINK, *arguments]], scratch)
    except subprocess.CalledProcessError:
        without = [flag for flag in _LINK if not flag.startswith("-static")]
        _run([[compiler, *without, *arguments]], scratch)


def _run(commands: Sequence[Sequence[str]], scratch: str) -> None:
    """Run them beside each other; however it ends, none goes on. Raises CalledProcessError with what the compiler
    said, or TimeoutExpired. What they need for a while is in `scratch`: /tmp may be small.
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
            _, said = process.communicate(timeout=_COMPILED_WITHIN)
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args, stderr=said)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it started, unless it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def _keep_others_out(directory: Path) -> None:
    """Take others' right to write away from a directory of this user's; raises NativeUnavailable for another's."""
    status = directory.stat()
    if status.st_uid == os.geteuid() and status.st_mode & _WRITABLE:
        directory.chmod(status.st_mode & 0o7777 & ~_WRITABLE)
    _check_owners(directory)


if __name__ == "__main__":  # as the image is built: python -m server.model.native.library DIRECTORY
    try:
        compile_libraries(Path(sys.argv[1]))
    except NativeUnavailable as failure:
        sys.exit(str(failure))
