"""The application on a tiny base, listening on a real port in a thread of this process."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from server.api.deps import Services
from server.config import Settings
from server.serve.startup import build
from tests.server.conftest import new_app


class Running:
    """A server at `url`, which can be cut off and come back on the same port."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(new_app(services), log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert time.monotonic() < deadline, "it doesn't start"
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        self.services.jobs._engine.dispose()  # a process would end here, and with it its connections


@contextmanager
def running(home: Path, model: Path, **settings: object) -> Iterator[Running]:
    """Run a server with a home of its own."""
    fields = {"home": home, "model": str(model), "device": "cpu", "dtype": "fp32", "adapter_cache_bytes": "4MiB"}
    server = Running(build(Settings.model_validate({**fields, **settings}), lambda line: None))
    try:
        yield server
    finally:
        server.stop()
