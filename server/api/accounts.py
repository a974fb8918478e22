"""The routes under /keys, /projects, /usage and /audit, and the background task that stores usage.

Except /usage, they are for operators, and for managers within the rules of `server.access.managers`.
"""

import asyncio
import logging
import re
from datetime import UTC, date, datetime
from functools import partial
from typing import Annotated, Self

from anyio import to_thread
from fastapi import APIRouter, Header, Path, Query, Request
from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from starlette.responses import Response

from adapters.errors import InvalidInput
from adapters.names import BASE, DEFAULT_PROJECT, MAX_NAME, NAME, NAME_RULE, is_name
from server.access.access import Access
from server.access.audit import Entry
from server.access.keys import ApiKey, KeyChanges
from server.access.managers import managed_project, manager_of
from server.access.principal import DEFAULT_SCOPES, SCOPES, Scope
from server.access.projects import Project
from server.access.usage import FLUSH_SECONDS, By
from server.api import wire
from server.api.authentication import PROJECT_HEADER
from server.api.deps import Services, ServicesDep
from server.api.openapi import ADMIN_CHANGES, ADMIN_LOOKUPS, ADMIN_READS, ADMIN_REMOVALS, KEY_CHANGES, READS
from server.api.pages import LINK, MAX_ALL, After, AllLimit, Limit, link, page_of
from server.api.routes import ADMIN, ANY, MANAGE, READ, requires
from server.api.schemas import Answer, LimitFields, Timestamp
from server.api.strict_route import StrictRoute
from server.jobs.jobs import refuse_with_uploads, retire_jobs
from server.storage.reserve import Reserve

_NAME = rf"^{NAME.pattern}$"
DateTime = Annotated[Timestamp, WithJsonSchema({"type": "string", "format": "date-time"})]


def _name(given: str) -> str:
    if not is_name(given):
        raise ValueError(NAME_RULE)
    return given


Expiry = Annotated[datetime, Field(strict=False)] | None
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
        description="created if it doesn't exist; default: the header OpenAI-Project, else "
        f"{DEFAULT_PROJECT}, or a manager's own",
    )
    scopes: list[Scope] = Field(list(DEFAULT_SCOPES), min_length=1, max_length=len(SCOPES))
    expires_at: Expiry = Field(None, description="with an offset from UTC")


class KeyPatch(LimitFields):
    """PATCH /keys/{key_id}: what is left out stays as it is."""

    name: Name = Field("", description="a label")
    scopes: list[Scope] = Field([], min_length=1, max_length=len(SCOPES))
    expires_at: Expiry = Field(None, description="with an offset from UTC; null: never")

    @property
    def changes(self) -> KeyChanges:
        given = self.model_fields_set
        changes = KeyChanges()
        if "name" in given:
            changes["name"] = self.name
        if "scopes" in given:
            changes["scopes"] = self.scopes
        if "expires_at" in given:
            changes["expires_at"] = _with_offset(self.expires_at)
        if limits := self.given_limits:
            changes["limits"] = limits
        return changes


class OwnKeyAnswer(Answer):
    """The key that a request was sent with."""

    id: str
    name: str
    project: str
    scopes: list[Scope]
    expires_at: DateTime | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_jobs: int | None
    max_bytes: int | None
    max_versions: int | None
    max_job_seconds: int | None
    allow_full: bool | None


class KeyAnswer(OwnKeyAnswer):
    """A key, as the managers of its project see it."""

    created_at: DateTime
    revoked_at: DateTime | None
    last_used_at: DateTime | None

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


class ProjectPatch(LimitFields):
    """PATCH /projects/{project}: limits that are left out stay as they are."""


class ProjectAnswer(Answer):
    name: str
    created_at: DateTime
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_jobs: int | None
    max_bytes: int | None
    max_versions: int | None
    max_job_seconds: int | None
    allow_full: bool | None

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
    next: str | None = Field(description="pass it as `after` for the next page")


class AuditEntry(Answer):
    number: int
    at: DateTime
    who: str = Field(
        description="a key's id, env-… for one of SMOLORA_API_KEYS, command-line, anonymous, unknown: wrong key; "
        "for a manager, operator instead of an operator's"
    )
    action: str
    project: str = Field(description="empty for attempts without a known key")
    target: str
    detail: dict[str, object]
    address: str | None = Field(description="of the client; null for commands and workers")
    request_id: str | None = Field(description="X-Request-Id of the answer")


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

KeyId = Annotated[str, Path(max_length=256)]


@keys_router.post(
    "",
    summary="Make a key",
    status_code=201,
    response_class=Response,
    responses={201: {"model": NewKeyAnswer, "description": "The key, and its secret, once"}, **ADMIN_CHANGES},
)
@requires(MANAGE, adds=True)
async def create_key(
    body: KeyBody,
    services: ServicesDep,
    at_work_in: Annotated[str | None, Header(alias=PROJECT_HEADER, description="the default of `project`")] = None,
) -> Response:
    """Make a key for a project. The answer has its secret, which is never shown again.

    Once a key exists, clients need one. With SMOLORA_ALLOW_ANONYMOUS=1, they can still generate and train without.
    A manager can make keys of its own project, with the scopes `generate`, `train` and `manage`, limits up to the
    project's, and an expiry up to its own. Keys with `manage` have no limits of their own: limit their project.
    """
    key, secret = await to_thread.run_sync(_create, services, body, at_work_in)
    return wire.answer(NewKeyAnswer.of(key, secret=secret), 201)


@keys_router.get(
    "",
    summary="List keys",
    response_class=Response,
    responses={200: {"model": KeyList, "headers": LINK}, **ADMIN_READS},
)
@requires(MANAGE, is_list=True)
async def list_keys(
    request: Request,
    services: ServicesDep,
    project: Annotated[str | None, Query(max_length=4 * MAX_NAME, description="only this project's keys")] = None,
    limit: AllLimit = MAX_ALL,
    after: After = None,
) -> Response:
    """List keys, oldest first, including revoked and expired ones. Secrets are not stored.

    A manager sees its own project's keys, without the operator's.
    """
    whose, manager = managed_project(services.principal, project), manager_of(services.principal)
    found = await to_thread.run_sync(services.access.keys.list, whose, manager)
    page, following = page_of(found, lambda key: key.id, limit, after)
    answer = KeyList(keys=[KeyAnswer.of(key) for key in page], next=following)
    return wire.answer(answer, headers=link(request, following))


@keys_router.get(
    "/self",
    summary="The key in use",
    response_class=Response,
    responses={200: {"model": OwnKeyAnswer}, **READS},
)
@requires(ANY)
async def get_own_key(services: ServicesDep) -> Response:
    """Get the name, project, scopes, expiry and limits of the key that the request was sent with.

    A key may have any scope for this. `project` is the one that the request acts for. Without a key, `id` is
    `anonymous` and `name` is empty. Keys of SMOLORA_API_KEYS have no name either.
    """
    who = services.principal
    key = services.access.ring.with_id(who.key_id)
    answer = OwnKeyAnswer.model_validate(
        {
            "id": who.key_id,
            "name": "" if key is None else key.name,
            "project": who.project,
            "scopes": [scope for scope in SCOPES if scope in who.scopes],
            "expires_at": None if key is None else key.expires_at,
            **vars(who.quota),
        }
    )
    return wire.answer(answer)


@keys_router.get(
    "/{key_id}",
    summary="One key",
    response_class=Response,
    responses={200: {"model": KeyAnswer}, **ADMIN_LOOKUPS},
)
@requires(MANAGE)
async def get_key(services: ServicesDep, key_id: KeyId) -> Response:
    """Get a key's scopes, limits and times."""
    manager = manager_of(services.principal)
    return wire.answer(KeyAnswer.of(await to_thread.run_sync(services.access.keys.get, key_id, manager)))


@keys_router.patch(
    "/{key_id}",
    summary="Change a key",
    response_class=Response,
    responses={200: {"model": KeyAnswer}, **KEY_CHANGES},
)
@requires(MANAGE)
async def change_key(services: ServicesDep, key_id: KeyId, body: KeyPatch) -> Response:
    """Change a key's name, scopes, expiry or limits, from its next request on. Fields that are left out stay.

    What a manager can give is as in POST /keys.
    """
    keys, who, manager = services.access.keys, services.principal.key_id, manager_of(services.principal)
    key = await to_thread.run_sync(lambda: keys.change(key_id, body.changes, who=who, manager=manager))
    return wire.answer(KeyAnswer.of(key))


@keys_router.delete(
    "/{key_id}",
    summary="Revoke a key",
    response_class=Response,
    responses={200: {"model": KeyAnswer}, **ADMIN_LOOKUPS},
)
@requires(MANAGE)
async def revoke_key(services: ServicesDep, key_id: KeyId) -> Response:
    """Revoke a key. Its open streams end at once. Repeating the request gives the same answer."""
    key = await to_thread.run_sync(_revoke, services, key_id)
    await services.access.ring.refresh()
    return wire.answer(KeyAnswer.of(key))


def _revoke(services: Services, key_id: str) -> ApiKey:
    """Revoke a key, even if the disk is full: requests with this key may have filled the disk."""
    reserve = Reserve(services.settings.home)
    who, manager = services.principal.key_id, manager_of(services.principal)
    key = reserve.spend_on(lambda: services.access.keys.revoke(key_id, who=who, manager=manager))
    reserve.fill()
    return key


def _create(services: Services, body: KeyBody, at_work_in: str | None) -> tuple[ApiKey, str]:
    if None not in (body.project, at_work_in) and body.project != at_work_in:
        raise InvalidInput.of("project", "contradicts the header OpenAI-Project: leave one of them out")
    manager = manager_of(services.principal)
    return services.access.keys.create(
        body.name,
        who=services.principal.key_id,
        project=body.project or at_work_in or (DEFAULT_PROJECT if manager is None else manager.project),
        scopes=body.scopes,
        expires_at=_with_offset(body.expires_at),
        quota=body.quota,
        manager=manager,
    )


def _with_offset(moment: datetime | None) -> datetime | None:
    if moment is not None and moment.tzinfo is None:
        raise InvalidInput.of("expires_at", "must have an offset from UTC, such as 2027-01-01T00:00:00Z")
    return moment


projects_router = APIRouter(prefix="/projects", tags=["access"], route_class=StrictRoute)

ProjectName = Annotated[str, Path(max_length=4 * MAX_NAME)]


@projects_router.get(
    "",
    summary="List projects",
    response_class=Response,
    responses={200: {"model": ProjectList, "headers": LINK}, **ADMIN_READS},
)
@requires(MANAGE, is_list=True)
async def list_projects(
    request: Request, services: ServicesDep, limit: AllLimit = MAX_ALL, after: After = None
) -> Response:
    """List projects by name. A project is created with its first key, or by setting its limits.

    A manager sees its own project.
    """
    whose = managed_project(services.principal, None)
    found = await to_thread.run_sync(services.access.projects.list)
    seen = [project for project in found if whose in (None, project.name)]
    page, following = page_of(seen, lambda project: project.name, limit, after)
    answer = ProjectList(projects=[ProjectAnswer.of(project) for project in page], next=following)
    return wire.answer(answer, headers=link(request, following))


@projects_router.get(
    "/{project}",
    summary="One project",
    response_class=Response,
    responses={200: {"model": ProjectAnswer}, **ADMIN_LOOKUPS},
)
@requires(MANAGE)
async def get_project(services: ServicesDep, project: ProjectName) -> Response:
    """Get a project's limits."""
    managed_project(services.principal, project)
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


@projects_router.patch(
    "/{project}",
    summary="Change a project's limits",
    response_class=Response,
    responses={200: {"model": ProjectAnswer}, **ADMIN_LOOKUPS, **ADMIN_CHANGES},
)
@requires(MANAGE)
async def change_project(services: ServicesDep, project: ProjectName, body: ProjectPatch) -> Response:
    """Change some of a project's limits. Fields that are left out stay.

    A manager can set its project's limits up to the operator's; null restores the operator's limit.
    """
    managed_project(services.principal, project)
    projects, who, manager = services.access.projects, services.principal.key_id, manager_of(services.principal)
    limits = body.given_limits
    found = await to_thread.run_sync(lambda: projects.change(project, limits, who=who, manager=manager))
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

    Its keys are revoked. Jobs that have ended, usage and audit entries stay for the operator, as those of the
    project that the audit entry `project.delete` names in `detail.history`. A new project of this name starts
    empty.
    """
    await to_thread.run_sync(_delete_project, services, project)
    await services.access.ring.refresh()
    return Response(status_code=204)


def _delete_project(services: Services, project: str) -> None:
    access = services.access
    access.ledger.try_to_flush()  # else the rest of its usage would be a new project's of its name
    refuse = partial(refuse_with_uploads, services.storage, services.jobs, project)
    access.projects.delete(project, refuse, retire_jobs, services.storage.records(), who=services.principal.key_id)


usage_router = APIRouter(tags=["access"])


def _iso_day(given: object) -> object:
    """Refuse dates not written as YYYY-MM-DD: pydantic also accepts seconds since 1970, and times at midnight."""
    if isinstance(given, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", given) is None:
        raise ValueError("must be a day, such as 2027-01-31")
    return given


Day = Annotated[date | None, BeforeValidator(_iso_day)]


def _iso_moment(given: object) -> object:
    """Parse a day, which begins at midnight in UTC, or a time with an offset. Refuse other forms."""
    try:
        found = datetime.fromisoformat(str(given))
        if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", str(given)):
            return found.replace(tzinfo=UTC)
        if found.tzinfo is not None:
            return found.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise ValueError("must be a day, such as 2027-01-31, or a time with an offset, such as 2027-01-31T12:00:00Z")


Moment = Annotated[
    datetime | None, BeforeValidator(_iso_moment), WithJsonSchema({"type": "string", "format": "date-time"})
]


@usage_router.get(
    "/usage",
    summary="Usage",
    response_class=Response,
    responses={200: {"model": UsageAnswer, "headers": LINK}, **READS},
)
@requires(READ | MANAGE, is_list=True)
async def get_usage(
    request: Request,
    services: ServicesDep,
    first: Annotated[Day, Query(alias="from", description="a day in UTC, included")] = None,
    to: Annotated[Day, Query(description="a day in UTC, included")] = None,
    by: Annotated[By | None, Query(description="return a row for each; default: one row for all")] = None,
    limit: AllLimit = MAX_ALL,
    after: Annotated[str | None, Query(max_length=4096, description="`next` of the previous page")] = None,
) -> Response:
    """Sum usage: tokens of answers as in their `usage`, and tokens and time of jobs that have ended.

    A key sees its own project's usage; an operator's key sees all. An answer is counted within a second after
    its end.
    """
    if first is not None and to is not None and to < first:
        raise InvalidInput.of("to", "must not be before from")
    rows = await to_thread.run_sync(_rows, services, first, to, by)
    page, following = page_of(rows, lambda row: "" if by is None else str(getattr(row, by)), limit, after)
    return wire.answer(UsageAnswer(rows=list(page), next=following), headers=link(request, following))


@usage_router.get(
    "/audit",
    summary="Audit list",
    response_class=Response,
    responses={200: {"model": AuditList, "headers": LINK}, **ADMIN_READS},
)
@requires(MANAGE, is_list=True)
async def get_audit(
    request: Request,
    services: ServicesDep,
    project: Annotated[str | None, Query(max_length=4 * MAX_NAME, description="only this project's")] = None,
    who: Annotated[str | None, Query(max_length=256, description="only what this key did")] = None,
    action: Annotated[str | None, Query(max_length=64, description="only this action, such as job.cancel")] = None,
    since: Annotated[
        Moment, Query(alias="from", description="only from then on: a day in UTC, or a time with an offset")
    ] = None,
    limit: Limit = 100,
    after: Annotated[int | None, Query(ge=0, lt=1 << 53, description="`next` of the previous page")] = None,
) -> Response:
    """List who did what, and when, by which request and from which address; newest first.

    The list has changes of keys and limits, uploads, downloads, imports, compositions, aliases, visibility,
    deletions, jobs that were submitted, paused, resumed, cancelled and published, and attempts refused with 401 or
    403. A manager sees its own project's entries, without those about the operator's keys. What the operator did
    has `operator` as `who`, and no address and request id.
    """
    access, whose = services.access, managed_project(services.principal, project)
    is_managers = manager_of(services.principal) is not None

    def listed() -> list[Entry]:
        hidden = access.keys.operators() if is_managers else None
        return access.audit.list(
            limit + 1, after, project=whose, who=who, action=action, since=since, hidden=hidden
        )

    found = await to_thread.run_sync(listed)
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
