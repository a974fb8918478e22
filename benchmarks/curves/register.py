"""Random adapters in a HOME that no server has yet.

They are published as a worker publishes what it trained, not uploaded: an upload takes 256 MiB at most, and an
adapter of rank 512 is larger.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from adapters.catalog.catalog import Catalog
from adapters.catalog.records import Records
from adapters.library import Library
from adapters.store.store import AdapterStore
from benchmarks.command import Say
from benchmarks.curves.loads import Adapter
from benchmarks.serving.adapter_files import Sizes, write_adapter
from server.database import connect
from server.model.base.weights import BaseModel
from server.storage.home import Home

SAY_EVERY = 50


def register(
    adapters: Sequence[Adapter], home: Path, base: BaseModel, sizes: Sizes, scratch: Path, say: Say
) -> None:
    """Files are in bf16, as those of the base are, and each is deleted once it is published."""
    database = connect(home)
    try:
        stored = Home(home).adapters
        catalog = Catalog(database, Records(stored))
        library = Library(catalog, AdapterStore(stored), base.config.shape, base.name, base_digest=base.digest)
        for index, adapter in enumerate(adapters):
            if index % SAY_EVERY == 0:
                say(f"registering adapters: {index} of {len(adapters)}")
            seed = adapter.rank * 10_000 + adapter.index
            place = write_adapter(scratch / adapter.name, sizes, seed, torch.bfloat16, adapter.rank)
            config, weights = place / "adapter_config.json", place / "adapter_model.safetensors"
            library.publish(adapter.name, config.read_bytes(), weights)
            shutil.rmtree(place)
    finally:
        database.dispose()
