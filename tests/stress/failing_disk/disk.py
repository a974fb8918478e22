"""A process whose disk fails on demand: a library between the process and libc, and its controls.

`shim.cpp` is compiled once into the cache. Linux only.
"""

import ctypes
import errno
import hashlib
import mmap
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kits.cache import CACHE
from tests.kits.native import give_up
from tests.server.model.native.build import WARNINGS, compilers, run

SOURCE = Path(__file__).with_name("shim.cpp")
MAX_CALLS, MAX_TEXT = 2048, 240
_FLAGS = (
    *("-std=c++20", "-O1", "-fPIC", "-shared", *WARNINGS),
    # Plain C: a second libstdc++ loaded before all others would override their symbols.
    *("-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-nodefaultlibs"),
)


class Control(ctypes.Structure):
    """The memory that both processes map. The same struct in shim.cpp documents the fields."""

    _fields_ = (
        ("fails_at", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("stays", ctypes.c_int32),
        ("num_calls", ctypes.c_int32),
        ("num_failed", ctypes.c_int32),
        ("calls", ctypes.c_char * MAX_TEXT * MAX_CALLS),
    )


class FailingDisk:
    """The disk under `home`, for processes started with `environment`. It works until it is told to fail."""

    def __init__(self, home: Path, control: Path) -> None:
        control.write_bytes(bytes(ctypes.sizeof(Control)))
        with control.open("r+b") as file:
            self._control = Control.from_buffer(mmap.mmap(file.fileno(), 0))
        self.environment = {
            "LD_PRELOAD": str(shim()),
            "FAILING_DISK_UNDER": f"{home}/",
            "FAILING_DISK_CONTROL": str(control),
        }
        self._fail(-1)

    @contextmanager
    def failing(self, at: int, error: int = errno.EIO, *, stays: bool = False) -> Iterator[None]:
        """Fail the call with that number, from 0, during the block; with `stays`, all later calls too."""
        self._fail(at, error, stays)
        try:
            yield
        finally:
            self._control.fails_at = -1

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count calls from 0 during the block; none fails."""
        self._fail(-1)
        yield

    @property
    def num_failed(self) -> int:
        """Return the number of calls that failed in the last block."""
        return int(self._control.num_failed)

    def calls(self) -> list[str]:
        """Return the writing calls of the last block in order, such as "sync smolora.db-wal"."""
        assert self._control.num_calls <= MAX_CALLS
        return [self._control.calls[number].value.decode() for number in range(self._control.num_calls)]

    def _fail(self, at: int, error: int = 0, stays: bool = False) -> None:
        self._control.fails_at = -1
        self._control.error, self._control.stays = error, stays
        self._control.num_calls = self._control.num_failed = 0
        self._control.fails_at = at


def shim() -> Path:
    """Return the compiled library. Skip the test if it can't be compiled."""
    if sys.platform != "linux" or not compilers():
        give_up("a disk is made to fail on Linux, where there is a C++ compiler")
    compiler = compilers()[0]
    made_of = hashlib.sha256(repr((compiler, _FLAGS)).encode() + SOURCE.read_bytes()).hexdigest()
    library = CACHE / "native-tests" / f"failing-disk-{made_of[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        run([compiler, *_FLAGS, "-o", str(unfinished), str(SOURCE), "-lc"])
        shutil.move(unfinished, library)
    return library
