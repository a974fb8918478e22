"""Adapters of a tiny base in a store and a catalog, and merge jobs that name them."""

from collections.abc import Mapping, Sequence

import torch

from adapters.catalog.catalog import Catalog, Part, Version
from adapters.catalog.versions import Origin
from adapters.expression import parse
from adapters.library import Library
from adapters.lora import MODULES, BaseShape, LoraConfig, LoraModule, LoraWeights, ModuleKey
from adapters.merge_recipe import Recipe
from adapters.peft.files import PeftAdapter
from adapters.store.store import AdapterStore
from server.jobs.leases import Claim, Leases
from server.jobs.merge_job import run_merge
from server.jobs.merge_spec import MergeSpec
from server.model.base.weights import BaseModel
from server.training.run import Reporter


def sample(
    shape: BaseShape, seed: int, rank: int = 4, alpha: float = 8.0, names: tuple[str, ...] = MODULES
) -> PeftAdapter:
    """Return random weights that change a tiny base's answers."""
    config = LoraConfig(rank, alpha, names)
    generator = torch.Generator().manual_seed(seed)
    modules: dict[ModuleKey, LoraModule] = {}
    for layer in range(shape.num_layers):
        for name in names:
            num_out, num_in = shape.features[name]
            key = ModuleKey(layer, name)
            a = torch.randn(rank, num_in, generator=generator) / num_in**0.5
            b = torch.randn(num_out, rank, generator=generator) / rank**0.5
            modules[key] = LoraModule(a, b, config.scaling_of(key))
    return PeftAdapter(config, LoraWeights(modules), "tiny-llama")


def library_of(catalog: Catalog, store: AdapterStore, base: BaseModel) -> Library:
    """Return the library of a worker with that base."""
    return Library(catalog, store, base.config.shape, base.name, base_digest=base.digest)


def publish(
    catalog: Catalog,
    store: AdapterStore,
    name: str,
    adapter: PeftAdapter,
    base_digest: str | None = None,
    warnings: Sequence[str] = (),
) -> Version:
    """Publish the adapter as the name's next version, made on the base of that digest."""
    return catalog.publish(
        name,
        digest=adapter.weights.digest,
        bytes=store.put(adapter),
        rank=adapter.config.rank,
        alpha=adapter.config.alpha,
        target_modules=adapter.weights.target_modules,
        parameters=adapter.weights.num_parameters,
        base_model=adapter.base_model,
        base_digest=base_digest,
        warnings=warnings,
    )


def merge_spec(catalog: Catalog, expression: str, recipe: Recipe, name: str = "merged") -> MergeSpec:
    """Return the job that POST /compositions/{name} would queue."""
    return MergeSpec(name, catalog.resolve(parse(expression)), recipe)


def origin_of(catalog: Catalog, spec: MergeSpec) -> Origin:
    """Return the common base of the job's parts, which are all in the catalog."""
    return Origin.of(catalog.version(part.name, part.version) for part in spec.parts)


def merge_now(
    spec: MergeSpec, claim: Claim, leases: Leases, library: Library, base: BaseModel, reporter: Reporter
) -> None:
    """Run a merge whose parts are all in the catalog."""
    run_merge(spec, claim, leases, library, base, reporter, origin_of(library.catalog, spec))


def spec_of(parts: Mapping[str, float], recipe: Recipe) -> MergeSpec:
    """Return a job whose parts don't exist: version 1 of each name."""
    return MergeSpec("merged", tuple(Part(name, 1, name * 64, weight) for name, weight in parts.items()), recipe)
