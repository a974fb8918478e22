"""How the native library is found, made and done without."""

from pathlib import Path

import pytest

from server.model.native.library import NativeUnavailable, compile_library, library_name, load_library
from server.model.native.load import load_native
from server.model.weights import BaseModel
from tests.conftest import CACHE
from tests.native_kit import native_library


@pytest.fixture(autouse=True)
def only_where_it_runs() -> None:
    native_library()


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    said: list[str] = []
    load_library([tmp_path / "nothing", CACHE / "native", tmp_path / "unused"], said.append)
    assert said == []
    assert not (tmp_path / "unused").exists()


def test_it_is_made_whole_and_under_its_name_alone(tmp_path: Path) -> None:
    said: list[str] = []
    load_library([tmp_path / "nothing", tmp_path / "made"], said.append)
    assert said == ["compiling the native code, once"]
    assert [path.name for path in (tmp_path / "made").iterdir()] == [library_name()]


def test_without_a_compiler_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler"):
        load_library([tmp_path / "made"])


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho it is broken >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    with pytest.raises(NativeUnavailable, match="it is broken"):
        compile_library(tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / library_name()).write_bytes(b"half of it")
    with pytest.raises(NativeUnavailable, match="can't be loaded"):
        load_library([tmp_path])


def test_other_dtypes_are_torchs_and_nothing_is_said_of_it(tiny_base: BaseModel, tmp_path: Path) -> None:
    said: list[str] = []
    assert load_native(tiny_base, [tmp_path], 64, said.append) is None
    assert said == []
    assert list(tmp_path.iterdir()) == []
