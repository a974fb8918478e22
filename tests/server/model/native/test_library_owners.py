"""Native code in HOME is loaded only if no other user but root may write to it. Otherwise it is compiled again."""

import os
import shutil
from pathlib import Path

import pytest

from server.model.native.build import NativeUnavailable, library_name
from server.model.native.library import instructions, load_library

COMPILING = "compiling the native code, once"


@pytest.fixture
def home(tmp_path: Path, compiled: Path) -> Path:
    """A directory with the library."""
    (tmp_path / "home").mkdir()
    shutil.copy2(compiled, tmp_path / "home")
    return tmp_path / "home"


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_library_that_others_may_write_is_compiled_again(
    home: Path, compiled: Path, quick: None, mode: int, what: str
) -> None:
    (place := home if what == "folder" else home / compiled.name).chmod(mode)
    (home / compiled.name).write_bytes(b"another's")
    said: list[str] = []
    load_library(home, said.append)
    assert said == [f"native code is not taken from {home}: others may write to {place}", COMPILING]
    assert (home / compiled.name).read_bytes() == compiled.read_bytes()
    for path in (home, home / compiled.name):
        assert path.stat().st_mode & 0o022 == 0
    load_library(home, said.append)
    assert len(said) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_another_users_library_is_compiled_again(home: Path, compiled: Path, quick: None) -> None:
    os.chown(home / compiled.name, 65534, 65534)
    said: list[str] = []
    load_library(home, said.append)
    reason = f"{home / compiled.name} belongs to another user"
    assert said == [f"native code is not taken from {home}: {reason}", COMPILING]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_another_users_home_is_not_compiled_into(home: Path, quick: None) -> None:
    os.chown(home, 65534, 65534)
    said: list[str] = []
    with pytest.raises(NativeUnavailable, match=f"{home} belongs to another user"):
        load_library(home, said.append)
    assert said == [f"native code is not taken from {home}: {home} belongs to another user", COMPILING]


def test_links_are_followed(tmp_path: Path, home: Path, compiled: Path, quick: None) -> None:
    """The directory may be a link, or the file in it, to a place that others may write to."""
    (tmp_path / "linked").symlink_to(home)
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / compiled.name
    for directory in (tmp_path / "linked", tmp_path / "links"):
        for place in (home, home / compiled.name):
            link.unlink(missing_ok=True)
            link.symlink_to(home / compiled.name)
            said: list[str] = []
            load_library(directory, said.append)
            assert said == []
            place.chmod(0o777)
            load_library(directory, said.append)
            assert said == [f"native code is not taken from {directory}: others may write to {place}", COMPILING]
            place.chmod(0o755)


def test_a_broken_link_is_replaced(tmp_path: Path, quick: None) -> None:
    (tmp_path / library_name(instructions())).symlink_to(tmp_path / "nothing")
    said: list[str] = []
    load_library(tmp_path, said.append)
    assert "it can't be read" in said[0]
    assert said[1:] == [COMPILING]


def test_the_umask_does_not_let_others_write(tmp_path: Path, quick: None) -> None:
    before = os.umask(0)
    try:
        load_library(tmp_path / "home")
    finally:
        os.umask(before)
    for place in (tmp_path / "home", tmp_path / "home" / library_name(instructions())):
        assert place.stat().st_mode & 0o777 == 0o755
