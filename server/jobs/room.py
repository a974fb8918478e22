"""The bytes of a project's data and jobs, as they count against `max_bytes`.

From its submission to its end, a job counts as the most it may store: its rows, two checkpoints (a new one
is written before the old one is removed) and its result. Once it has ended, it counts with what is left of it: a
model of full fine-tuning, or an evaluation's findings. A published adapter counts as a version.
"""

from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from adapters.catalog.catalog import Catalog
from adapters.lora import BaseShape, ModuleKey
from adapters.merge_recipe import Recipe
from adapters.names import Viewpoint
from server.access.projects import quotas_in
from server.errors import Forbidden
from server.jobs.jobs import Job, Jobs
from server.storage.places import Storage
from server.system.messages import plural
from server.training.files import RowSources
from server.training.spec import JobSpec
from server.training.trained_rows import adapter_config

_FP32 = 4
_FILE_BYTES = 64 << 10  # of configurations, headers and counters
_MIN_BYTES = 12 << 10  # of a data set or a file: its record and folders take as much on a disk


def training_bytes(spec: JobSpec, shape: BaseShape, base_parameters: int) -> int:
    """Return the most bytes of a training's checkpoints and result together."""
    num_trained = num_stored = base_parameters
    if spec.method == "lora":
        per_rank = shape.num_layers * sum(sum(shape.features[name]) for name in spec.lora.target_modules)
        num_trained, num_stored = spec.lora.rank * per_rank, adapter_config(spec.lora).rank * per_rank
    copies = 3 if spec.training.eval_steps is None else 4  # the weights, AdamW's two moments, the best weights
    return _FP32 * (2 * copies * num_trained + num_stored) + _FILE_BYTES


def merge_bytes(ranks: Sequence[Mapping[ModuleKey, int]], recipe: Recipe, shape: BaseShape) -> int:
    """Return the most bytes of the result of a merge of adapters with these ranks by module."""
    largest: dict[ModuleKey, int] = {}
    for of_part in ranks:
        for key, rank in of_part.items():
            largest[key] = max(rank, largest.get(key, 0))
    features = shape.features
    num_stored = sum((recipe.rank or rank) * sum(features[key.module]) for key, rank in largest.items())
    return _FP32 * num_stored + _FILE_BYTES


def evaluation_bytes(row_bytes: int, num_adapters: int) -> int:
    """Return about the most bytes of an evaluation's checkpoints and findings.

    An adapter's answers are about as long as the rows, which take `row_bytes`.
    """
    return row_bytes * num_adapters + _FILE_BYTES


def stored_bytes(
    sources: RowSources, catalog: Catalog, jobs: Jobs, key_id: str | None = None, without: str | None = None
) -> int:
    """Return the bytes of a project's adapters, data sets, files and jobs, without the job `without`.

    If `key_id` is given, only what was created with this key counts. This does disk I/O, so it may block.
    """
    uploads = [d.stored_bytes for d in sources.datasets.list() if key_id in (None, d.key_id)]
    uploads += [file.bytes for file in sources.files.list() if key_id in (None, file.key_id)]
    return (
        sum(max(size, _MIN_BYTES) for size in uploads)
        + catalog.num_bytes(key_id)
        + jobs.num_bytes(key_id, without)
    )


def refuse_beyond(most: int, owner: str, stored: int, more: int) -> None:
    """Raise Forbidden if the owner, who stores `stored` bytes, has no room for `more` bytes."""
    if stored + more > most or stored >= most:
        raise Forbidden(
            f"the {owner} may store {plural(most, 'byte')}, has {stored} and would add {more}: delete adapters, "
            "data sets, files or ended jobs, cancel unfinished jobs, or ask for a larger max_bytes",
            reason="max_bytes",
        )


def require_room(engine: sa.Engine, storage: Storage, job: Job, num_bytes: int) -> None:
    """Raise Forbidden if the job's project or key has no room for a result of this size.

    The job reserved room when it was submitted, but its limits may have been lowered since.
    """
    viewpoint = Viewpoint(job.project, key_id=job.key_id)
    with engine.connect() as connection:
        of_project, of_key = quotas_in(connection, job.project, job.key_id)
    sources = RowSources.of(storage, job.project)
    catalog, jobs = Catalog(engine, of=viewpoint), Jobs(engine, of=viewpoint)
    for most, owner, key_id in (
        (of_project.max_bytes, f"project {job.project}", None),
        (of_key.max_bytes, f"key {job.key_id}", job.key_id),
    ):
        if most is not None:
            stored = stored_bytes(sources, catalog, jobs, key_id, without=job.id)
            refuse_beyond(most, owner, stored, num_bytes)
