"""One Ray for all tests of this folder, and the single process's answers to the same requests."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from server.model.base.source import resolve_base
from server.model.base.weights import load_base
from tests.cluster.kit import CACHES, FLAGS, SIZES, Cluster, publish
from tests.cluster.whole import Whole
from tests.end_to_end.server_process import ServerProcess
from tests.kits.tiny import save_tiny_base

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `cluster`: Ray isn't installed")
NAMES = ("left", "right", "third")


@pytest.fixture(scope="session")
def long_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny base whose answers may take many seconds."""
    return save_tiny_base(tmp_path_factory.mktemp("long") / "tiny-llama", options=SIZES)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return HOME of the first API process, from which replicas read adapters."""
    return tmp_path_factory.mktemp("first")


@pytest.fixture(scope="session")
def cluster(home: Path, long_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    running = Cluster(tmp_path_factory.mktemp("ray"), home, long_base)
    try:
        running.scale(2)
        yield running
    finally:
        running.close()


def _with_adapters(server: ServerProcess, base: Path) -> ServerProcess:
    shape = load_base(resolve_base(str(base), server.home)).config.shape
    for seed, name in enumerate(NAMES):
        publish(server, name, seed, shape)
    return server


@pytest.fixture(scope="session")
def api(cluster: Cluster, home: Path, long_base: Path) -> Iterator[ServerProcess]:
    """Yield the first API process."""
    server = _with_adapters(cluster.api(home), long_base)
    yield server
    server.close()


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory, long_base: Path) -> Iterator[ServerProcess]:
    """Yield a single process with as many threads as a replica gets: torch's last bits depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        server = ServerProcess(tmp_path_factory.mktemp("single"), model=long_base, **FLAGS, **CACHES)
    yield _with_adapters(server, long_base)
    server.close()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, long_base: Path) -> Iterator[Whole]:
    """Yield a complete cluster with the adapters of `single`."""
    running = Whole(tmp_path_factory.mktemp("whole"), long_base, **FLAGS, **CACHES)
    try:
        for seed, name in enumerate(NAMES):
            assert running.publish(0, name, seed).status_code == 201
        yield running
    finally:
        running.close()
