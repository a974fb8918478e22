"""POST /compositions/{name}: name a weighted sum of adapters, or queue a job to merge them into one adapter.

A merge job's parts are pinned to versions, which can't be deleted until the job has ended.
"""

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Path
from pydantic import BeforeValidator, ConfigDict, Field
from starlette.responses import Response

from adapters.catalog.catalog import Version, combine
from adapters.catalog.versions import Origin, Part, gather
from adapters.errors import FieldError, InvalidInput, NotFound
from adapters.expression import MAX_LENGTH, Term, parse
from adapters.library import Library, Pinned
from adapters.lora import ModuleKey
from adapters.merge import check
from adapters.merge_recipe import MergeMethod, Recipe
from adapters.names import MAX_NAME
from server.api import wire
from server.api.adapters import VersionAnswer
from server.api.deps import IdempotencyKey, Services, ServicesDep
from server.api.openapi import COMPOSITIONS
from server.api.quotas import room_for_job
from server.api.routes import READ, TRAIN, requires
from server.api.schemas import MAX_SEED, Body
from server.api.strict_route import StrictRoute
from server.api.submission import Room
from server.api.train_answers import JobAnswer
from server.api.train_schemas import MAX_TRAINED_RANK
from server.jobs.evaluate_spec import EvaluateSpec
from server.jobs.jobs import Job, Jobs, Status
from server.jobs.merge_spec import ORIGIN, MergeSpec
from server.jobs.room import merge_bytes


def _method(value: object) -> object:
    """Refuse PEFT's names of the exact sum. Raise ValueError."""
    if value in ("linear", "cat"):
        raise ValueError("leave it out for the exact sum, or give svd and the sum of the ranks to store it")
    return value


class CompositionBody(Body):
    """POST /compositions/{name}."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"expression": "tweets*0.7+movies@2*0.3"},
                {"expression": "tweets*0.7+movies@2*0.3", "method": "ties", "density": 0.5},
                {"expression": "tweets+movies", "method": "svd", "rank": 16},
            ]
        }
    )

    expression: str = Field(
        max_length=MAX_LENGTH,
        description="an adapter expression; its adapters are pinned to their current versions",
    )
    evaluation: str | None = Field(
        None,
        max_length=64,
        description="id of an evaluation that measured these versions and weights: its results are stored with "
        "the composition. Not with a `method`",
    )
    method: Annotated[MergeMethod | None, BeforeValidator(_method)] = Field(
        None,
        description="queue a job that merges the parts into a new adapter; null: name the exact sum instead",
    )
    density: float | None = Field(
        None, gt=0, le=1, description="share of entries that a merge keeps; null: 0.5, or all with svd"
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="only for dare_linear and dare_ties; null: 0")
    rank: int | None = Field(
        None,
        ge=1,
        le=MAX_TRAINED_RANK,
        description="rank of the new adapter: the products B·A are merged and factored again; null: A and B are "
        "merged separately, which needs parts of equal rank (svd: the largest rank of the parts)",
    )


FIELD = "expression"
DEFAULT_DENSITY = 0.5
SEEDED: tuple[MergeMethod, ...] = ("dare_linear", "dare_ties")


def recipe_of(body: CompositionBody) -> Recipe | None:
    """Return the settings of the merge, or None if the body asks for an exact sum instead.

    Raise InvalidInput if fields are given that don't apply to the method.
    """
    if body.method is None:
        given = [name for name in ("density", "seed", "rank") if getattr(body, name) is not None]
        if given:
            raise InvalidInput(
                [FieldError((name,), "is only for merges: leave it out, or set method") for name in given]
            )
        return None
    if body.evaluation is not None:
        raise InvalidInput.of("evaluation", "a merge isn't what was measured: leave it out")
    if body.seed is not None and body.method not in SEEDED:
        raise InvalidInput.of("seed", f"{body.method} isn't random: leave it out")
    density = body.density
    if body.method == "svd":
        if density not in (None, 1):
            raise InvalidInput.of("density", "svd keeps all entries: leave it out")
        density = 1.0
    return Recipe(body.method, DEFAULT_DENSITY if density is None else density, body.seed or 0, body.rank)


def submit_merge(
    jobs: Jobs,
    library: Library,
    name: str,
    body: CompositionBody,
    recipe: Recipe,
    idempotency_key: str | None,
    room: Room,
) -> Job:
    """Queue a job that merges adapters into a new version of `name`.

    If there is a job with the same idempotency key already, return that job. `room` is as in `Submissions.submit`.
    This does disk I/O, so call it in a thread. Raise InvalidInput if the body is invalid, NotFound if an adapter
    doesn't exist, Conflict if `name` is a composition or an adapter doesn't fit the base model's shapes, QueueFull
    if too many jobs haven't ended, and LimitReached if there are too many versions.
    """
    library.check_name(name)
    digest = _digest(name, body)
    if (first := jobs.repeated(idempotency_key, digest)) is not None:
        return first
    library.catalog.check_limits(name)
    with room(0):
        pass
    # the parts' bytes are pinned here until the job itself pins them
    pinned = library.pin(parse(body.expression, FIELD), FIELD)
    try:
        ranks = _ranks(library, pinned)
        check(ranks, recipe)
        num_modules = len({key for part in ranks for key in part})
        origin = Origin.of(library.catalog.version(part.name, part.version) for part in pinned.parts)
        num_bytes = merge_bytes(ranks, recipe, library.shape)
        with room(num_bytes):
            return jobs.submit(
                MergeSpec(name, pinned.parts, recipe),
                job_id=f"job-{secrets.token_hex(8)}",
                data={"total_steps": num_modules, ORIGIN: asdict(origin)},
                idempotency_key=idempotency_key,
                body_digest=digest,
                warnings=pinned.warnings,
                num_bytes=num_bytes,
            )
    finally:
        pinned.release()


def _ranks(library: Library, pinned: Pinned) -> list[dict[ModuleKey, int]]:
    """Return the ranks by module of each adapter, except adapters whose weights add up to 0.

    Raise InvalidInput if no adapter is left.
    """
    weighted = combine(pinned.parts)
    if not weighted:
        message = "its weights cancel out, which leaves the base alone"
        raise InvalidInput.of(FIELD, message)
    return [library.ranks(digest) for digest, _ in weighted]


def _digest(name: str, body: CompositionBody) -> str:
    """Return a digest that is equal for requests with the same meaning, but unequal to any training request's."""
    document = json.dumps({"composition": name, **body.model_dump(mode="json")}, sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()


def _results(services: Services, job_id: str, parts: Sequence[Part]) -> dict[str, object]:
    """Return what an evaluation found for these parts. Raise InvalidInput if it has nothing for them."""
    try:
        job = services.jobs.get(job_id)
    except NotFound:
        job = None
    if job is None or not isinstance(job.spec, EvaluateSpec):
        raise InvalidInput.of("evaluation", f"there is no evaluation {job_id}: GET /evaluate lists them")
    if job.status is not Status.SUCCEEDED:
        raise InvalidInput.of("evaluation", f"it is {job.status.value}: wait until it has succeeded")
    same = (one.expression for one in job.spec.adapters if set(gather(one.parts)) == set(parts))
    if (expression := next(same, None)) is None:
        raise InvalidInput.of("evaluation", "it measured other versions or weights: evaluate these first")
    found = (services.jobs.report(job_id) or {}).get("results")
    results = [one for one in found if one["adapter"] == expression] if isinstance(found, list) else []
    return {"id": job_id, "results": results}


def _compose(services: Services, name: str, terms: Sequence[Term], evaluation: str | None) -> tuple[Version, bool]:
    def measured(parts: Sequence[Part]) -> dict[str, object] | None:
        return None if evaluation is None else _results(services, evaluation, parts)

    version, is_new = services.library.compose(name, terms, FIELD, measured)
    if is_new:
        services.audit("adapter.compose", f"{name}@{version.version}", {"parts": version.parent})
    return version, is_new


router = APIRouter(prefix="/compositions", tags=["adapters"], route_class=StrictRoute)


@router.get("", include_in_schema=False)
@requires(READ)
async def list_compositions() -> Response:
    """Raise NotFound with a pointer to GET /adapters."""
    raise NotFound("compositions are listed with the adapters: GET /adapters")


@router.post(
    "/{name}",
    summary="Name a composition",
    status_code=201,
    response_class=Response,
    responses={
        200: {
            "model": VersionAnswer,
            "description": "The latest version, which is the same",
        },
        201: {"model": VersionAnswer, "description": "The composition's next version"},
        202: {"model": JobAnswer, "description": "With a `method`: the job that merges; `Location` has its path"},
        **COMPOSITIONS,
    },
)
@requires(TRAIN)
async def compose(
    services: ServicesDep,
    name: Annotated[str, Path(max_length=4 * MAX_NAME)],
    body: CompositionBody,
    key: IdempotencyKey = None,
) -> Response:
    """Store an adapter expression under a name, pinned to the versions that it means now.

    The name then works wherever an adapter's name does. Compositions in the expression are replaced by their
    parts, and no part can be deleted before the composition. If the latest version already has the same parts and
    weights, no new one is made, and the status is 200. With a `method`, a job merges the parts instead, and
    publishes the result as the next version of the adapter `name`. Only such a request may have an
    Idempotency-Key.
    """
    if (recipe := recipe_of(body)) is not None:
        room = partial(room_for_job, services)
        given = (services.jobs, services.library, name, body, recipe, key, room)
        job = await services.limiters.merging.run(services.principal.project, submit_merge, *given)
        return wire.answer(JobAnswer.of(job), 202, {"Location": f"/train/{job.id}"})
    if key is not None:
        raise InvalidInput.of("Idempotency-Key", "is only for merges: leave it out, or set method")
    terms = parse(body.expression, FIELD)
    version, is_new = await to_thread.run_sync(_compose, services, name, terms, body.evaluation)
    headers = {"Location": f"/adapters/{version.name}/{version.version}"}
    answer = VersionAnswer.of(version, services.engine.stats.resident)
    return wire.answer(answer, 201 if is_new else 200, headers)
