"""Native code for processors without AVX-512 or its bf16 products: kernels, and answers of the real base."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.model.native.build import INSTRUCTIONS, MACHINES, NativeUnavailable, flags_for
from server.model.native.library import instructions, why_unavailable
from tests.kits.native import hold_to
from tests.server.model.native.build import build

X86 = MACHINES["x86_64"]
LESSER = [
    pytest.param(name, marks=pytest.mark.thorough if name == "avx2" else pytest.mark.slow) for name in X86[1:]
]


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Limit this process to the instructions that the test names."""
    name: str = request.param
    hold_to(name, monkeypatch)
    return name


@pytest.mark.thorough  # each compiles the library
@pytest.mark.parametrize("limited", X86, indirect=True)
def test_named_instructions_are_used(limited: str) -> None:
    assert instructions() == limited


def test_better_instructions_include_the_lesser_ones() -> None:
    needed = [set(INSTRUCTIONS[name]) for name in X86]
    assert needed[0] > needed[1] > needed[2]
    assert "-mavx512f" not in flags_for("avx2")
    assert "-mavx512bf16" not in flags_for("avx512")


@pytest.mark.parametrize("name", ["sse", ""])
def test_unknown_instructions_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv("NATIVE_INSTRUCTIONS", name)
    with pytest.raises(
        NativeUnavailable, match=f"^NATIVE_INSTRUCTIONS must be one of avx512_bf16, avx512, avx2, not '{name}'$"
    ):
        instructions()
    assert why_unavailable(tmp_path) is not None


@pytest.mark.parametrize("limited", LESSER, indirect=True)
def test_kernels(limited: str) -> None:
    done = subprocess.run([build(name=limited)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert done.stdout.count("passed ") > 30


@pytest.mark.parametrize("limited", LESSER, indirect=True)
def test_answers_are_those_of_hugging_face(limited: str) -> None:
    """Run the tests of serving and training over HTTP with fewer instructions."""
    tests = ["tests/end_to_end/test_native_parity.py", "tests/server/training/passes/test_native_pass.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "NATIVE_INSTRUCTIONS": limited},
    )
    assert done.returncode == 0, done.stdout[-4000:]
