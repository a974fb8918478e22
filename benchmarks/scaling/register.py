"""Registration of random adapters in a new HOME.

The adapters are published as a worker publishes them, not uploaded: an upload is limited to 256 MiB, and an
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
from benchmarks.scaling.loads import Adapter
from benchmarks.serving.adapter_files import Sizes, write_adapter
from server.database import connect
from server.model.base.weights import BaseModel
from server.storage.home import Home

SAY_EVERY = 50


def register(
    adapters: Sequence[Adapter], home: Path, base: BaseModel, sizes: Sizes, scratch: Path, say: Say
) -> None:
    """Publish the adapters in bf16, the base's dtype; delete each file once it is published."""
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
