"""/usage and /audit: what was used, and what was done."""

import re
from datetime import date
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query
from pydantic import BeforeValidator
from starlette.responses import Response

from adapters.errors import InvalidInput
from adapters.names import BASE
from server.access.audit import Entry
from server.access.usage import By
from server.api import wire
from server.api.accounts.schemas import AuditList, UsageAnswer
from server.api.deps import Services, ServicesDep
from server.api.openapi import ADMIN_READS, READS
from server.api.routes import ADMIN, READ, requires

router = APIRouter(tags=["access"])

MAX_PAGE = 1000


def _iso_day(given: object) -> object:
    """Refuse what `date` also takes: seconds since 1970, and times of midnight."""
    if isinstance(given, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", given) is None:
        raise ValueError("must be a day, such as 2027-01-31")
    return given


Day = Annotated[date | None, BeforeValidator(_iso_day)]


@router.get("/usage", summary="Usage", response_class=Response, responses={200: {"model": UsageAnswer}, **READS})
@requires(READ)
async def get_usage(
    services: ServicesDep,
    first: Annotated[Day, Query(alias="from", description="a day in UTC, included")] = None,
    to: Annotated[Day, Query(description="a day in UTC, included")] = None,
    by: Annotated[By | None, Query(description="a row for each; else one for all")] = None,
) -> Response:
    """Sums of what was used: answers as their `usage` had it, and what jobs came to that have ended.

    A key sees its own project's; the operator's sees all. An answer is counted within a second of its end.
    """
    if first is not None and to is not None and to < first:
        raise InvalidInput.of("to", "must not be before from")
    return wire.answer({"rows": await to_thread.run_sync(_rows, services, first, to, by)})


@router.get(
    "/audit", summary="Audit list", response_class=Response, responses={200: {"model": AuditList}, **ADMIN_READS}
)
@requires(ADMIN)
async def get_audit(
    services: ServicesDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="of a page")] = 100,
    before: Annotated[int | None, Query(ge=0, lt=1 << 53, description="the `next` of the page before")] = None,
) -> Response:
    """List who made and revoked keys, set limits, visibility and aliases, and deleted things; the newest first.

    What a job publishes, and the alias that it sets with it, its own record has.
    """
    found = await to_thread.run_sync(services.access.audit.list, limit + 1, before)
    page = [_entry(entry) for entry in found[:limit]]
    return wire.answer({"entries": page, "next": found[limit - 1].number if len(found) > limit else None})


def _rows(services: Services, first: date | None, to: date | None, by: By | None) -> list[dict[str, object]]:
    services.access.ledger.try_to_flush()  # on a full disk, say, what is stored is told all the same
    principal = services.principal
    whose = None if principal.sees_all else principal.project
    rows = services.access.ledger.rows(first, to, () if by is None else (by,), whose)
    return [{name: _shown(services, name, value) for name, value in row.items()} for row in rows]


def _shown(services: Services, column: str, value: object) -> object:
    """Days as text, adapters as the project calls them."""
    if column == "adapter":
        shown = services.principal.viewpoint.shown
        return "+".join(name if name == BASE else shown(name) for name in str(value).split("+"))
    return value.isoformat() if isinstance(value, date) else value


def _entry(entry: Entry) -> dict[str, object]:
    return {
        "number": entry.number,
        "at": entry.at.isoformat(),
        "who": entry.who,
        "action": entry.action,
        "project": entry.project,
        "target": entry.target,
        "detail": dict(entry.detail),
    }
