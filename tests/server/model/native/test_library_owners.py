"""Native code is loaded from where this user and root alone may write, and is made there otherwise."""

import os
import shutil
from pathlib import Path

import pytest

from server.model.native.library import NativeUnavailable, instructions, library_name, load_library

COMPILING = "compiling the native code, once"


@pytest.fixture
def shared(tmp_path: Path, compiled: Path) -> Path:
    """A folder with the library, beside HOME's."""
    (tmp_path / "image").mkdir()
    shutil.copy2(compiled, tmp_path / "image")
    return tmp_path / "image"


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_others_may_write_is_refused_and_made_in_home(
    tmp_path: Path, shared: Path, compiled: Path, quick: None, mode: int, what: str
) -> None:
    (place := shared if what == "folder" else shared / library_name(instructions())).chmod(mode)
    said: list[str] = []
    load_library([shared, tmp_path / "home"], said.append)
    assert said == [f"native code is not taken from {shared}: others may write to {place}", COMPILING]
    assert (tmp_path / "home" / library_name(instructions())).read_bytes() == compiled.read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_another_user_owns_is_refused(tmp_path: Path, shared: Path, quick: None, what: str) -> None:
    place = shared if what == "folder" else shared / library_name(instructions())
    os.chown(place, 65534, 65534)
    said: list[str] = []
    load_library([shared, tmp_path / "home"], said.append)
    assert said == [f"native code is not taken from {shared}: {place} belongs to another user", COMPILING]


def test_links_are_followed(tmp_path: Path, shared: Path, quick: None) -> None:
    """Whether the folder is a link, or the file in it, to what others may write."""
    (tmp_path / "linked").symlink_to(shared)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / library_name(instructions())).symlink_to(shared / library_name(instructions()))
    for directory in (tmp_path / "linked", tmp_path / "links"):
        said: list[str] = []
        load_library([directory, tmp_path / "unused"], said.append)
        assert said == []
        for place in (shared, shared / library_name(instructions())):
            place.chmod(0o777)
            load_library([directory, tmp_path / "home"], said.append)
            assert said[0] == f"native code is not taken from {directory}: others may write to {place}"
            place.chmod(0o755)
            said.clear()


def test_a_link_to_nothing(tmp_path: Path, quick: None) -> None:
    (tmp_path / library_name(instructions())).symlink_to(tmp_path / "nothing")
    said: list[str] = []
    load_library([tmp_path], said.append)
    assert "it can't be read" in said[0]
    assert said[1:] == [COMPILING]


def test_homes_own_folder_is_closed_to_others(tmp_path: Path, compiled: Path, quick: None) -> None:
    """An existing HOME goes on, with a library that nobody else can have written."""
    home = tmp_path / "home"
    home.mkdir()
    (home / library_name(instructions())).write_bytes(b"another's")
    home.chmod(0o777)
    said: list[str] = []
    load_library([home], said.append)
    assert said == [f"native code is not taken from {home}: others may write to {home}", COMPILING]
    assert home.stat().st_mode & 0o777 == 0o755
    assert (home / library_name(instructions())).read_bytes() == compiled.read_bytes()
    load_library([home], said.append)
    assert len(said) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_another_users_home_is_not_compiled_into(tmp_path: Path, quick: None) -> None:
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(NativeUnavailable, match="belongs to another user"):
        load_library([tmp_path])


def test_whatever_the_umask_others_may_not_write(tmp_path: Path, quick: None) -> None:
    before = os.umask(0)
    try:
        load_library([tmp_path / "home"])
    finally:
        os.umask(before)
    for place in (tmp_path / "home", tmp_path / "home" / library_name(instructions())):
        assert place.stat().st_mode & 0o777 == 0o755
