"""If memory or threads run out, a call fails, but neither the process nor later calls."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.model.base.source import resolve_base
from tests.kits.cache import CACHE
from tests.kits.native import SHAPES, native_library
from tests.kits.tiny import save_tiny_base


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    native_library()
    architecture, options = SHAPES["grouped"]
    longer = {**options, "max_position_embeddings": 16384}
    directory = save_tiny_base(tmp_path_factory.mktemp("memory") / "tiny", architecture, longer, seed=3)
    return resolve_base(str(directory), directory.parent)


def test_calls_fail_alone(base_dir: Path) -> None:
    paths = [str(base_dir), str(CACHE / "native")]
    command = [sys.executable, "-m", "tests.server.model.native.short_of_memory", *paths]
    # Freed memory goes back to the system, and threads reserve nothing.
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **returned})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["threads", "serving", "the engine", "training"]
