"""The routes under /keys, /projects, /usage and /audit, and the background task that stores usage.

All of these routes except /usage are for operators only.
"""

import asyncio
import logging
import re
from datetime import date, datetime
from functools import partial
from typing import Annotated, Self

from anyio import to_thread
from fastapi import APIRouter, Header, Path, Query, Request
from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from starlette.responses import Response

from adapters.errors import InvalidInput
from adapters.names import BASE, DEFAULT_PROJECT, MAX_NAME, NAME, NAME_RULE, is_name
from server.access.access import Access
from server.access.keys import ApiKey
from server.access.principal import DEFAULT_SCOPES, Scope
from server.access.projects import Project
from server.access.usage import FLUSH_SECONDS, By
from server.api import wire
from server.api.authentication import PROJECT_HEADER
from server.api.deps import Services, ServicesDep
from server.api.openapi import ADMIN_CHANGES, ADMIN_LOOKUPS, ADMIN_READS, ADMIN_REMOVALS, READS
from server.api.pages import LINK, MAX_ALL, After, AllLimit, Limit, link, page_of
from server.api.routes import ADMIN, READ, requires
from server.api.schemas import Answer, LimitFields, Timestamp
from server.api.strict_route import StrictRoute
from server.jobs.jobs import refuse_with_uploads
from server.storage.reserve import Reserve

_NAME = rf"^{NAME.pattern}$"
DateTime = Annotated[Timestamp, WithJsonSchema({"type": "string", "format": "date-time"})]


def _name(given: str) -> str:
    if not is_name(given):
        raise ValueError(NAME_RULE)
    return given


Name = Annotated[
    str,
    AfterValidator(_name),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_NAME, "pattern": _NAME}),
]


class KeyBody(LimitFields):
    """POST /keys."""

    name: Name = Field(description="a label")
    project: Name | None = Field(
        None,
        description=f"created if it doesn't exist; default: the header OpenAI-Project, else {DEFAULT_PROJECT}",
    )
    scopes: list[Scope] = Field(list(DEFAULT_SCOPES), min_length=1, max_length=4)
    expires_at: Annotated[datetime, Field(strict=False)] | None = Field(
        None, description="with an offset from UTC"
    )


class KeyAnswer(Answer):
    id: str
    name: str
    project: str
    scopes: list[Scope]
    created_at: DateTime
    expires_at: DateTime | None
    revoked_at: DateTime | None
    last_used_at: DateTime | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_jobs: int | None
    max_bytes: int | None

    @classmethod
    def of(cls, key: ApiKey, **more: object) -> Self:
        """Return the description of a key. `more` has the values of the fields that a subclass adds."""
        return cls.model_validate({**vars(key), **vars(key.quota), **more})


class NewKeyAnswer(KeyAnswer):
    secret: str = Field(description="shown only once: the server stores its digest")


class KeyList(Answer):
    keys: list[KeyAnswer]
    next: str | None = Field(description="pass it as `after` for the next page")


class ProjectBody(LimitFields):
    """PUT /projects/{project}: new limits, which replace all earlier ones."""


class ProjectAnswer(Answer):
    name: str
    created_at: DateTime
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_jobs: int | None
    max_bytes: int | None

    @classmethod
    def of(cls, project: Project) -> Self:
        """Describe a project."""
        return cls(**vars(project), **vars(project.quota))


class ProjectList(Answer):
    projects: list[ProjectAnswer]
    next: str | None = Field(description="pass it as `after` for the next page")


class UsageRow(Answer):
    """Sums of usage, with the field that `by` names, if any."""

    project: str | None = None
    key: str | None = None
    adapter: str | None = None
    day: date | None = None
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    trained_tokens: int
    job_seconds: float


class UsageAnswer(Answer):
    rows: list[UsageRow]


class AuditEntry(Answer):
    number: int
    at: DateTime
    who: str = Field(description="a key's id, or command-line, anonymous, or env-… for one of SMOLORA_API_KEYS")
    action: str
    project: str
    target: str
    detail: dict[str, object]


class AuditList(Answer):
    entries: list[AuditEntry]
    next: int | None = Field(description="pass it as `after` for older entries")


log = logging.getLogger("smolora.access")


async def keep_books(access: Access, interval: float = FLUSH_SECONDS) -> None:
    """Store usage every `interval` seconds, until cancelled."""
    while True:
        await asyncio.sleep(interval)
        await keep_now(access)


async def keep_now(access: Access) -> None:
    """Store the usage once. If the disk or the database fails, keep the usage in memory for the next call."""
    used = access.ring.take_used()
    try:
        await to_thread.run_sync(access.keep, used)
    except Exception as error:
        access.ring.give_back(used)
        log.error("can't store usage: %s", type(error).__name__)


keys_router = APIRouter(prefix="/keys", tags=["access"], route_class=StrictRoute)


@keys_router.post(
    "",
    summary="Make a key",
    status_code=201,
    response_class=Response,
    responses={201: {"model": NewKeyAnswer, "description": "The key, and its secret, once"}, **ADMIN_CHANGES},
)
@requires(ADMIN, adds=True)
async def create_key(
    body: KeyBody,
    services: ServicesDep,
    at_work_in: Annotated[str | None, Header(alias=PROJECT_HEADER, description="the default of `project`")] = None,
) -> Response:
    """Make a key for a project. The answer has its secret, which is never shown again.

    Once a key exists, clients need one. With SMOLORA_ALLOW_ANONYMOUS=1, they can still generate and train without.
    """
    key, secret = await to_thread.run_sync(_create, services, body, at_work_in)
    return wire.answer(NewKeyAnswer.of(key, secret=secret), 201)


@keys_router.get(
    "",
    summary="List keys",
    response_class=Response,
    responses={200: {"model": KeyList, "headers": LINK}, **ADMIN_READS},
)
@requires(ADMIN)
async def list_keys(
    request: Request,
    services: ServicesDep,
    project: Annotated[str | None, Query(max_length=4 * MAX_NAME, description="only this project's keys")] = None,
    limit: AllLimit = MAX_ALL,
    after: After = None,
) -> Response:
    """List keys, oldest first, including revoked and expired ones. Secrets are not stored."""
    found = await to_thread.run_sync(services.access.keys.list, project)
    page, following = page_of(found, lambda key: key.id, limit, after)
    answer = KeyList(keys=[KeyAnswer.of(key) for key in page], next=following)
    return wire.answer(answer, headers=link(request, following))


@keys_router.delete(
    "/{key_id}",
    summary="Revoke a key",
    response_class=Response,
    responses={200: {"model": KeyAnswer}, **ADMIN_LOOKUPS},
)
@requires(ADMIN)
async def revoke_key(services: ServicesDep, key_id: Annotated[str, Path(max_length=256)]) -> Response:
    """Revoke a key. Its open streams end at once. Repeating the request gives the same answer."""
    key = await to_thread.run_sync(_revoke, services, key_id)
    await services.access.ring.refresh()
    return wire.answer(KeyAnswer.of(key))


def _revoke(services: Services, key_id: str) -> ApiKey:
    """Revoke a key, even if the disk is full: requests with this key may have filled the disk."""
    reserve = Reserve(services.settings.home)
    key = reserve.spend_on(lambda: services.access.keys.revoke(key_id, who=services.principal.key_id))
    reserve.fill()
    return key


def _create(services: Services, body: KeyBody, at_work_in: str | None) -> tuple[ApiKey, str]:
    if None not in (body.project, at_work_in) and body.project != at_work_in:
        raise InvalidInput.of("project", "contradicts the header OpenAI-Project: leave one of them out")
    if body.expires_at is not None and body.expires_at.tzinfo is None:
        raise InvalidInput.of("expires_at", "must have an offset from UTC, such as 2027-01-01T00:00:00Z")
    return services.access.keys.create(
        body.name,
        who=services.principal.key_id,
        project=body.project or at_work_in or DEFAULT_PROJECT,
        scopes=body.scopes,
        expires_at=body.expires_at,
        quota=body.quota,
    )


projects_router = APIRouter(prefix="/projects", tags=["access"], route_class=StrictRoute)

ProjectName = Annotated[str, Path(max_length=4 * MAX_NAME)]


@projects_router.get(
    "",
    summary="List projects",
    response_class=Response,
    responses={200: {"model": ProjectList, "headers": LINK}, **ADMIN_READS},
)
@requires(ADMIN)
async def list_projects(
    request: Request, services: ServicesDep, limit: AllLimit = MAX_ALL, after: After = None
) -> Response:
    """List projects by name. A project is created with its first key, or by setting its limits."""
    found = await to_thread.run_sync(services.access.projects.list)
    page, following = page_of(found, lambda project: project.name, limit, after)
    answer = ProjectList(projects=[ProjectAnswer.of(project) for project in page], next=following)
    return wire.answer(answer, headers=link(request, following))


@projects_router.get(
    "/{project}",
    summary="One project",
    response_class=Response,
    responses={200: {"model": ProjectAnswer}, **ADMIN_LOOKUPS},
)
@requires(ADMIN)
async def get_project(services: ServicesDep, project: ProjectName) -> Response:
    """Get a project's limits."""
    return wire.answer(ProjectAnswer.of(await to_thread.run_sync(services.access.projects.get, project)))


@projects_router.put(
    "/{project}",
    summary="Limit a project",
    response_class=Response,
    responses={200: {"model": ProjectAnswer}, **ADMIN_CHANGES},
)
@requires(ADMIN)
async def put_project(services: ServicesDep, project: ProjectName, body: ProjectBody) -> Response:
    """Set a project's limits, which apply to all its keys together. Create the project if it doesn't exist.

    They replace all earlier limits: a field that is left out means no limit.
    """
    access, who = services.access, services.principal.key_id
    found = await to_thread.run_sync(lambda: access.projects.put(project, body.quota, who=who))
    return wire.answer(ProjectAnswer.of(found))


@projects_router.delete(
    "/{project}",
    summary="Delete a project",
    status_code=204,
    response_class=Response,
    responses=ADMIN_REMOVALS,
)
@requires(ADMIN)
async def delete_project(services: ServicesDep, project: ProjectName) -> Response:
    """Delete a project that is empty: without adapters, data sets, files and unfinished jobs.

    Its keys are revoked. Jobs that have ended, usage and audit entries stay.
    """
    access, who = services.access, services.principal.key_id
    refuse = partial(refuse_with_uploads, services.storage, services.jobs, project)
    await to_thread.run_sync(lambda: access.projects.delete(project, refuse, who=who))
    await access.ring.refresh()
    return Response(status_code=204)


usage_router = APIRouter(tags=["access"])


def _iso_day(given: object) -> object:
    """Refuse dates not written as YYYY-MM-DD: pydantic also accepts seconds since 1970, and times at midnight."""
    if isinstance(given, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", given) is None:
        raise ValueError("must be a day, such as 2027-01-31")
    return given


Day = Annotated[date | None, BeforeValidator(_iso_day)]


@usage_router.get(
    "/usage", summary="Usage", response_class=Response, responses={200: {"model": UsageAnswer}, **READS}
)
@requires(READ)
async def get_usage(
    services: ServicesDep,
    first: Annotated[Day, Query(alias="from", description="a day in UTC, included")] = None,
    to: Annotated[Day, Query(description="a day in UTC, included")] = None,
    by: Annotated[By | None, Query(description="return a row for each; default: one row for all")] = None,
) -> Response:
    """Sum usage: tokens of answers as in their `usage`, and tokens and time of jobs that have ended.

    A key sees its own project's usage; an operator's key sees all. An answer is counted within a second after
    its end.
    """
    if first is not None and to is not None and to < first:
        raise InvalidInput.of("to", "must not be before from")
    return wire.answer(UsageAnswer(rows=await to_thread.run_sync(_rows, services, first, to, by)))


@usage_router.get(
    "/audit",
    summary="Audit list",
    response_class=Response,
    responses={200: {"model": AuditList, "headers": LINK}, **ADMIN_READS},
)
@requires(ADMIN)
async def get_audit(
    request: Request,
    services: ServicesDep,
    limit: Limit = 100,
    after: Annotated[int | None, Query(ge=0, lt=1 << 53, description="`next` of the previous page")] = None,
) -> Response:
    """List who made and revoked keys, set limits, visibility and aliases, and deleted things; newest first.

    Versions that a job publishes, and aliases that it sets, are in the job's record instead.
    """
    found = await to_thread.run_sync(services.access.audit.list, limit + 1, after)
    page = [AuditEntry.model_validate(entry) for entry in found[:limit]]
    following = found[limit - 1].number if len(found) > limit else None
    return wire.answer(AuditList(entries=page, next=following), headers=link(request, following))


def _rows(services: Services, first: date | None, to: date | None, by: By | None) -> list[UsageRow]:
    services.access.ledger.try_to_flush()  # if the disk is full, the stored usage is still returned
    principal = services.principal
    whose = None if principal.sees_all else principal.project
    rows = services.access.ledger.rows(first, to, () if by is None else (by,), whose)
    if by == "adapter":
        rows = [{**row, "adapter": _shown(services, row["adapter"])} for row in rows]
    return [UsageRow.model_validate(row) for row in rows]


def _shown(services: Services, adapter: object) -> str:
    """Return a ledger row's `adapter`, with the caller's names for adapters instead of their catalog keys."""
    shown = services.principal.viewpoint.shown
    return "+".join(name if name == BASE else shown(name) for name in str(adapter).split("+"))
