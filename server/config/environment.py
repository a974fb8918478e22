"""The environment, where it isn't read for the settings."""

import os

from server.config import PREFIX


def with_scratch(place: str) -> dict[str, str]:
    """For a process that this one starts: what this one has, and that folder in the place of /tmp."""
    return {**os.environ, "TMPDIR": place}


def without_secrets() -> dict[str, str]:
    """Return what a Python process for users' input needs of this one's environment: no passwords or keys."""
    names = ("PYTHONPATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
    return {name: os.environ[name] for name in names if name in os.environ}


def log_format() -> str | None:
    """What the log's form is to be, should the settings as a whole be wrong."""
    return os.environ.get(f"{PREFIX}LOG_FORMAT")
