"""Objects of a starting process are exempt from garbage collection."""

import gc
from collections.abc import Iterator

import pytest

from server.system.memory import exempt_from_gc


@pytest.fixture(autouse=True)
def unfreeze() -> Iterator[None]:
    """Undo the freeze, so that other tests' objects are collected as before."""
    before = gc.get_freeze_count()
    yield
    if not before:
        gc.unfreeze()


def test_collector_pauses_and_new_objects_are_exempt() -> None:
    with exempt_from_gc():
        assert not gc.isenabled()
        loaded: list[object] = []
        loaded.append(loaded)
    assert gc.isenabled()
    assert all(found is not loaded for found in gc.get_objects())
    later: list[object] = []
    later.append(later)
    assert any(found is later for found in gc.get_objects())


def test_collector_resumes_after_an_error() -> None:
    with pytest.raises(ValueError, match="no base"), exempt_from_gc():
        raise ValueError("no base")
    assert gc.isenabled()
