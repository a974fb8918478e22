"""Tells of commits to a PostgreSQL database: a thread listens, and whoever asks reads a number."""

import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import psycopg

CHANNEL = "smolora_commits"
SILENT_SECONDS = 3.0
"""After so long without a sign of the server, nobody trusts the number any more."""

_LOOK_SECONDS = 1.0
_RETRY_SECONDS = 0.1

log = logging.getLogger("smolora.database")


class Notices:
    """A number that moves whenever anybody commits, this process or another; one read takes a microsecond.

    This process's own commits, whose notices say `own`, count as they are done, others' when their notice arrives.
    While the server isn't heard the number moves at each look, so that nothing that was remembered is taken for
    current. Thread-safe.
    """

    def __init__(self, open_one: "Callable[[], psycopg.Connection[Any]]") -> None:
        self.own = uuid.uuid4().hex
        self._open = open_one
        self._number = 0
        self._heard_at = float("-inf")
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self) -> int:
        if time.monotonic() - self._heard_at > SILENT_SECONDS:
            self.count()
        return self._number

    def count(self) -> None:
        """Somebody has committed, or may have."""
        with self._lock:
            self._number += 1

    def start(self) -> None:
        """Listen from now on; the first time counts."""
        with self._lock:
            if self._thread is None and not self._is_closed.is_set():
                self._thread = threading.Thread(target=self._run, name="commits", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Listen no more. The thread ends within a moment."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._is_closed.is_set():
            try:
                with self._open() as connection:
                    connection.autocommit = True
                    self._listen(connection)
            except psycopg.Error as error:
                if self._heard_at > 0:
                    log.warning("commits of others aren't heard just now: %s", type(error).__name__)
                self._heard_at = float("-inf")
            self._is_closed.wait(_RETRY_SECONDS)

    def _listen(self, connection: "psycopg.Connection[Any]") -> None:
        connection.execute(f"LISTEN {CHANNEL}")
        while not self._is_closed.is_set():
            self.count()  # at first: what was committed meanwhile wasn't heard
            self._heard_at = time.monotonic()
            while not self._hears(connection):
                connection.execute("SELECT 1")  # is it still there?
                self._heard_at = time.monotonic()
                if self._is_closed.is_set():
                    return

    def _hears(self, connection: "psycopg.Connection[Any]") -> bool:
        """Whether another process has committed within a moment."""
        payloads = {notice.payload for notice in connection.notifies(timeout=_LOOK_SECONDS, stop_after=1)}
        return bool(payloads - {self.own})
