"""Real servers shared by several files, and PEFT on the same weights.

tests/conftest.py runs those files in one process, one after the other. The files after them are in another
package, where these servers end: running servers would poll for work until the end of all tests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from peft import LoraConfig

from tests.end_to_end.peft_reference import Reference
from tests.end_to_end.server_process import ServerProcess

MAX_NUM_SEQS, MAX_QUEUE, MAX_MODEL_LEN = 4, 8, 512
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class AdapterFiles:
    """Random adapters, made with PEFT on demand; each seed gives different weights."""

    reference: Reference
    directory: Path

    def make(self, seed: int, rank: int = 4, alpha: int = 4, modules: list[str] | None = None) -> Path:
        """Make an adapter of the middle layers' `modules` that is strong enough to change answers, which stay
        text."""
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=modules or ALL_LINEAR,
            layers_to_transform=list(range(8, 20)),
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        return self.reference.make_adapter(self.directory / f"{seed}-{rank}-{alpha}", config, seed)

    def left(self) -> Path:
        """Make an adapter of rank 4 on all linear modules."""
        return self.make(1)

    def right(self) -> Path:
        """Make an adapter of rank 16 on some modules."""
        return self.make(2, rank=16, alpha=32, modules=["q_proj", "o_proj", "up_proj"])


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def reference(hf_base_dir: Path) -> Reference:
    return Reference(hf_base_dir)


@pytest.fixture(scope="session")
def adapter_files(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> AdapterFiles:
    return AdapterFiles(reference, tmp_path_factory.mktemp("peft"))


@pytest.fixture(scope="session")
def left(adapter_files: AdapterFiles) -> Path:
    """Return the adapter `left` of both servers below."""
    return adapter_files.left()


@pytest.fixture(scope="session")
def right(adapter_files: AdapterFiles) -> Path:
    """Return the adapter `right` of both servers below."""
    return adapter_files.right()


@contextmanager
def narrow_server(
    home: Path, base_dir: Path, adapters: dict[str, Path], dtype: str = "auto"
) -> Iterator[ServerProcess]:
    """Start a server of the real base that a few requests fill."""
    server = ServerProcess(
        home,
        model=base_dir,
        dtype=dtype,
        max_num_seqs=MAX_NUM_SEQS,
        max_queue=MAX_QUEUE,
        max_model_len=MAX_MODEL_LEN,
    )
    try:
        for name, directory in adapters.items():
            server.upload(name, directory)
        yield server
    finally:
        server.close()


@pytest.fixture(scope="package")
def shared_server(
    base_dir: Path, left: Path, right: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    with narrow_server(tmp_path_factory.mktemp("home"), base_dir, {"left": left, "right": right}) as server:
        yield server


@pytest.fixture(scope="package")
def shared_exact_server(
    base_dir: Path, left: Path, right: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    adapters = {"left": left, "right": right}
    with narrow_server(tmp_path_factory.mktemp("exact"), base_dir, adapters, dtype="fp32") as server:
        yield server


@pytest.fixture
def server(shared_server: ServerProcess) -> Iterator[ServerProcess]:
    """Yield a server with default settings except for its single thread. A test must leave nothing running,
    waiting or cached on it."""
    yield shared_server
    shared_server.wait_until_idle()


@pytest.fixture
def exact_server(shared_exact_server: ServerProcess) -> Iterator[ServerProcess]:
    """Yield such a server in fp32, whose answers equal the reference's."""
    yield shared_exact_server
    shared_exact_server.wait_until_idle()


@pytest.fixture(scope="package")
def trainer(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Start a server of the real base with a worker."""
    server = ServerProcess(tmp_path_factory.mktemp("trainer"), model=base_dir, workers=1, max_model_len=512)
    yield server
    server.close()


@pytest.fixture(scope="package")
def tiny_trainer(converted_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Start a server of the tiny base in fp32 with a worker."""
    home = tmp_path_factory.mktemp("tiny-trainer")
    server = ServerProcess(home, model=converted_tiny, dtype="fp32", workers=1, adapter_cache_bytes="4MiB")
    yield server
    server.close()
