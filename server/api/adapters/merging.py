"""From a checked composition with a method to a merge job in the queue, its parts pinned to versions.

Whatever can be refused is refused here. Until the job has ended, its parts' versions can't be deleted. Everything
blocks, on disk: call it in a thread.
"""

import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import asdict

from adapters.catalog.catalog import combine
from adapters.catalog.versions import Origin
from adapters.errors import FieldError, InvalidInput
from adapters.expression import parse
from adapters.library import Library
from adapters.lora import ModuleKey
from adapters.merging.merge import check
from adapters.merging.recipe import Method, Recipe
from adapters.pinned import Pinned
from server.api.adapters.composition_schemas import CompositionBody
from server.training.merge_spec import ORIGIN, MergeSpec
from server.training.queue.jobs import Job, Jobs

FIELD = "expression"
DEFAULT_DENSITY = 0.5
SEEDED: tuple[Method, ...] = ("dare_linear", "dare_ties")


def recipe_of(body: CompositionBody) -> Recipe | None:
    """How to merge; None for an exact sum. Raises InvalidInput on what the method, or its absence, rules out."""
    if body.method is None:
        given = [name for name in ("density", "seed", "rank") if getattr(body, name) is not None]
        if given:
            raise InvalidInput([FieldError((name,), "an exact sum has none: leave it out") for name in given])
        return None
    if body.seed is not None and body.method not in SEEDED:
        raise InvalidInput.of("seed", f"{body.method} draws nothing at random: leave it out")
    density = body.density
    if body.method == "svd":
        if density not in (None, 1):
            raise InvalidInput.of("density", "svd prunes nothing: leave it out")
        density = 1.0
    return Recipe(body.method, DEFAULT_DENSITY if density is None else density, body.seed or 0, body.rank)


def submit_merge(
    jobs: Jobs,
    library: Library,
    name: str,
    body: CompositionBody,
    recipe: Recipe,
    idempotency_key: str | None,
    require_room: Callable[[], None],
) -> Job:
    """Queue the job that makes the name's next version, or return the one that the key belongs to. `require_room`
    is called before a new one.

    Raises InvalidInput, NotFound (a part), Conflict (a composition has the name, or a part is of another base's
    shapes) or QueueFull.
    """
    library.check_name(name)
    digest = _digest(name, body)
    if (first := jobs.repeated(idempotency_key, digest)) is not None:
        return first
    require_room()
    # the parts' bytes are held until the job itself holds them
    pinned = library.pin(parse(body.expression, FIELD), FIELD)
    try:
        ranks = _ranks(library, pinned)
        check(ranks, recipe)
        num_modules = len({key for part in ranks for key in part})
        origin = Origin.of(library.catalog.version(part.name, part.version) for part in pinned.parts)
        return jobs.submit(
            MergeSpec(name, pinned.parts, recipe),
            job_id=f"job-{secrets.token_hex(8)}",
            data={"total_steps": num_modules, ORIGIN: asdict(origin)},
            idempotency_key=idempotency_key,
            body_digest=digest,
            warnings=pinned.warnings,
        )
    finally:
        pinned.release()


def _ranks(library: Library, pinned: Pinned) -> list[dict[ModuleKey, int]]:
    """Return the rank of each module of each part that counts."""
    weighted = combine(pinned.parts)
    if not weighted:
        message = "comes to nothing but the base: give adapters whose weights don't cancel out"
        raise InvalidInput.of(FIELD, message)
    return [library.ranks(digest) for digest, _ in weighted]


def _digest(name: str, body: CompositionBody) -> str:
    """Equal for requests that mean the same, and like no training's."""
    document = json.dumps({"composition": name, **body.model_dump(mode="json")}, sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()
