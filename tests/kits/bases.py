"""Bases that all tests share, and fixtures of databases and object stores. No code under test is changed."""

import os
from pathlib import Path

import pytest
import torch

from server.model.base.export import export_hugging_face
from server.model.base.source import EMBEDDED, resolve_base
from server.model.base.weights import BaseModel, load_base
from tests.kits.buckets import aws, bucket, bytes_url, object_store, patient, proxied, proxy
from tests.kits.cache import CACHE
from tests.kits.postgres import database_url, own_postgres, postgres
from tests.kits.tiny import save_tiny_base

__all__ = [
    "aws",
    "bucket",
    "bytes_url",
    "database_url",
    "object_store",
    "own_postgres",
    "patient",
    "postgres",
    "proxied",
    "proxy",
]


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
    """The tiny Llama, converted. A server starts faster with it than with the unconverted base."""
    return resolve_base(str(tiny_base_dir), tiny_base_dir.parent)


@pytest.fixture(scope="session")
def tiny_base(converted_tiny: Path) -> BaseModel:
    """The tiny Llama, converted and loaded in fp32. Its tensors are shared: never write to them."""
    return load_base(converted_tiny)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Run torch in one thread: the fastest for tiny bases, and on busy cores for the real base, too."""
    torch.set_num_threads(1)
