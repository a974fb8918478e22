"""The kernels compiled for 64-bit Arm, on an emulated processor: the same tests as test_kernels.py.

Emulation checks the results, including whole steps, but neither speed nor the effects of Arm's weaker memory order
on threads.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.model.native.build import build, compilers, is_own
from tests.server.model.native.test_kernels import NAMES

EMULATOR = ("qemu-aarch64", "-cpu", "cortex-a53")
"""An ARMv8-A without extensions: unsupported instructions are an error."""

pytestmark = [
    pytest.mark.skipif(is_own("neon"), reason="this machine is one: test_kernels.py runs them"),
    pytest.mark.skipif(
        not compilers("neon") or shutil.which(EMULATOR[0]) is None,
        reason="needs Debian's packages g++-aarch64-linux-gnu and qemu-user",
    ),
]


def _mark(name: str) -> pytest.MarkDecorator:
    return pytest.mark.slow if name == "tables_of_any_numbers" else pytest.mark.thorough


@pytest.fixture(scope="module")
def program() -> Path:
    return build(name="neon")


@pytest.mark.parametrize("name", [pytest.param(name, marks=_mark(name)) for name in NAMES])
def test_emulated_kernels(program: Path, name: str) -> None:
    done = subprocess.run([*EMULATOR, program, name], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"passed {name}\n"
