"""Fixtures of the native library's tests: the compiled library, and fake compilers."""

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
    """The path of this source's library. Only the owner may write to files that a test creates."""
    native_library()
    before = os.umask(0o022)
    yield CACHE / "native" / library_name(instructions())
    os.umask(before)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that replaces every compiler by a shell script, whose last argument is the output file."""

    def replace(script: str) -> None:
        made = tmp_path / "bin" / "g++"
        made.parent.mkdir(exist_ok=True)
        made.write_text(f"#!/bin/sh\nfor last; do :; done\n{script}\n")
        made.chmod(0o755)
        monkeypatch.setenv("PATH", f"{made.parent}:/bin")

    return replace


@pytest.fixture
def quick(compiler: Callable[[str], None], compiled: Path, tmp_path: Path) -> None:
    """A fake compiler that copies the real library."""
    without_digest = tmp_path / "compiled"
    without_digest.write_bytes(compiled.read_bytes()[:-32])
    compiler(f'cp {without_digest} "$last"')
