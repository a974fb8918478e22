"""Builds the tests of the native code's kernels, which are C++, and checks that code in other ways.

`python -m tests.server.model.native.build warnings` compiles the library's units with warnings as errors, by each
compiler that is there; `... sanitize addresses threads` runs the tests with sanitizers. A program is kept in the
cache under what it was made of, and so is that there were no warnings. What is for another kind of machine is
compiled by a cross compiler, and linked with all that it needs.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from server.model.native.build import HEADERS, INSTRUCTIONS, MACHINES, SOURCE, UNITS, unit_flags
from server.model.native.library import instructions, load_library
from tests.kits.cache import CACHE

KERNELS = Path(__file__).parent / "kernels"
CROSS_COMPILERS = {"x86_64": "x86_64-linux-gnu-g++", "aarch64": "aarch64-linux-gnu-g++"}
"""By the machine that they compile for, as Debian names them."""
WARNINGS = ("-Wall", "-Wextra", "-Werror")
_LINK = ("-pthread", "-static-libstdc++", "-Wl,--wrap=pthread_create,--wrap=aligned_alloc")
_DEBUG = ("-O1", "-g1", "-fno-omit-frame-pointer")
SANITIZERS = {
    "addresses": (*_DEBUG, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "threads": (*_DEBUG, "-fsanitize=thread"),
}


def build(*more: str, name: str | None = None) -> Path:
    """The program that runs the tests, compiled with `more` and the library's own flags, for one of INSTRUCTIONS:
    the best that this processor has."""
    name = name or instructions()
    compiler = compilers(name)[0]
    flags = [*unit_flags(name, *more), *WARNINGS, f"-I{SOURCE}", f"-I{KERNELS}"]
    link = _LINK if is_own(name) else (*_LINK, "-static")
    made_of = hashlib.sha256(repr((compiler, flags, link)).encode())
    for path in (*(SOURCE / name for name in (*UNITS, *HEADERS)), *sorted(KERNELS.iterdir())):
        made_of.update(path.read_bytes())
    program = CACHE / "native-tests" / made_of.hexdigest()[:16]
    if program.exists():
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
        tests = Path(scratch) / "tests.cpp"  # in one, since they need the same templates
        tests.write_text("".join(f'#include "{path.name}"\n' for path in sorted(KERNELS.glob("test_*.cpp"))))
        units = [tests, KERNELS / "check.cpp", KERNELS / "faults.cpp", *(SOURCE / unit for unit in UNITS)]
        objects = [str(Path(scratch) / f"{unit.stem}.o") for unit in units]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            commands = (
                [compiler, *flags, "-c", str(unit), "-o", made] for unit, made in zip(units, objects, strict=True)
            )
            list(threads.map(run, commands))
        made = Path(scratch) / "program"
        run([compiler, *more, *objects, *link, "-o", str(made)])
        os.replace(made, program)
    return program


def is_own(name: str) -> bool:
    """Whether one of INSTRUCTIONS is of this kind of machine."""
    return name in MACHINES.get(platform.machine(), ())


def compilers(name: str | None = None) -> list[str]:
    """Those that are there for one of INSTRUCTIONS, or for this machine; first the one of the library."""
    cross = [compiler for machine, compiler in CROSS_COMPILERS.items() if name in MACHINES[machine]]
    commands = ("g++", "clang++") if name is None or is_own(name) else cross
    return [path for command in commands if (path := shutil.which(command))]


def check_warnings() -> None:
    """Compile the units with warnings as errors, making nothing, for all INSTRUCTIONS with a compiler here."""
    commands = [(compiler, *unit_flags(name), *WARNINGS) for name in INSTRUCTIONS for compiler in compilers(name)]
    if not commands:
        sys.stderr.write("no compiler here: the warnings of C++ stay unseen\n")
        return
    made_of = hashlib.sha256(repr(commands).encode())
    for name in (*UNITS, *HEADERS):
        made_of.update((SOURCE / name).read_bytes())
    done = CACHE / "native-warnings" / made_of.hexdigest()[:16]
    if done.exists():
        return
    for unit, command in product(UNITS, commands):
        run([*command, f"-I{SOURCE}", "-fsyntax-only", str(SOURCE / unit)])
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()


def sanitize(*names: str) -> None:
    """Run all tests with the sanitizers named. Raises NativeUnavailable where the native code can't run."""
    load_library(CACHE / "native")
    for name in names:
        # GCC aligns the stacks of this check to 32 bytes, and stores vectors of 64 bytes there (its bug 110027).
        environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
        # The thread sanitizer knows no addresses as random as newer kernels make them.
        subprocess.run(["setarch", "--addr-no-randomize", build(*SANITIZERS[name])], check=True, env=environment)


def run(command: Sequence[str]) -> None:
    """Raises RuntimeError with what a compiler said."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[:4000]}")


if __name__ == "__main__":
    {"warnings": check_warnings, "sanitize": sanitize}[sys.argv[1]](*sys.argv[2:])
