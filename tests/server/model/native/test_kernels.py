"""Runs the C++ tests: each kernel against a slow exact form, and whole steps through the library's entries.

Their program contains the library's source, compiled with the library's flags. The tests of the passes compare
whole bases with torch.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.kits.native import native_library
from tests.server.model.native.build import KERNELS, build

NAMES = [
    name
    for path in sorted(KERNELS.glob("test_*.cpp"))
    for name in re.findall(r"^TEST\((\w+)\)", path.read_text(encoding="utf-8"), re.MULTILINE)
]
AMX = ["1", "0"] if "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8") else ["0"]
"""NATIVE_AMX: with AMX if the processor has it, and without."""


@pytest.fixture(scope="module")
def program() -> Path:
    native_library()
    return build()


def test_names_are_found_and_differ() -> None:
    assert len(NAMES) == len(set(NAMES)) > 30


@pytest.mark.thorough  # compiling takes a minute of a core; the tests of the passes compare whole bases with torch
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("amx", AMX)
def test_kernels(program: Path, name: str, amx: str) -> None:
    environment = {**os.environ, "NATIVE_AMX": amx}
    done = subprocess.run([program, name], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"passed {name}\n"


@pytest.mark.thorough
def test_unknown_test_name_fails(program: Path) -> None:
    assert subprocess.run([program, "nothing"], capture_output=True).returncode != 0
