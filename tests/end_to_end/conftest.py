"""Real servers that files share, and PEFT on the same weights.

tests/conftest.py runs those files in one process, one after the other. The next ones are of another package: then
the servers are ended, which would look for work a hundred times a second until all tests are through.
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
    """Makes random adapters with PEFT, on demand; another seed is other weights."""

    reference: Reference
    directory: Path

    def make(self, seed: int, rank: int = 4, alpha: int = 4, modules: list[str] | None = None) -> Path:
        """An adapter of the middle layers' `modules`: strong enough to change what is said, and it stays text."""
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
        """Of rank 4, on all linear modules."""
        return self.make(1)

    def right(self) -> Path:
        """Of rank 16, on some modules."""
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
    """What both servers below have as `left`."""
    return adapter_files.left()


@pytest.fixture(scope="session")
def right(adapter_files: AdapterFiles) -> Path:
    """What both servers below have as `right`."""
    return adapter_files.right()


@contextmanager
def narrow_server(
    home: Path, base_dir: Path, adapters: dict[str, Path], dtype: str = "auto"
) -> Iterator[ServerProcess]:
    """A server of the real base that a few requests fill."""
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
    """A server as it is by default, but for its one thread. Every test leaves nothing on it that runs, waits or
    holds a block.
    """
    yield shared_server
    shared_server.wait_until_idle()


@pytest.fixture
def exact_server(shared_exact_server: ServerProcess) -> Iterator[ServerProcess]:
    """Likewise one in fp32, whose every answer is the reference's."""
    yield shared_exact_server
    shared_exact_server.wait_until_idle()


@pytest.fixture(scope="package")
def trainer(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of the real base, with a worker."""
    server = ServerProcess(tmp_path_factory.mktemp("trainer"), model=base_dir, workers=1, max_model_len=512)
    yield server
    server.close()


@pytest.fixture(scope="package")
def tiny_trainer(converted_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of the tiny base in fp32, with a worker."""
    home = tmp_path_factory.mktemp("tiny-trainer")
    server = ServerProcess(home, model=converted_tiny, dtype="fp32", workers=1, adapter_cache_bytes="4MiB")
    yield server
    server.close()
