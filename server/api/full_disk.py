"""A disk without room is said so, and not taken for a fault of ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.errors import SmoloraError
from server.errors import Unavailable
from server.training.reserve import Reserve

_RETRY_SECONDS = 60.0


@contextmanager
def full_disk_is_unavailable(home: Path) -> Iterator[None]:
    """Raise Unavailable for what fails within because there is no room under `home`."""
    try:
        yield
    except SmoloraError:
        raise
    except Exception as error:
        if Reserve(home).is_disk_full(error):
            raise Unavailable("the server's disk is full", _RETRY_SECONDS) from error
        raise
