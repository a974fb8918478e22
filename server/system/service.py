"""Messages to systemd, if it runs this process as a service of Type=notify. sd_notify(3) has the protocol."""

import socket
from contextlib import suppress


class ServiceManager:
    """The systemd that started this process. Without one, every method is a no-op."""

    def __init__(self, address: str = "", timeout: float | None = None) -> None:
        """`address` is systemd's socket, and `timeout` its watchdog's, in seconds."""
        self._address = address
        self._interval = None if timeout is None else timeout / 2  # as sd_watchdog_enabled(3) recommends
        self._sent_at = float("-inf")

    def notify(self, state: str) -> None:
        """Send a state, such as READY=1. A systemd that can't be reached doesn't stop the server."""
        if not self._address:
            return
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address  # @: abstract
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
            sending.setblocking(False)
            sending.sendto(state.encode(), address)

    def keep_alive(self, now: float) -> None:
        """Reset the watchdog's timeout, if it is time to. Call this often. `now` is monotonic, in seconds."""
        if self._interval is not None and now - self._sent_at >= self._interval:
            self._sent_at = now
            self.notify("WATCHDOG=1")
