"""What is there when a process has loaded is never looked through for garbage again."""

import gc
from collections.abc import Iterator

import pytest

from server.system.memory import loading


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """Other tests' objects are looked through as before."""
    before = gc.get_freeze_count()
    yield
    if not before:
        gc.unfreeze()


def test_loading_pauses_the_collector_and_freezes_its_objects() -> None:
    with loading():
        assert not gc.isenabled()
        loaded: list[object] = []
        loaded.append(loaded)
    assert gc.isenabled()
    assert all(found is not loaded for found in gc.get_objects())
    later: list[object] = []
    later.append(later)
    assert any(found is later for found in gc.get_objects())


def test_a_start_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ValueError, match="no base"), loading():
        raise ValueError("no base")
    assert gc.isenabled()
