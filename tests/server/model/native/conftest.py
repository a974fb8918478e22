"""What tests of the native library share: the compiled one, and compilers that are none."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.model.native.build import library_name
from server.model.native.library import instructions
from tests.kits.cache import CACHE
from tests.kits.native import native_library


@pytest.fixture
def compiled() -> Iterator[Path]:
    """The library of this source, where it runs; files that a test writes are its owner's to write."""
    native_library()
    before = os.umask(0o022)
    yield CACHE / "native" / library_name(instructions())
    os.umask(before)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script into the place of every compiler; its last argument is the file to make."""

    def replace(script: str) -> None:
        made = tmp_path / "bin" / "g++"
        made.parent.mkdir(exist_ok=True)
        made.write_text(f"#!/bin/sh\nfor last; do :; done\n{script}\n")
        made.chmod(0o755)
        monkeypatch.setenv("PATH", f"{made.parent}:/bin")

    return replace


@pytest.fixture
def quick(compiler: Callable[[str], None], compiled: Path, tmp_path: Path) -> None:
    """A compiler that makes the real library at once."""
    without_digest = tmp_path / "compiled"
    without_digest.write_bytes(compiled.read_bytes()[:-32])
    compiler(f'cp {without_digest} "$last"')
