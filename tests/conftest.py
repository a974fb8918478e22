"""What tests share: bases to run on. Nothing here changes what is under test."""

import ctypes
import gc
import os
import platform
from pathlib import Path

import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from server.model.base.embedded import EMBEDDED
from server.model.base.export import export_hugging_face
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from tests.buckets import aws, bucket, bytes_url, object_store, proxied, proxy
from tests.cache import CACHE
from tests.postgres import database_url, own_postgres, postgres
from tests.properties import set_default
from tests.tiny import save_tiny_base

__all__ = [
    "aws",
    "bucket",
    "bytes_url",
    "database_url",
    "object_store",
    "own_postgres",
    "postgres",
    "proxied",
    "proxy",
]

SHARED = {
    "exact_server": ("test_adapter_life.py", "test_blends.py", "test_exact_answers.py", "test_trained_adapter.py"),
    "shared_server": (
        "test_hard_times.py",
        "test_openai_client.py",
        "test_processes.py",
        "test_streams_and_sampling.py",
        "test_structured_output.py",
    ),
    "trainers": ("test_fine_tuning.py", "test_merging.py", "test_real_training.py"),
}
"""The files of end_to_end whose tests ask for the same servers."""
LONG = (
    "test_readme.py",
    *SHARED["exact_server"],
    *SHARED["shared_server"],
    *SHARED["trainers"],
    "test_page.py",
    "test_real_worker.py",
    "test_worker.py",
    "test_exact_match.py",
    "test_against_peft.py",
    "test_smollm.py",
    "test_native_parity.py",
    "test_kernels.py",
    "test_job_files.py",
    "test_native_pass.py",
    "test_supervisor.py",
    "test_hanging_server.py",
    "test_attacks.py",
    "test_failing_disk.py",
    "test_sign_in.py",
)
"""What takes longest, in that order. It begins first, so that all processes end at about the same time."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt."""
KEPT_BYTES = 256 << 20


def pytest_configure() -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # so have servers and their jobs, but for `default_threads`
    set_default()
    keep_freed_memory()
    gc.disable()  # what is imported and collected from here on stays: looking for garbage in it finds none


def keep_freed_memory() -> None:
    """Have this process, and none that it starts, use freed tensors' memory again: new pages are zeroed first."""
    if platform.libc_ver()[0] == "glibc":
        malloc = ctypes.CDLL(None)
        malloc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        malloc.mallopt(M_TRIM_THRESHOLD, 2 * KEPT_BYTES)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is `LONG`, then what starts servers, then the rest."""

    def rank(item: pytest.Item) -> int:
        if item.path.name in LONG:
            return LONG.index(item.path.name)
        return len(LONG) if item.path.parent.name == "end_to_end" else len(LONG) + 1

    items.sort(key=rank)


class Scheduling(LoadFileScheduling):
    """Runs a file's tests in one process, and those that share servers in one, too: they are started once."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        folder, _, name = file.rpartition("/")
        units = (unit for unit, names in SHARED.items() if folder.endswith("end_to_end") and name in names)
        return next(units, file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling | None:
    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def base_dir() -> Path:
    """The real SmolLM2-135M-Instruct, converted, in bf16. SMOLORA_TEST_BASE names another base to use."""
    return resolve_base(os.environ.get("SMOLORA_TEST_BASE", EMBEDDED), CACHE)


@pytest.fixture(scope="session")
def real_base(base_dir: Path) -> BaseModel:
    """The real base in fp32, for exact comparisons. Its tensors are shared: never write to them."""
    return load_base(base_dir, torch.float32)


@pytest.fixture(scope="session")
def hf_base_dir(base_dir: Path) -> Path:
    """The real base as a Hugging Face directory in bf16, for transformers and PEFT; fp32 is a cast at loading."""
    stored = load_base(base_dir)
    directory = CACHE / f"hugging-face-{stored.digest[:16]}"
    if not directory.is_dir():
        export_hugging_face(stored, directory)
    return directory


@pytest.fixture(scope="session")
def tiny_base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama as a Hugging Face directory, fp32: 3 layers, grouped queries, 512 tokens."""
    return save_tiny_base(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def converted_tiny(tiny_base_dir: Path) -> Path:
    """The tiny Llama, converted. A server that is given this starts as any does but a base's first one, sooner."""
    return resolve_base(str(tiny_base_dir), tiny_base_dir.parent)


@pytest.fixture(scope="session")
def tiny_base(converted_tiny: Path) -> BaseModel:
    """The tiny Llama, converted and loaded in fp32. Its tensors are shared: never write to them."""
    return load_base(converted_tiny)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Fastest for tiny bases; where others use the cores too, a second thread slows even the real one down."""
    torch.set_num_threads(1)
