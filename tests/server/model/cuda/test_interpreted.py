"""fp32: the kernels in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

ROOT = Path(__file__).parents[4]


@pytest.mark.thorough
@pytest.mark.parametrize(("part", "num_checks"), [("small", 11), ("family", 8), ("engine", 1), ("preemption", 1)])
def test_fp32_is_right_and_has_the_same_bits_in_any_batch(part: str, num_checks: int) -> None:
    command = [sys.executable, "-m", "tests.server.model.cuda.interpreted", part]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in done.stdout.splitlines()}
    assert len(errors) == num_checks
    assert max(errors.values()) <= 2e-6, errors
