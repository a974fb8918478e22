"""The rules for a manager: a key with the scope `manage`, which administers its own project's keys and limits.

A manager can make keys for its project with the scopes `generate`, `train` and `manage`. So it can do what any
such key can do. It can't see or change anything outside its project, and can't exceed the limits that the operator
set for the project. A key with `manage` has no limits of its own, since other keys could be made without them.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

import sqlalchemy as sa

from adapters.errors import FieldError, InvalidInput, NotFound
from server.access.principal import OPERATORS_SCOPES, Principal, Quota, Scope
from server.access.tables import api_keys
from server.errors import Forbidden


def manager_of(principal: Principal) -> Principal | None:
    """Return the principal if these rules bind it, or None for an operator, who may do everything."""
    return None if principal.is_operator else principal


def require_manager(connection: sa.Connection, manager: Principal | None) -> None:
    """Raise Forbidden if the manager's key isn't valid now, or has lost `manage` since the request was admitted.

    Call this first in a transaction that changes keys or limits.
    """
    if manager is None:
        return
    columns = (api_keys.c.scopes, api_keys.c.revoked_at, api_keys.c.expires_at)
    row = connection.execute(sa.select(*columns).where(api_keys.c.id == manager.key_id)).first()
    if row is None or row.revoked_at is not None or "manage" not in row.scopes:
        raise Forbidden("this key can't manage the project any more", reason="scope")
    if row.expires_at is not None and row.expires_at <= datetime.now(UTC):
        raise Forbidden("this key has expired", reason="scope")


def manages(manager: Principal | None, project: str, scopes: Sequence[Scope] = ()) -> bool:
    """Return whether the manager may see and change a key of this project with these scopes.

    The managers of `default` can't see or change the operator's keys there. If `manager` is None, return True.
    """
    return manager is None or (project == manager.project and not set(scopes) & set(OPERATORS_SCOPES))


def managed_project(principal: Principal, project: str | None) -> str | None:
    """Return the project that a request is about; None means all. `project` is the request's, if it names one.

    Raise NotFound if a manager's request names another project than its own.
    """
    if principal.is_operator:
        return project
    if project not in (None, principal.project):
        raise NotFound("there is no such project")
    return principal.project


def check_grant(
    manager: Principal, project: str, scopes: Sequence[Scope], ends: datetime | None, latest_end: datetime | None
) -> None:
    """Check a key that a manager wants to make or change. `latest_end` is when the manager's own key expires.

    Raise Forbidden if the project or the scopes aren't the manager's to give, and InvalidInput if the key would
    expire after the manager's own.
    """
    if project != manager.project:
        raise Forbidden(f"project: this key manages the project {manager.project} alone")
    if beyond := [scope for scope in scopes if scope in OPERATORS_SCOPES]:
        raise Forbidden(f"scopes: only the operator can give {', '.join(beyond)}")
    if latest_end is not None and (ends is None or ends > latest_end):
        message = f"must not be after the end of the key that makes it, {latest_end.isoformat()}"
        raise InvalidInput.of("expires_at", message)


def exceeding(limits: Mapping[str, int | None], bounds: Quota, whose: str) -> Iterator[FieldError]:
    """Yield a fault for each of the `limits` that is above the bound. `whose` says in words what the bound is."""
    for name, value in limits.items():
        bound = getattr(bounds, name)
        if value is not None and bound is not None and value > bound:
            most = "false" if bound is False else f"at most {bound:,}"
            yield FieldError((name,), f"must be {most}, {whose}")
